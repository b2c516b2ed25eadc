"""One label per row: shared code of text and image classification."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.data import Rows, nearest_label, read_labels
from peftlab.errors import DataError, RecipeError, listed
from peftlab.tasks.base import Columns, TaskParts
from peftlab.tasks.batch import Batch, example_weights, stacked_labels
from peftlab.tasks.example import Example
from peftlab.tasks.outputs import Outputs, cross_entropy, weighted_sum


@dataclass(frozen=True)
class Labels:
    """Reads the label column.

    Attributes:
        names: the classes, in index order. column: the label column.
        value_names: value in that column -> class. bins: cut points and class names of a numeric column.
        class_weights: weight of each class in the loss, by name, or ``balanced`` (inverse frequency of the training
            rows, mean 1 over them), or ``none``.
    """

    names: list[str]
    column: str = "label"
    value_names: Mapping[str, str] | None = None
    bins: tuple[list[float], list[str]] | None = None
    class_weights: str | Mapping[str, float] = "none"

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
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: i for i, name in enumerate(self.names)},
        }

    def read(self, rows: Rows) -> list[str]:
        """Class name of each row. Unused ``value_names`` are checked where the classes are collected."""
        return read_labels(rows, self.column, label_names=self.value_names, bins=self.bins, all_names_used=False)

    def indices(self, rows: Rows) -> np.ndarray:
        """[N] class index of each row. Raises: DataError for an unknown label."""
        index = {name: i for i, name in enumerate(self.names)}
        labels = self.read(rows)
        for i, label in enumerate(labels):
            if label not in index:
                raise DataError(
                    f"{rows.where(i)}: label {label!r} does not occur in the training data, whose labels are "
                    f"{listed(self.names)}{nearest_label(label, self.names)}",
                    key="data.columns.label",
                )
        return np.array([index[label] for label in labels], dtype=np.int64)

    def weights(self, labels: np.ndarray | None, *, training: bool) -> list[float]:
        """Weight of each class, for rows with these class indices."""
        if labels is None or not training or self.class_weights == "none":
            return [1.0] * len(self.names)
        if isinstance(self.class_weights, Mapping):
            return [self.class_weights[name] for name in self.names]
        counts = np.bincount(labels, minlength=len(self.names))
        return [len(labels) / (len(counts) * max(1, int(count))) for count in counts]


def outputs_of(logits: Tensor, batch: Batch) -> Outputs:
    """One scored position per row."""
    return Outputs(logits, [1] * len(logits), targets=batch.labels, weights=batch.weights)


def reference_outputs_of(logits: Tensor, examples: list[Example], device: Any) -> Outputs:
    """The same, from the examples."""
    weights = example_weights(examples, device)
    return Outputs(logits, [1] * len(examples), targets=stacked_labels(examples, device), weights=weights)


def labels_loss_sum(task: Any, model: nn.Module, batch: Batch) -> Tensor:
    return weighted_sum(cross_entropy(task.outputs(model, batch)), batch.weights)


def labels_score(task: Any, model: nn.Module, batch: Batch) -> Columns:
    assert batch.labels is not None
    logits = task.outputs(model, batch).logits()
    nll = F.cross_entropy(logits, batch.labels, reduction="sum")
    return {
        "nll_sum": float(nll),
        "num_scored": len(logits),
        "predictions": logits.argmax(-1).tolist(),
        "references": batch.labels.tolist(),
    }


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
