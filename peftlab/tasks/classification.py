"""One label per row: shared code of text and image classification."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from peftlab.data import Ledger, Rows, nearest_label, read_labels
from peftlab.errors import DataError, RecipeError, listed
from peftlab.tasks.base import Columns, TaskParts
from peftlab.tasks.batch import example_weights, stacked_labels
from peftlab.tasks.example import Example
from peftlab.tasks.outputs import Outputs, cross_entropy


def class_config(names: Sequence[str]) -> dict[str, Any]:
    """Config values of a model with a head for these classes."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


@dataclass(frozen=True)
class Labels:
    """Reads the label column.

    Attributes:
        names: the classes, in index order. column: the label column.
        value_names: value in that column -> class. bins: cut points and class names of a numeric column.
        class_weights: weight of each class in the loss, by name, or ``balanced`` (inverse frequency of the training
            rows, mean 1 over them), or ``none``.
        key: the recipe key that names the column.
    """

    names: list[str]
    column: str = "label"
    scored = 1
    value_names: Mapping[str, str] | None = None
    bins: tuple[list[float], list[str]] | None = None
    class_weights: str | Mapping[str, float] = "none"
    key: str = "data.columns.label"

    def __post_init__(self) -> None:
        if not isinstance(self.class_weights, Mapping):
            return
        if set(self.class_weights) != set(self.names):
            raise RecipeError(
                f"expected a weight for each of the classes {listed(self.names)}; found {listed(sorted(self.class_weights))}",
                key="train.class_weights",
            )
        for name, weight in self.class_weights.items():
            if not 0 < weight < math.inf:
                raise RecipeError(
                    f"expected a weight above 0 for the class {name!r}, found {weight:g}; data.exclude leaves a class out of "
                    "training",
                    key="train.class_weights",
                )

    @classmethod
    def make(cls, parts: TaskParts) -> Labels:
        assert parts.classes is not None
        return cls(parts.classes, parts.column("label"), parts.label_names, parts.bins, parts.class_weights)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Config values of a model with a head for these classes."""
        return class_config(self.names)

    @property
    def read_columns(self) -> set[str]:
        return {self.column}

    def texts(self, rows: Rows) -> list[str]:
        """Class name of each row. Unused ``value_names`` are checked where the classes are collected."""
        return read_labels(
            rows, self.column, key=self.key, label_names=self.value_names, bins=self.bins, all_names_used=False
        )

    def values(self, rows: Rows) -> np.ndarray:
        """[N] class index of each row. Raises: DataError for an unknown label."""
        index = {name: i for i, name in enumerate(self.names)}
        labels = self.texts(rows)
        for i, label in enumerate(labels):
            if label not in index:
                raise DataError(
                    f"{rows.where(i)}: label {label!r} does not occur in the training data, whose labels are "
                    f"{listed(self.names)}{nearest_label(label, self.names)}",
                    key=self.key,
                )
        return np.array([index[label] for label in labels], dtype=np.int64)

    def weights(self, values: np.ndarray | None, count: int, *, training: bool) -> list[float]:
        """Weight of each row, by its class."""
        if values is None or not training or self.class_weights == "none":
            return [1.0] * count
        if isinstance(self.class_weights, Mapping):
            of_class = [self.class_weights[name] for name in self.names]
        else:
            counts = np.bincount(values, minlength=len(self.names))
            of_class = [len(values) / (len(counts) * max(1, int(rows))) for rows in counts]
        return [of_class[i] for i in values.tolist()]

    def note(self, ledger: Ledger, values: np.ndarray | None) -> np.ndarray | None:
        return values

    def outputs(self, logits: Tensor, labels: Tensor | None, weights: Tensor) -> Outputs:
        """One scored position per row."""
        return Outputs(logits, [1] * len(logits), targets=labels, weights=weights)

    def reference(self, logits: Tensor, examples: list[Example], device: Any) -> Outputs:
        targets, weights = stacked_labels(examples, device), example_weights(examples, device)
        return Outputs(logits, [1] * len(examples), targets=targets, weights=weights)

    def losses(self, outputs: Outputs) -> Tensor:
        return cross_entropy(outputs)

    def columns(self, outputs: Outputs, labels: Tensor) -> Columns:
        logits = outputs.logits()
        nll = F.cross_entropy(logits, labels, reduction="sum")
        return {
            "nll_sum": float(nll),
            "num_scored": len(logits),
            "predictions": logits.argmax(-1).tolist(),
            "references": labels.tolist(),
        }

    def results(self, outputs: Outputs) -> list[dict[str, Any]]:
        """``{"label", "probability", "probabilities": {name: p}}`` of each row."""
        return [prediction(probs, self.names) for probs in outputs.logits().softmax(-1).tolist()]

    def no_result(self) -> dict[str, Any]:
        return no_prediction(self.names)


def prediction(probs: list[float], names: list[str]) -> dict[str, Any]:
    """``{"label", "probability", "probabilities": {name: p}}`` of a row."""
    best = max(range(len(probs)), key=probs.__getitem__)
    return {
        "label": names[best],
        "probability": probs[best],
        "probabilities": dict(zip(names, probs, strict=True)),
    }


def no_prediction(names: list[str]) -> dict[str, Any]:
    """The keys of ``prediction`` without values."""
    return {"label": None, "probability": None, "probabilities": dict.fromkeys(names)}
