"""Any number of labels per row: each label is a decision of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from peftlab.data import Ledger, Rows, nearest_label
from peftlab.data.label_sets import label_columns, label_set_names, read_label_sets
from peftlab.errors import DataError, listed
from peftlab.tasks.answers import listed_or_none, yes_or_no, yes_or_no_reference, yes_probabilities
from peftlab.tasks.base import Columns, TaskParts
from peftlab.tasks.classification import class_config
from peftlab.tasks.example import Example
from peftlab.tasks.outputs import Outputs, cross_entropy


@dataclass(frozen=True)
class LabelSets:
    """See ``answers.Answers``. The scored positions of a row are its decisions, one per label, in the order of ``names``.

    Attributes:
        columns_read: the columns in the data. separator, value_names: see ``data.label_sets``.
        thresholds: label -> the probability from which a row has it. ``tune`` sets them. tuned: whether it shall.
    """

    names: list[str]
    column: str
    columns_read: Sequence[str]
    separator: str | None = None
    value_names: Mapping[str, str] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    tuned: bool = False

    @classmethod
    def make(cls, parts: TaskParts) -> LabelSets:
        assert parts.classes is not None
        threshold = parts.settings["eval.threshold"]
        fixed = 0.5 if threshold in (None, "tuned") else float(threshold)
        tuned = parts.found.get("thresholds", {}) if threshold == "tuned" else {}
        return cls(
            parts.classes,
            parts.column("labels"),
            label_columns(parts.column("labels"), parts.available),
            parts.settings["data.separator"],
            parts.label_names,
            {name: float(tuned.get(name, fixed)) for name in parts.classes},
            threshold == "tuned",
        )

    @classmethod
    def find(cls, parts: TaskParts, rows: Rows) -> list[str]:
        """The labels in the rows, or the names of the columns of 0 and 1. Raises: DataError."""
        column = parts.column("labels")
        columns = label_columns(column, rows.columns)
        sets = read_label_sets(rows, column, separator=parts.settings["data.separator"], label_names=parts.label_names)
        return columns if len(columns) > 1 and not parts.label_names else label_set_names(sets)

    @property
    def scored(self) -> int:
        return len(self.names)

    @property
    def read_columns(self) -> set[str]:
        return set(self.columns_read)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        return class_config(self.names) | {"problem_type": "multi_label_classification"}

    def texts(self, rows: Rows) -> list[str]:
        return [listed_or_none(labels) for labels in self._read(rows)]

    def values(self, rows: Rows) -> np.ndarray:
        """[N, L] int64 0 or 1. Raises: DataError for an unknown label."""
        index = {name: i for i, name in enumerate(self.names)}
        values = np.zeros((len(rows), len(self.names)), dtype=np.int64)
        for i, labels in enumerate(self._read(rows)):
            for label in labels:
                if label not in index:
                    raise DataError(
                        f"{rows.where(i)}: label {label!r} does not occur in the training data, whose labels are "
                        f"{listed(self.names)}{nearest_label(label, self.names)}",
                        key="data.columns.labels",
                    )
                values[i, index[label]] = 1
        return values

    def _read(self, rows: Rows) -> list[list[str]]:
        return read_label_sets(rows, self.column, separator=self.separator, label_names=self.value_names)

    def weights(self, values: np.ndarray | None, count: int, *, training: bool) -> list[float]:
        return [1.0] * count

    def note(self, ledger: Ledger, values: np.ndarray | None) -> np.ndarray | None:
        return values

    def outputs(self, logits: Tensor, labels: Tensor | None, weights: Tensor) -> Outputs:
        return yes_or_no(logits, labels, weights)

    def reference(self, logits: Tensor, examples: list[Example], device: Any) -> Outputs:
        return yes_or_no_reference(logits, examples, device)

    def losses(self, outputs: Outputs) -> Tensor:
        """[N] binary cross-entropy of each decision."""
        return cross_entropy(outputs)

    def columns(self, outputs: Outputs, labels: Tensor) -> Columns:
        probabilities = yes_probabilities(outputs)
        chosen = probabilities >= probabilities.new_tensor([self.thresholds[name] for name in self.names])
        return {
            "nll_sum": float(cross_entropy(outputs).sum()),
            "num_scored": len(outputs),
            "predicted_labels": chosen.long().tolist(),
            "true_labels": labels.tolist(),
            "label_probabilities": probabilities.tolist(),
        }

    def results(self, outputs: Outputs) -> list[dict[str, Any]]:
        """``{"labels": [name], "probabilities": {name: p}}`` of each row."""
        return [
            {
                "labels": [n for n, p in zip(self.names, row, strict=True) if p >= self.thresholds[n]],
                "probabilities": dict(zip(self.names, row, strict=True)),
            }
            for row in yes_probabilities(outputs).tolist()
        ]

    def no_result(self) -> dict[str, Any]:
        return {"labels": None, "probabilities": dict.fromkeys(self.names)}

    def tune(self, probabilities: np.ndarray, values: np.ndarray) -> dict[str, float]:
        """Sets the thresholds with the best F1 of each label on rows with these [N, L] probabilities and answers, and returns
        them. A label that no row has, or all have, keeps 0.5."""
        for name, scores, right in zip(self.names, probabilities.T, values.T, strict=True):
            self.thresholds[name] = _best_threshold(scores, right) if 0 < right.sum() < len(right) else 0.5
        return dict(self.thresholds)


def _best_threshold(scores: np.ndarray, right: np.ndarray) -> float:
    """The middle between the two neighbouring probabilities where F1 is best; the highest such place."""
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order].astype(np.float64), np.cumsum(right[order])
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + right.sum())
    f1[:-1][scores[:-1] == scores[1:]] = -1.0  # equal probabilities are all above a threshold, or none
    at = int(f1.argmax())
    below = scores[at + 1] if at + 1 < len(scores) else 0.0
    return float(math.fsum([scores[at], below]) / 2)
