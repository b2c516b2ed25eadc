"""Precision of each class and their macro average, computed by scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import evaluate
from sklearn.metrics import precision_score

from peftlab.evaluation import row_metrics
from peftlab.measuring.intervals import Floats, Statistic


class Precision(evaluate.Metric):
    """Precision per class; a class never predicted scores 0.

    The macro average is over the classes that occur in the references or the predictions.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Precision per class and its macro average, over scikit-learn.",
            citation="",
            inputs_description="predictions, references: class indices; class_names: one name per class index.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(
        self, *, predictions: list[int], references: list[int], class_names: list[str]
    ) -> dict[str, float | None]:
        """``precision_macro`` and one ``precision_CLASS`` per class name, each in 0..1; None for a class without rows."""
        macro = precision_score(references, predictions, average="macro", zero_division=0.0)
        indices = list(range(len(class_names)))
        values = precision_score(references, predictions, labels=indices, average=None, zero_division=0.0)
        per_class = row_metrics.of_classes("precision", values, references, class_names)
        return {"precision_macro": float(macro), **per_class}


def statistic_of_class(rows: Mapping[str, Floats], index: int) -> tuple[Statistic, int]:
    """Precision of the class ``index`` over drawn rows, 0 if it is never predicted; and its total number of predictions."""
    predicted, true = rows["predicted_class"] == index, rows["true_class"] == index
    return row_metrics.share_of_class(predicted & true, predicted), int(predicted.sum())
