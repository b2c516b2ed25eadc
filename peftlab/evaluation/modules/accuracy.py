"""The share of correct classes, computed by scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import evaluate
from sklearn.metrics import accuracy_score

from peftlab.evaluation import row_metrics
from peftlab.measuring.intervals import Floats, Statistic


class Accuracy(evaluate.Metric):
    """Share of rows whose predicted class is the reference."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of correct predictions, over scikit-learn.",
            citation="",
            inputs_description="predictions, references: class indices.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, *, predictions: list[int], references: list[int]) -> dict[str, float]:
        """``accuracy`` in 0..1."""
        return {"accuracy": float(accuracy_score(references, predictions))}


def statistic(rows: Mapping[str, Floats]) -> Statistic:
    """Accuracy over drawn rows, from ``correct_classes`` and ``class_positions``."""
    return row_metrics.ratio(rows["correct_classes"], rows["class_positions"])
