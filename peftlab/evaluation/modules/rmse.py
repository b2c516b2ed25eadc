"""The root of the mean squared error, computed by scikit-learn."""

from __future__ import annotations

import datasets
import evaluate
from sklearn.metrics import root_mean_squared_error


class Rmse(evaluate.Metric):
    """The root of the mean squared error, computed by scikit-learn."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The root of the mean squared error, computed by scikit-learn.",
            citation="",
            inputs_description="predictions, references: numbers.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, *, predictions: list[float], references: list[float]) -> dict[str, float]:
        """``rmse``."""
        return {"rmse": float(root_mean_squared_error(references, predictions))}
