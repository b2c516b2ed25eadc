"""The mean negative log-likelihood in nats."""

from __future__ import annotations

import math
from collections.abc import Mapping

import datasets
import evaluate

from peftlab.evaluation import row_metrics
from peftlab.measuring.intervals import Floats, Statistic


class Loss(evaluate.Metric):
    """Sum of the nats over all batches / number of scored tokens (of rows, for a classifier)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean negative log-likelihood per token, in nats.",
            citation="",
            inputs_description="nll_sum: summed nats of each batch; num_tokens: scored tokens of each batch.",
            features=datasets.Features({"nll_sum": datasets.Value("float64"), "num_tokens": datasets.Value("int64")}),
        )

    def _compute(self, *, nll_sum: list[float], num_tokens: list[int]) -> dict[str, float]:
        """``loss`` in nats per token."""
        return {"loss": math.fsum(nll_sum) / sum(num_tokens)}


def statistic(rows: Mapping[str, Floats]) -> Statistic:
    """Loss over drawn rows, from ``nll`` and ``positions``."""
    return row_metrics.ratio(rows["nll"], rows["positions"])
