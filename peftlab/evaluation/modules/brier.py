"""The Brier score: the squared error of the probabilities, summed over the classes. On the report card only."""

from __future__ import annotations

from collections.abc import Mapping

from peftlab.evaluation import row_metrics
from peftlab.measuring.intervals import Floats, Statistic


def statistic(rows: Mapping[str, Floats]) -> Statistic:
    """The mean per position over drawn rows, from ``brier`` and ``positions``."""
    return row_metrics.ratio(rows["brier"], rows["positions"])
