"""The mean reciprocal rank of the first right answer."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np


class MeanReciprocalRank(evaluate.Metric):
    """Mean of 1 / rank, over the queries that have one."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean reciprocal rank of the first right answer.",
            citation="",
            inputs_description="ranks: the rank of the first right answer of each query, from 1, or None.",
            features=datasets.Features({"ranks": datasets.Value("int64")}),
        )

    def _compute(self, *, ranks: list[int | None]) -> dict[str, float | None]:
        """``mrr`` in 0..1; None if no query has a rank."""
        known = np.array([rank for rank in ranks if rank is not None], dtype=np.float64)
        return {"mrr": float(np.mean(1.0 / known)) if len(known) else None}
