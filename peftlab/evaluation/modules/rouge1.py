"""ROUGE: the F-measure of words, as rouge-score computes it."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import evaluate
import numpy as np

from peftlab.evaluation import row_metrics, text_scores
from peftlab.measuring.intervals import Floats, Statistic


class Rouge1(evaluate.Metric):
    """The mean over rows."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE, F-measure of words.",
            citation="",
            inputs_description="predictions, references: texts, one reference each.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, *, predictions: list[str], references: list[str]) -> dict[str, float]:
        """``rouge1`` in 0..1."""
        return {"rouge1": float(np.mean(text_scores.rouge_rows("rouge1", predictions, references)))}


def statistic(rows: Mapping[str, Floats]) -> Statistic:
    """The mean over drawn rows."""
    return row_metrics.mean(rows["rouge1"])
