"""Mean average precision of boxes, computed by pycocotools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import evaluate

from peftlab.evaluation.box_matches import average_precision, precision_statistic
from peftlab.measuring.intervals import Statistic

_BOXES = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))


class Map(evaluate.Metric):
    """COCO's average precision, averaged over the classes."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Average precision of boxes by COCO's definition, over pycocotools.",
            citation="",
            inputs_description="predictions: per image [class, score, left, top, right, bottom] of each box, likeliest first; "
            "references: per image [class, left, top, right, bottom] of each object.",
            features=datasets.Features({"predictions": _BOXES, "references": _BOXES}),
        )

    def _compute(
        self, *, predictions: list[list[list[float]]], references: list[list[list[float]]]
    ) -> dict[str, float | None]:
        """``map``: the mean over the overlaps 0.5, 0.55, ..., 0.95. None if no image has an object."""
        return {"map": average_precision(predictions, references)[0]}


def statistic(rows: Mapping[str, Any]) -> Statistic:
    """``map`` over drawn images, from what is found and right in each."""
    return precision_statistic(rows["found"], rows["objects"])
