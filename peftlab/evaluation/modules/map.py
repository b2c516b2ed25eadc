"""Mean average precision of boxes, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import datasets
import evaluate
import numpy as np

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


def average_precision(
    predictions: list[list[list[float]]], references: list[list[list[float]]]
) -> tuple[float | None, float | None]:
    """The mean over the overlaps 0.5 to 0.95, and at 0.5. Overlaps are intersection over union."""
    if not any(references):
        return None, None
    # Reading prints lines.
    with contextlib.redirect_stdout(io.StringIO()):
        stats = _evaluated(predictions, references)
    return float(stats[0]), float(stats[1])


def _evaluated(predictions: list[list[list[float]]], references: list[list[list[float]]]) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def annotation(number: int, image: int, kind: float, box: list[float]) -> dict[str, Any]:
        left, top, right, bottom = box
        size = [left, top, right - left, bottom - top]
        about = {"id": number, "image_id": image, "category_id": int(kind), "bbox": size}
        return about | {"area": size[2] * size[3], "iscrowd": 0}

    truth = COCO()
    wanted = [(i, object_) for i, objects in enumerate(references) for object_ in objects]
    truth.dataset = {
        "images": [{"id": i} for i in range(len(references))],
        "annotations": [annotation(n, i, o[0], o[1:]) for n, (i, o) in enumerate(wanted, 1)],
        "categories": [{"id": c} for c in sorted({int(o[0]) for _, o in wanted})],
    }
    truth.createIndex()
    given = [(i, box) for i, boxes in enumerate(predictions) for box in boxes]
    if not given:
        return np.zeros(2)
    found = COCO()
    found.dataset = {
        **truth.dataset,
        "annotations": [annotation(n, i, b[0], b[2:]) | {"score": b[1]} for n, (i, b) in enumerate(given, 1)],
    }
    found.createIndex()
    judge = COCOeval(truth, found, "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return judge.stats
