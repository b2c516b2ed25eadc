"""A number per row.

A model learns numbers in units of their standard deviation, so that the learning rate does not depend on the data's units.
When training ends, the scale goes into the head's weight and bias: the files of a run give numbers in the data's units, also
in plain transformers and PEFT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.data import Ledger, Rows, read_numbers
from peftlab.errors import DataError, RecipeError
from peftlab.tasks.base import Columns, TaskParts
from peftlab.tasks.example import Example
from peftlab.tasks.outputs import Outputs, at_least_float32, numbers_of

_KEY = "data.columns.score"


@dataclass
class Numbers:
    """See ``answers.Answers``. ``Outputs.values`` are [B, 1], in standard deviations from the mean.

    Attributes:
        mean, std: of the training rows, in the data's units.
        has_bias: whether the head has a bias; a model without one learns numbers in units of their root mean square.
        in_training: whether the model gives the numbers that it learns, and not the data's.
    """

    mean: float
    std: float
    column: str = "score"
    has_bias: bool = True
    in_training: bool = False
    names: list[str] | None = None
    scored = 1

    @classmethod
    def make(cls, parts: TaskParts) -> Numbers:
        return cls(float(parts.found["mean"]), float(parts.found["std"]), parts.column("score"))

    @classmethod
    def find(cls, parts: TaskParts, rows: Rows) -> dict[str, float]:
        """Mean and standard deviation of the rows' numbers. Raises: DataError if all are equal."""
        numbers = read_numbers(rows, parts.column("score"))
        mean, std = math.fsum(numbers) / max(1, len(numbers)), float(np.std(numbers)) if len(numbers) else 0.0
        if not std > 0:
            what = f"all {len(numbers):,} rows have the score {numbers[0]:g}" if len(numbers) else "there are no rows"
            raise DataError(f"{what}; a regression needs different ones", key=_KEY)
        return {"mean": mean, "std": std}

    @property
    def read_columns(self) -> set[str]:
        return {self.column}

    @property
    def model_kwargs(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    @property
    def _learned(self) -> tuple[float, float]:
        """The data's number for an output of 0 while the model learns, and what an output of 1 is more."""
        return (self.mean, self.std) if self.has_bias else (0.0, math.hypot(self.mean, self.std))

    @property
    def _to_deviations(self) -> tuple[float, float]:
        """What to add to, and to multiply before, an output of the model to have standard deviations from the mean."""
        if self.in_training:
            zero, one = self._learned
            return (zero - self.mean) / self.std, one / self.std
        return -self.mean / self.std, 1 / self.std

    def texts(self, rows: Rows) -> list[str]:
        return [f"{number:g}" for number in read_numbers(rows, self.column)]

    def values(self, rows: Rows) -> np.ndarray:
        """[N] float64 in the data's units."""
        return read_numbers(rows, self.column)

    def weights(self, values: np.ndarray | None, count: int, *, training: bool) -> list[float]:
        return [1.0] * count

    def note(self, ledger: Ledger, values: np.ndarray | None) -> np.ndarray | None:
        ledger.numbers = values
        return None

    def outputs(self, logits: Tensor, labels: Tensor | None, weights: Tensor) -> Outputs:
        shift, scale = self._to_deviations
        values = at_least_float32(logits) * scale + shift
        targets = None if labels is None else ((labels.double() - self.mean) / self.std).to(values.dtype)
        unit = (self.mean, self.mean + self.std)
        return Outputs(values, [1] * len(values), vectors=True, unit=unit, targets=targets, weights=weights)

    def reference(self, logits: Tensor, examples: list[Example], device: Any) -> Outputs:
        zero, one = self._learned if self.in_training else (0.0, 1.0)
        values = [(row * one + (zero - self.mean)) / self.std for row in at_least_float32(logits)]
        labelled = all(e.label is not None for e in examples)
        targets = [(float(np.asarray(e.label)) - self.mean) / self.std for e in examples] if labelled else None
        return Outputs(
            torch.stack(values),
            [1] * len(examples),
            vectors=True,
            unit=(self.mean, self.mean + self.std),
            targets=None if targets is None else torch.tensor(targets, dtype=values[0].dtype, device=device),
            weights=torch.tensor([e.weight for e in examples], dtype=torch.float64, device=device),
        )

    def losses(self, outputs: Outputs) -> Tensor:
        """[N] squared errors."""
        assert outputs.targets is not None
        return (outputs.values[:, 0] - outputs.targets).square()

    def columns(self, outputs: Outputs, labels: Tensor) -> Columns:
        return {
            "nll_sum": float(self.losses(outputs).sum()),
            "num_scored": len(outputs),
            "predicted_numbers": _predicted(outputs),
            "true_numbers": labels.double().tolist(),
        }

    def results(self, outputs: Outputs) -> list[dict[str, Any]]:
        """``{"score": number}`` of each row."""
        return [{"score": number} for number in _predicted(outputs)]

    def no_result(self) -> dict[str, Any]:
        return {"score": None}

    def begin(self, model: nn.Module, *, trained_before: bool) -> None:
        """Prepares a model for training. Args: trained_before: whether its head gives the data's units. Raises: RecipeError."""
        head = _head(model)
        self.has_bias, self.in_training = head.bias is not None, True
        if trained_before:
            zero, one = self._learned
            _rescale(head, -zero / one, 1 / one)

    def finish(self, model: nn.Module) -> None:
        """Puts the scale into the head of a model as it was trained."""
        _rescale(_head(model), *self._learned)
        self.in_training = False


def _predicted(outputs: Outputs) -> list[float]:
    """In the data's units."""
    assert outputs.unit is not None
    return numbers_of(outputs.values[:, 0], outputs.unit)


def _head(model: nn.Module) -> nn.Linear:
    """The trained layer that gives the number. Raises: RecipeError if it is no single linear layer."""
    heads = [m for m in model.modules() if type(m) is nn.Linear and m.out_features == 1 and m.weight.requires_grad]
    if len(heads) != 1:
        raise RecipeError(
            f"expected one trained linear layer that gives the number, found {len(heads)}, so the scale of the scores cannot be "
            "folded into this model; use another model, or cut the scores into classes with data.bins and "
            "data.columns={label: ...}",
            key="model.name",
        )
    return heads[0]


@torch.no_grad()
def _rescale(head: nn.Linear, shift: float, scale: float) -> None:
    """Lets ``head`` give ``scale * y + shift`` in place of y."""
    head.weight.mul_(scale)
    if head.bias is not None:
        head.bias.mul_(scale).add_(shift)
