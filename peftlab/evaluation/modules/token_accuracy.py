"""The share of tokens whose top prediction is correct."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import evaluate

from peftlab.evaluation import row_metrics
from peftlab.measuring.intervals import Floats, Statistic


class TokenAccuracy(evaluate.Metric):
    """Correct tokens of all batches / scored tokens of all batches."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of tokens predicted right (top 1).",
            citation="",
            inputs_description="num_correct, num_tokens: correct and scored tokens of each batch.",
            features=datasets.Features({"num_correct": datasets.Value("int64"), "num_tokens": datasets.Value("int64")}),
        )

    def _compute(self, *, num_correct: list[int], num_tokens: list[int]) -> dict[str, float]:
        """``token_accuracy`` in 0..1."""
        return {"token_accuracy": sum(num_correct) / sum(num_tokens)}


def statistic(rows: Mapping[str, Floats]) -> Statistic:
    """Token accuracy over drawn rows, from ``correct_tokens`` and ``tokens``."""
    return row_metrics.ratio(rows["correct_tokens"], rows["tokens"])
