"""Pearson's correlation, computed by scipy; nan if one side is constant."""

from __future__ import annotations

import math

import datasets
import evaluate
from scipy.stats import pearsonr

from peftlab.evaluation.row_metrics import varies


class Pearson(evaluate.Metric):
    """Pearson's correlation, computed by scipy; nan if one side is constant."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Pearson's correlation, computed by scipy; nan if one side is constant.",
            citation="",
            inputs_description="predictions, references: numbers.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, *, predictions: list[float], references: list[float]) -> dict[str, float]:
        """``pearson``."""
        return {
            "pearson": float(
                pearsonr(references, predictions).statistic if varies(references) and varies(predictions) else math.nan
            )
        }
