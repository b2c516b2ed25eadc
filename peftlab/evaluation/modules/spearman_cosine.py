"""The rank correlation of cosines with scores, computed by SciPy."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from scipy.stats import spearmanr


class SpearmanCosine(evaluate.Metric):
    """Spearman's rank correlation of the cosine of two texts with their score."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Spearman's rank correlation, over SciPy.",
            citation="",
            inputs_description="cosines, scores: one number per pair of texts.",
            features=datasets.Features({"cosines": datasets.Value("float64"), "scores": datasets.Value("float64")}),
        )

    def _compute(self, *, cosines: list[float], scores: list[float]) -> dict[str, float | None]:
        """``spearman_cosine`` in -1..1; None if all cosines or all scores are equal."""
        if np.ptp(cosines) == 0 or np.ptp(scores) == 0:
            return {"spearman_cosine": None}
        return {"spearman_cosine": float(spearmanr(cosines, scores).statistic)}
