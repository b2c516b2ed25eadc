"""The mean reciprocal rank of the first right answer."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np


class MeanReciprocalRank(evaluate.Metric):
    """Mean of 1 / rank, over all queries."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean reciprocal rank of the first right answer.",
            citation="",
            inputs_description="ranks: the rank of the first right answer of each query, from 1.",
            features=datasets.Features({"ranks": datasets.Value("int64")}),
        )

    def _compute(self, *, ranks: list[int]) -> dict[str, float]:
        """``mrr`` in 0..1."""
        return {"mrr": float(np.mean(1.0 / np.asarray(ranks, dtype=np.float64)))}
