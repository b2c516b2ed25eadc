"""Intersection over union of pixels: of each class, and the mean over the classes."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import evaluate

from peftlab.evaluation.pixel_counts import iou_statistic, iou_values, mean_iou_statistic
from peftlab.measuring.intervals import Floats, Statistic

_COUNTS = datasets.Sequence(datasets.Value("int64"))


class Iou(evaluate.Metric):
    """Pixels of a class in both masks, divided by those in either, summed over all images first."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Intersection over union (Jaccard index) of each class and the mean over classes.",
            citation="",
            inputs_description="right, predicted, true: per image the pixels of each class; class_names: one name per class.",
            features=datasets.Features(dict.fromkeys(("right", "predicted", "true"), _COUNTS)),
        )

    def _compute(
        self, *, right: list[list[int]], predicted: list[list[int]], true: list[list[int]], class_names: list[str]
    ) -> dict[str, float | None]:
        """``iou_macro`` and one ``iou_CLASS`` per class, each in 0..1."""
        return iou_values(right, predicted, true, class_names)


def statistic(rows: Mapping[str, Floats]) -> Statistic:
    """``iou_macro`` over drawn rows."""
    return mean_iou_statistic(rows)


def statistic_of_class(rows: Mapping[str, Floats], index: int) -> tuple[Statistic, int]:
    """That of the class ``index`` over drawn rows, and the number of rows with such a pixel."""
    return iou_statistic(rows, index)
