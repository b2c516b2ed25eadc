"""The share of rows whose prediction equals the reference exactly."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import evaluate
from sklearn.metrics import accuracy_score

from peftlab.evaluation import row_metrics
from peftlab.measuring.intervals import Floats, Statistic


class ExactMatch(evaluate.Metric):
    """Share of rows that match exactly: nothing is stripped, lowercased or otherwise normalised."""

    def _info(self) -> evaluate.MetricInfo:
        # Text comes first: evaluate takes the first schema that fits, and "3" also fits int64.
        schemas = [
            datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)})
            for kind in ("string", "int64")
        ]
        return evaluate.MetricInfo(
            description="Share of rows that match exactly.",
            citation="",
            inputs_description="predictions, references: texts, or ints (a row is right: prediction 1, reference 1).",
            features=schemas,
        )

    def _compute(self, *, predictions: list[str] | list[int], references: list[str] | list[int]) -> dict[str, float]:
        """``exact_match`` in 0..1."""
        return {"exact_match": float(accuracy_score(references, predictions))}


def statistic(rows: Mapping[str, Floats]) -> Statistic:
    """The share of drawn rows whose ``tokens`` are all correct, among rows with tokens."""
    has_tokens = rows["tokens"] > 0
    return row_metrics.ratio(has_tokens & (rows["correct_tokens"] == rows["tokens"]), has_tokens)
