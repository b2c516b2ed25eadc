"""The share of the variance that is explained, computed by scikit-learn."""

from __future__ import annotations

import math

import datasets
import evaluate
from sklearn.metrics import r2_score


class R2(evaluate.Metric):
    """The share of the variance that is explained, computed by scikit-learn."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The share of the variance that is explained, computed by scikit-learn.",
            citation="",
            inputs_description="predictions, references: numbers.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, *, predictions: list[float], references: list[float]) -> dict[str, float]:
        """``r2``."""
        return {"r2": float(r2_score(references, predictions) if len(references) > 1 else math.nan)}
