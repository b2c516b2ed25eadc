"""Recall of each class and their macro average, computed by scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import evaluate
from sklearn.metrics import recall_score

from peftlab.evaluation import row_metrics
from peftlab.measuring.intervals import Floats, Statistic


class Recall(evaluate.Metric):
    """Recall per class; a class without references scores 0.

    The macro average is over the classes that occur in the references or the predictions.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Recall per class and its macro average, over scikit-learn.",
            citation="",
            inputs_description="predictions, references: class indices; class_names: one name per class index.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(
        self, *, predictions: list[int], references: list[int], class_names: list[str]
    ) -> dict[str, float | None]:
        """``recall_macro`` and one ``recall_CLASS`` per class name, each in 0..1; None for a class without rows."""
        macro = recall_score(references, predictions, average="macro", zero_division=0.0)
        indices = list(range(len(class_names)))
        values = recall_score(references, predictions, labels=indices, average=None, zero_division=0.0)
        per_class = row_metrics.of_classes("recall", values, references, class_names)
        return {"recall_macro": float(macro), **per_class}


def statistic_of_class(rows: Mapping[str, Floats], index: int) -> tuple[Statistic, int]:
    """Recall of the class ``index`` over drawn rows, 0 if no row has it; and its total number of rows."""
    predicted, true = rows["predicted_class"] == index, rows["true_class"] == index
    return row_metrics.share_of_class(predicted & true, true), int(true.sum())
