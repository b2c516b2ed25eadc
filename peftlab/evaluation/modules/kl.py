"""KL(teacher || model) in nats. On the report card only."""

from __future__ import annotations

from collections.abc import Mapping

from peftlab.evaluation import row_metrics
from peftlab.measuring.intervals import Floats, Statistic


def statistic(rows: Mapping[str, Floats]) -> Statistic:
    """The mean per position over drawn rows, from ``kl`` and ``positions``."""
    return row_metrics.ratio(rows["kl"], rows["positions"])
