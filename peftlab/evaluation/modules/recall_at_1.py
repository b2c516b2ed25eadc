"""The share of queries whose right answer comes first."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np


class RecallAt1(evaluate.Metric):
    """Share of ranks up to 1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of queries whose right answer is among the first 1.",
            citation="",
            inputs_description="ranks: the rank of the right answer of each query, from 1.",
            features=datasets.Features({"ranks": datasets.Value("int64")}),
        )

    def _compute(self, *, ranks: list[int]) -> dict[str, float]:
        """``recall_at_1`` in 0..1."""
        return {"recall_at_1": float(np.mean(np.asarray(ranks) <= 1))}
