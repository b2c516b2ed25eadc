"""The mean squared error, computed by scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import evaluate
import numpy as np
from sklearn.metrics import mean_squared_error

from peftlab.evaluation import row_metrics
from peftlab.measuring.intervals import Floats, Statistic


class Mse(evaluate.Metric):
    """The mean squared error, computed by scikit-learn."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The mean squared error, computed by scikit-learn.",
            citation="",
            inputs_description="predictions, references: numbers.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, *, predictions: list[float], references: list[float]) -> dict[str, float]:
        """``mse``."""
        return {"mse": float(mean_squared_error(references, predictions))}


def statistic(rows: Mapping[str, Floats]) -> Statistic:
    """The same over drawn rows, from ``predicted_numbers`` and ``true_numbers``."""
    return row_metrics.mean(np.square(rows["predicted_numbers"] - rows["true_numbers"]))
