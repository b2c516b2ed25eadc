"""How often the top answer equals the teacher's, right or wrong. On the report card only."""

from __future__ import annotations

from collections.abc import Mapping

from peftlab.evaluation import row_metrics
from peftlab.measuring.intervals import Floats, Statistic


def statistic(rows: Mapping[str, Floats]) -> Statistic:
    """The share of agreeing positions over drawn rows, from ``agree`` and ``positions``."""
    return row_metrics.ratio(rows["agree"], rows["positions"])
