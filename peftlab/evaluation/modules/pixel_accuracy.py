"""The share of labelled pixels whose class is right."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import evaluate
import numpy as np

from peftlab.evaluation import row_metrics
from peftlab.measuring.intervals import Floats, Statistic

_COUNTS = datasets.Sequence(datasets.Value("int64"))


class PixelAccuracy(evaluate.Metric):
    """Right pixels of all classes and images, divided by all labelled pixels."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of labelled pixels whose class is right.",
            citation="",
            inputs_description="right, true: per image the pixels of each class.",
            features=datasets.Features(dict.fromkeys(("right", "true"), _COUNTS)),
        )

    def _compute(self, *, right: list[list[int]], true: list[list[int]]) -> dict[str, float]:
        """``pixel_accuracy`` in 0..1."""
        return {"pixel_accuracy": float(np.sum(right) / np.sum(true))}


def statistic(rows: Mapping[str, Floats]) -> Statistic:
    """``pixel_accuracy`` over drawn rows."""
    return row_metrics.ratio(rows["pixels_right"].sum(1), rows["pixels_true"].sum(1))
