"""What a row's right answer is for a model that reads whole texts: one class, several labels, a rank or a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from peftlab.data import Ledger, Rows
from peftlab.tasks.base import Columns
from peftlab.tasks.example import Example
from peftlab.tasks.outputs import Outputs


class Answers(Protocol):
    """The answers of a variant of sequence classification."""

    @property
    def names(self) -> list[str] | None:
        """The classes in index order; None: there are none."""

    @property
    def scored(self) -> int:
        """The number of scored positions of a row."""

    @property
    def read_columns(self) -> set[str]:
        """The columns of the data that it reads."""

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Config values of a model with a head for these answers."""

    def texts(self, rows: Rows) -> list[str]:
        """The answer of each row for a preview. Raises: DataError."""

    def values(self, rows: Rows) -> np.ndarray:
        """[N] or [N, L] the answers: ``Example.label``. Raises: DataError with file and line."""

    def weights(self, values: np.ndarray | None, count: int, *, training: bool) -> list[float]:
        """The weight of each of ``count`` rows in the loss, for each of its scored positions."""

    def note(self, ledger: Ledger, values: np.ndarray | None) -> np.ndarray | None:
        """What the ledger counts: [N] class indices, or [N, L] 0 and 1."""

    def outputs(self, logits: Tensor, labels: Tensor | None, weights: Tensor) -> Outputs:
        """Of a model's ``logits`` [B, C]. Args: weights: [B] summed over each row's positions."""

    def reference(self, logits: Tensor, examples: list[Example], device: Any) -> Outputs:
        """The same, example by example, without code of ``outputs``."""

    def losses(self, outputs: Outputs) -> Tensor:
        """[N] the loss at each position."""

    def columns(self, outputs: Outputs, labels: Tensor) -> Columns:
        """The columns of ``Task.score``."""

    def results(self, outputs: Outputs) -> list[dict[str, Any]]:
        """One result of ``predict`` per row."""

    def no_result(self) -> dict[str, Any]:
        """A result without values."""


def yes_or_no(logits: Tensor, labels: Tensor | None, weights: Tensor) -> Outputs:
    """Each of L independent decisions of a row as a position with two classes, whose logits are 0 and z: cross-entropy there
    is binary cross-entropy of z, and a divergence there is one of Bernoulli distributions.

    Args: logits: [B, L] z. labels: [B, L] 0 or 1. weights: [B] sums over each row's decisions.
    """
    count, num = logits.shape
    return Outputs(
        torch.stack([torch.zeros_like(logits), logits], dim=-1).reshape(count * num, 2),
        [num] * count,
        targets=None if labels is None else labels.reshape(-1),
        weights=(weights / num).repeat_interleave(num),
    )


def yes_or_no_reference(logits: Tensor, examples: list[Example], device: Any) -> Outputs:
    """What ``yes_or_no`` gives, one decision at a time."""
    values, targets, weights = [], [], []
    for row, example in zip(logits, examples, strict=True):
        for place, z in enumerate(row):
            values.append(torch.stack([z * 0, z]))
            weights.append(example.weight / len(row))
            if example.label is not None:
                targets.append(int(np.asarray(example.label)[place]))
    return Outputs(
        torch.stack(values),
        [len(row) for row in logits],
        targets=torch.tensor(targets, device=device) if targets else None,
        weights=torch.tensor(weights, dtype=torch.float64, device=device),
    )


def yes_probabilities(outputs: Outputs) -> Tensor:
    """[B, L] the probabilities of the decisions in ``yes_or_no``."""
    num = outputs.counts[0]
    return outputs.logits().softmax(-1)[:, 1].reshape(-1, num)


def listed_or_none(labels: Sequence[str]) -> str:
    return ", ".join(labels) or "(none)"
