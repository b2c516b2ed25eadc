"""How often the top answer is the teacher's, right or wrong. On the report card alone."""

from __future__ import annotations

from collections.abc import Mapping

from peftlab.evaluation import row_metrics
from peftlab.measuring.intervals import Floats, Statistic


def statistic(rows: Mapping[str, Floats]) -> Statistic:
    """The share of positions over drawn rows, of their ``agree`` and ``positions``."""
    return row_metrics.ratio(rows["agree"], rows["positions"])
