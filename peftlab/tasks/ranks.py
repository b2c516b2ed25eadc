"""Ordered classes: one decision per step between neighbours, whether a row is above it.

Source: Niu et al. 2016, "Ordinal Regression with Multiple Output CNN for Age Estimation": K - 1 binary classifiers with a
common body. Each has its own weights here, so that the head is the model family's own; the probabilities of being above are
made to fall from step to step when they are read (their running minimum).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftlab.data import Ledger, Rows, read_labels
from peftlab.errors import DataError, RecipeError, listed
from peftlab.tasks.answers import yes_or_no, yes_or_no_reference, yes_probabilities
from peftlab.tasks.base import Columns, TaskParts
from peftlab.tasks.classification import Labels, class_config
from peftlab.tasks.example import Example
from peftlab.tasks.outputs import Outputs, cross_entropy

_KEY = "data.columns.rank"


@dataclass(frozen=True)
class Ranks:
    """See ``answers.Answers``. The scored positions of a row are its K - 1 decisions. Attributes: labels: read the ranks."""

    labels: Labels

    @classmethod
    def make(cls, parts: TaskParts) -> Ranks:
        assert parts.classes is not None
        column = parts.column("rank")
        return cls(Labels(parts.classes, column, parts.label_names, parts.bins, parts.class_weights, _KEY))

    @classmethod
    def find(cls, parts: TaskParts, rows: Rows) -> list[str]:
        """The ranks, lowest first: by data.order, data.bins, data.label_names, or as numbers. Raises: DataError."""
        found = set(read_labels(rows, parts.column("rank"), key=_KEY, label_names=parts.label_names, bins=parts.bins))
        if order := parts.settings["data.order"]:
            if unknown := sorted(found - set(order)):
                raise DataError(f"expected the ranks {listed(order)}, found {listed(unknown)}", key="data.order")
            names: Sequence[str] = order
        elif parts.bins is not None:
            names = parts.bins[1]
        elif parts.label_names:
            names = list(dict.fromkeys(parts.label_names.values()))
        else:
            names = _by_number(found, parts.column("rank"))
        if len(names) < 2 or len(found) < 2:
            raise DataError(f"expected at least two ranks, found {listed(sorted(found)) or 'none'}", key=_KEY)
        return list(names)

    @property
    def names(self) -> list[str]:
        return self.labels.names

    @property
    def scored(self) -> int:
        return len(self.names) - 1

    @property
    def read_columns(self) -> set[str]:
        return self.labels.read_columns

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """The outputs of the model are the decisions, named after the class that a row is above."""
        above = [f"above {name}" for name in self.names[:-1]]
        return class_config(above) | {"problem_type": "multi_label_classification"}

    def texts(self, rows: Rows) -> list[str]:
        return self.labels.texts(rows)

    def values(self, rows: Rows) -> np.ndarray:
        """[N, K - 1] int64: whether a row is above each class but the highest."""
        return (self.labels.values(rows)[:, None] > np.arange(self.scored)).astype(np.int64)

    def weights(self, values: np.ndarray | None, count: int, *, training: bool) -> list[float]:
        return self.labels.weights(None if values is None else values.sum(1), count, training=training)

    def note(self, ledger: Ledger, values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values.sum(1)

    def outputs(self, logits: Tensor, labels: Tensor | None, weights: Tensor) -> Outputs:
        return yes_or_no(logits, labels, weights)

    def reference(self, logits: Tensor, examples: list[Example], device: Any) -> Outputs:
        return yes_or_no_reference(logits, examples, device)

    def losses(self, outputs: Outputs) -> Tensor:
        """[N] binary cross-entropy of each decision."""
        return cross_entropy(outputs)

    def columns(self, outputs: Outputs, labels: Tensor) -> Columns:
        chosen, right = _above(outputs).gt(0.5).sum(1).tolist(), labels.sum(1).tolist()
        return {
            "nll_sum": float(cross_entropy(outputs).sum()),
            "num_scored": len(outputs),
            "predictions": chosen,
            "references": right,
            "predicted_ranks": chosen,
            "true_ranks": right,
        }

    def results(self, outputs: Outputs) -> list[dict[str, Any]]:
        """``{"label", "probability", "probabilities": {name: p}}`` of each row. The label is the middle one: as much
        probability lies below as above."""
        above = _above(outputs)
        edge = above.new_ones(len(above), 1)
        probabilities = torch.cat([edge, above], 1) - torch.cat([above, 0 * edge], 1)
        return [
            {"label": self.names[at], "probability": row[at], "probabilities": dict(zip(self.names, row, strict=True))}
            for at, row in zip(above.gt(0.5).sum(1).tolist(), probabilities.tolist(), strict=True)
        ]

    def no_result(self) -> dict[str, Any]:
        return self.labels.no_result()


def _above(outputs: Outputs) -> Tensor:
    """[B, K - 1] probabilities of being above each class, falling from class to class."""
    return yes_probabilities(outputs).cummin(1).values


def _by_number(found: set[str], column: str) -> list[str]:
    try:
        return sorted(found, key=float)
    except ValueError:
        raise RecipeError(
            f"the ranks in the column {column!r} are no numbers ({listed(sorted(found))}); say their order, lowest first, in "
            f"data.order, such as [{', '.join(sorted(found)[:3])}]",
            key="data.order",
        ) from None
