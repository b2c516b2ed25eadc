"""The share of triplets whose positive is closer to the anchor than the negative."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np


class TripletAccuracy(evaluate.Metric):
    """Share of right triplets."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of triplets whose positive has the larger cosine.",
            citation="",
            inputs_description="right: 1 for each right triplet, else 0.",
            features=datasets.Features({"right": datasets.Value("int64")}),
        )

    def _compute(self, *, right: list[int]) -> dict[str, float]:
        """``triplet_accuracy`` in 0..1."""
        return {"triplet_accuracy": float(np.mean(right))}
