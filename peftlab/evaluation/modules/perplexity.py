"""Perplexity from per-batch sums."""

from __future__ import annotations

import math
from collections.abc import Mapping

import datasets
import evaluate

from peftlab.evaluation import row_metrics
from peftlab.measuring.intervals import Floats, Statistic


class Perplexity(evaluate.Metric):
    """exp of the mean negative log-likelihood in nats per scored token."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="exp of the mean negative log-likelihood per token.",
            citation="",
            inputs_description="nll_sum: summed nats of each batch; num_tokens: scored tokens of each batch.",
            features=datasets.Features({"nll_sum": datasets.Value("float64"), "num_tokens": datasets.Value("int64")}),
        )

    def _compute(self, *, nll_sum: list[float], num_tokens: list[int]) -> dict[str, float]:
        """``perplexity``, at least 1; ``inf`` if exp exceeds float64 (above 709 nats per token)."""
        try:
            return {"perplexity": math.exp(math.fsum(nll_sum) / sum(num_tokens))}
        except OverflowError:
            return {"perplexity": math.inf}


def statistic(rows: Mapping[str, Floats]) -> Statistic:
    """Perplexity over drawn rows, from ``nll`` and ``tokens``."""
    return row_metrics.exp_ratio(rows["nll"], rows["tokens"])
