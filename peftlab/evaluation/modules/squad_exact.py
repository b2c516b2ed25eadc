"""SQuAD's exact match of answers to questions, over rows with and without an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import evaluate

from peftlab.evaluation import row_metrics
from peftlab.evaluation.squad_scores import FEATURES, INPUTS, averages
from peftlab.measuring.intervals import Floats, Statistic


class SquadExact(evaluate.Metric):
    """See ``squad_scores``."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="SQuAD's exact match of answers.", citation="", inputs_description=INPUTS, features=FEATURES
        )

    def _compute(self, *, predictions: list[dict[str, Any]], references: list[list[str]]) -> dict[str, float | None]:
        """``squad_exact`` and its parts, each in 0..1."""
        return averages("squad_exact", 0, predictions, references)


def statistic(rows: Mapping[str, Floats]) -> Statistic:
    """The mean over drawn rows."""
    return row_metrics.mean(rows["answer_exact"])
