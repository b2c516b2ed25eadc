"""Cohen's kappa with quadratic weights, for ordered classes, computed by scikit-learn."""

from __future__ import annotations

import datasets
import evaluate
from sklearn.metrics import cohen_kappa_score


class QuadraticKappa(evaluate.Metric):
    """Cohen's kappa with quadratic weights, for ordered classes, computed by scikit-learn."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Cohen's kappa with quadratic weights, for ordered classes, computed by scikit-learn.",
            citation="",
            inputs_description="predictions, references: indices of ordered classes.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, *, predictions: list[int], references: list[int]) -> dict[str, float]:
        """``quadratic_kappa``."""
        return {"quadratic_kappa": float(cohen_kappa_score(references, predictions, weights="quadratic"))}
