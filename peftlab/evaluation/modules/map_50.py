"""Mean average precision of boxes that overlap by half, computed by pycocotools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import evaluate

from peftlab.evaluation.box_matches import average_precision, precision_statistic
from peftlab.evaluation.modules import map as coco
from peftlab.measuring.intervals import Statistic


class Map50(evaluate.Metric):
    """Average precision at an overlap of 0.5, averaged over the classes."""

    def _info(self) -> evaluate.MetricInfo:
        return coco.Map._info(self)

    def _compute(
        self, *, predictions: list[list[list[float]]], references: list[list[list[float]]]
    ) -> dict[str, float | None]:
        """``map_50``; None if no image has an object."""
        return {"map_50": average_precision(predictions, references)[1]}


def statistic(rows: Mapping[str, Any]) -> Statistic:
    """``map_50`` over drawn images, from what is found and right in each."""
    return precision_statistic(rows["found"], rows["objects"], overlaps=slice(0, 1))
