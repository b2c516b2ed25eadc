"""The mean distance between predicted and right class, in classes, computed by scikit-learn."""

from __future__ import annotations

import datasets
import evaluate
from sklearn.metrics import mean_absolute_error


class RankMae(evaluate.Metric):
    """The mean distance between predicted and right class, in classes, computed by scikit-learn."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The mean distance between predicted and right class, in classes, computed by scikit-learn.",
            citation="",
            inputs_description="predictions, references: indices of ordered classes.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, *, predictions: list[int], references: list[int]) -> dict[str, float]:
        """``rank_mae``."""
        return {"rank_mae": float(mean_absolute_error(references, predictions))}
