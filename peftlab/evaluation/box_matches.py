"""Average precision of boxes by COCO's definition, on all images and on drawn ones. pycocotools matches boxes with objects."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftlab.measuring.intervals import Floats, Statistic

Boxes = Sequence[Sequence[Sequence[float]]]


def average_precision(predictions: Boxes, references: Boxes) -> tuple[float | None, float | None]:
    """The mean over the overlaps 0.5 to 0.95, and at 0.5; None if no image has an object. Overlaps are intersection over union.

    Args: predictions: per image [class, score, left, top, right, bottom] of each box. references: per image [class, left, top,
        right, bottom] of each object.
    """
    if not any(references):
        return None, None
    judge = _judge(predictions, references)
    if judge is None:
        return 0.0, 0.0
    # Reading prints lines.
    with contextlib.redirect_stdout(io.StringIO()):
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[0]), float(judge.stats[1])


def precision_statistic(predictions: Boxes, references: Boxes, *, overlaps: slice = slice(None)) -> Statistic:
    """``average_precision`` over drawn images: an image that is drawn twice counts twice. Boxes are matched once.

    Args: overlaps: which of 0.5, 0.55, ..., 0.95 to average over.
    """
    judge = _judge(predictions, references) if any(references) else None
    classes = [] if judge is None else _classes(judge, overlaps)
    recalls = None if judge is None else judge.params.recThrs

    def statistic(counts: Floats) -> Floats:
        if not classes:
            return np.full(len(counts), 0.0 if any(references) else np.nan)
        of_draws = []
        for drawn in counts:
            values = [v for one in classes if (v := one.precision(drawn, recalls)) is not None]
            of_draws.append(float(np.mean(values)) if values else np.nan)
        return np.array(of_draws)

    return statistic


@dataclass(frozen=True)
class _Class:
    """The boxes of one class, likeliest first. images: [N] the image of each. right: [T, N] whether it is right at each overlap.
    objects: [I] the number of objects in each image."""

    images: np.ndarray
    right: np.ndarray
    objects: np.ndarray

    def precision(self, drawn: Floats, recalls: Any) -> float | None:
        """Its average precision over images drawn so often; None if they have no such object. As ``COCOeval.accumulate``."""
        total = float(drawn @ self.objects)
        if not total:
            return None
        weights = drawn[self.images]
        right, wrong = np.cumsum(self.right * weights, axis=1), np.cumsum(~self.right * weights, axis=1)
        share = right / (right + wrong + np.spacing(1))
        share = np.maximum.accumulate(share[:, ::-1], axis=1)[:, ::-1]
        found = [
            np.append(one, 0.0)[np.searchsorted(hits / total, recalls, side="left")]
            for one, hits in zip(share, right, strict=True)
        ]
        return float(np.mean(found))


def _classes(judge: Any, overlaps: slice) -> list[_Class]:
    """The matches of boxes of every size, by class."""
    images, sizes = len(judge.params.imgIds), len(judge.params.areaRng)
    classes = []
    for start in range(0, len(judge.evalImgs), images * sizes):  # by class, then size, then image
        each = judge.evalImgs[start : start + images]
        objects = np.array([0 if one is None else int((one["gtIgnore"] == 0).sum()) for one in each])
        found = [(i, one) for i, one in enumerate(each) if one is not None]
        scores = np.concatenate([one["dtScores"] for _, one in found]) if found else np.zeros(0)
        order = np.argsort(-scores, kind="mergesort")
        where = np.repeat([i for i, _ in found], [len(one["dtScores"]) for _, one in found]).astype(np.int64)
        rows = np.concatenate([one["dtMatches"] for _, one in found], axis=1) if found else np.zeros((10, 0))
        classes.append(_Class(where[order], rows[overlaps][:, order] > 0, objects))
    return classes


def _judge(predictions: Boxes, references: Boxes) -> Any:
    """pycocotools' evaluation with all boxes matched; None if nothing was found."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def annotation(number: int, image: int, kind: float, box: Sequence[float]) -> dict[str, Any]:
        left, top, right, bottom = box
        size = [left, top, right - left, bottom - top]
        about = {"id": number, "image_id": image, "category_id": int(kind), "bbox": size}
        return about | {"area": size[2] * size[3], "iscrowd": 0}

    wanted = [(i, object_) for i, objects in enumerate(references) for object_ in objects]
    given = [(i, box) for i, boxes in enumerate(predictions) for box in boxes]
    if not given:
        return None
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(references))],
            "annotations": [annotation(n, i, o[0], o[1:]) for n, (i, o) in enumerate(wanted, 1)],
            "categories": [{"id": c} for c in sorted({int(o[0]) for _, o in wanted})],
        }
        truth.createIndex()
        found.dataset = {
            **truth.dataset,
            "annotations": [annotation(n, i, b[0], b[2:]) | {"score": b[1]} for n, (i, b) in enumerate(given, 1)],
        }
        found.createIndex()
        judge = COCOeval(truth, found, "bbox")
        judge.evaluate()
    return judge
