"""The confusion matrix, computed by scikit-learn."""

from __future__ import annotations

import datasets
import evaluate
from sklearn.metrics import confusion_matrix


class Confusion(evaluate.Metric):
    """Counts of rows per reference class and predicted class."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Confusion matrix, over scikit-learn.",
            citation="",
            inputs_description="predictions, references: class indices; class_names: one name per class index.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(
        self, *, predictions: list[int], references: list[int], class_names: list[str]
    ) -> dict[str, list[list[int]]]:
        """``confusion``: [references, predictions] counts, both in the order of class_names."""
        matrix = confusion_matrix(references, predictions, labels=list(range(len(class_names))))
        return {"confusion": matrix.tolist()}
