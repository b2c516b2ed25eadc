"""The normalised discounted cumulative gain of the first ten answers."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np


class NdcgAt10(evaluate.Metric):
    """Mean over queries of the gains of the first ten answers, discounted by log2(1 + rank), over those of the best order."""

    def _info(self) -> evaluate.MetricInfo:
        gains = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description="Normalised discounted cumulative gain of the first ten answers.",
            citation="",
            inputs_description="gains: of the first ten answers of each query, in order. ideal: its ten largest gains; empty: not ranked.",
            features=datasets.Features({"gains": gains, "ideal": gains}),
        )

    def _compute(self, *, gains: list[list[float]], ideal: list[list[float]]) -> dict[str, float | None]:
        """``ndcg_at_10`` in 0..1; None if no query has gains."""
        shares = [_discounted(found) / _discounted(best) for found, best in zip(gains, ideal, strict=True) if any(best)]
        return {"ndcg_at_10": float(np.mean(shares)) if shares else None}


def _discounted(gains: list[float]) -> float:
    return float(np.sum(np.asarray(gains, dtype=np.float64) / np.log2(np.arange(2, len(gains) + 2))))
