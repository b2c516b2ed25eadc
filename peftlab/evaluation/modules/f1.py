"""F1 of each class and their macro average, computed by scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import f1_score

from peftlab.evaluation import row_metrics
from peftlab.measuring.intervals import Floats, Statistic


class F1(evaluate.Metric):
    """F1 per class; a class without rows has none.

    The macro average is over the classes that occur in the references or the predictions.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1 per class and its macro average, over scikit-learn.",
            citation="",
            inputs_description="predictions, references: class indices; class_names: one name per class index.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(
        self, *, predictions: list[int], references: list[int], class_names: list[str]
    ) -> dict[str, float | None]:
        """``f1_macro`` and one ``f1_CLASS`` per class name, each in 0..1; None for a class without rows."""
        macro = f1_score(references, predictions, average="macro", zero_division=0.0)
        indices = list(range(len(class_names)))
        values = f1_score(references, predictions, labels=indices, average=None, zero_division=0.0)
        per_class = row_metrics.of_classes("f1", values, references, class_names)
        return {"f1_macro": float(macro), **per_class}


def statistic(rows: Mapping[str, Floats]) -> Statistic:
    """``f1_macro`` over drawn rows, from ``predicted_class`` and ``true_class``."""
    return macro_f1(rows["predicted_class"].astype(np.int64), rows["true_class"].astype(np.int64))


def statistic_of_class(rows: Mapping[str, Floats], index: int) -> tuple[Statistic, int]:
    """F1 of the class ``index`` over drawn rows, 0 if it is neither present nor predicted; and its number of rows."""
    predicted, true = rows["predicted_class"] == index, rows["true_class"] == index
    return row_metrics.share_of_class(2.0 * (predicted & true), 1.0 * true + predicted), int(true.sum())


def macro_f1(predictions: ArrayLike, references: ArrayLike) -> Statistic:
    """F1 averaged over the classes that occur among the drawn rows, as prediction or reference (scikit-learn's rule).

    Args:
        predictions, references: [N] class indices.
    """
    from scipy.sparse import csr_array

    predicted, true = np.asarray(predictions), np.asarray(references)
    num_classes = int(max(predicted.max(), true.max())) + 1
    everyone = np.arange(len(true))

    def one_hot(classes: np.ndarray, rows: np.ndarray) -> csr_array:
        return csr_array((np.ones(len(rows)), (rows, classes)), shape=(len(true), num_classes))

    hits = np.flatnonzero(predicted == true)
    hit, predictions_hot, references_hot = (
        one_hot(true[hits], hits),
        one_hot(predicted, everyone),
        one_hot(true, everyone),
    )

    def statistic(counts: Floats) -> Floats:
        size = counts @ predictions_hot + counts @ references_hot
        f1 = np.divide(2 * (counts @ hit), size, out=np.zeros_like(size), where=size > 0)
        return np.asarray(f1.sum(axis=1) / (size > 0).sum(axis=1))

    return statistic
