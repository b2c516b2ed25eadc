"""The outputs of a model at the scored positions of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


@dataclass(frozen=True)
class OutputHead:
    """The layer that turns hidden states into logits, ``cap(scale * module(h))``; softcap: None without a cap."""

    module: nn.Module
    softcap: float | None
    scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] float32 logits (float64 stays) of ``hidden`` [N, H]."""
        dtype = self.module.weight.dtype if type(self.module) is nn.Linear else hidden.dtype
        logits = self.module(hidden.to(dtype))
        logits = at_least_float32(logits) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True)
class Outputs:
    """The outputs of a model at the N scored positions of a batch, example by example. The loss, distillation and the
    comparison of models use it, so a task that provides it has all three.

    Attributes:
        values: [N, H] hidden states that ``head`` turns into logits; [N, C] logits without a head; or [N, H] vectors.
        head: the head of a language model, whose logits are computed a part at a time.
        vectors: whether the values are the answer themselves, as with sentence embeddings and numbers.
        unit: of numbers, [N, 1]: the data's numbers for the values 0 and 1; None: they are no numbers.
        targets: [N] or [N, ...] correct answers of any type; None if the rows have no labels. soft: [N, C] their probabilities
            where an answer is not one class. weights: [N] factors on the
            losses; None: all 1.
        counts: number of positions of each example in the batch.
    """

    values: Tensor
    counts: Sequence[int]
    head: OutputHead | None = None
    vectors: bool = False
    unit: tuple[float, float] | None = None
    targets: Tensor | None = None
    weights: Tensor | None = None
    soft: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def logits(self, chosen: slice = slice(None)) -> Tensor:
        """[n, C] float32 logits (float64 stays) of the ``chosen`` positions."""
        assert not self.vectors
        values = self.values[chosen]
        return at_least_float32(values) if self.head is None else self.head.logits(values)


def numbers_of(values: Tensor, unit: tuple[float, float]) -> list[float]:
    """The data's numbers for ``values`` [N]."""
    at_0, at_1 = unit
    numbers: list[float] = (values.double() * (at_1 - at_0) + at_0).tolist()
    return numbers


def cross_entropy(outputs: Outputs) -> Tensor:
    """[N] nats of the target class at each position, float32 (float64 stays)."""
    assert outputs.targets is not None
    logits = outputs.logits()
    targets = outputs.targets if outputs.soft is None else outputs.soft.to(logits.dtype)
    return F.cross_entropy(logits, targets, reduction="none")


def weighted_sum(losses: Tensor, weights: Tensor | None) -> Tensor:
    """[] the weighted sum of [N] ``losses``."""
    return (losses if weights is None else losses * weights.to(losses.dtype)).sum()
