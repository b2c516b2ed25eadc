"""Mean average precision of boxes that overlap by half, computed by pycocotools."""

from __future__ import annotations

import evaluate

from peftlab.evaluation.modules import map as coco


class Map50(evaluate.Metric):
    """Average precision at an overlap of 0.5, averaged over the classes."""

    def _info(self) -> evaluate.MetricInfo:
        return coco.Map._info(self)

    def _compute(
        self, *, predictions: list[list[list[float]]], references: list[list[list[float]]]
    ) -> dict[str, float | None]:
        """``map_50``; None if no image has an object."""
        return {"map_50": coco.average_precision(predictions, references)[1]}
