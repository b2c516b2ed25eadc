"""Intersection over union and accuracy of pixels, from the pixels of each class that are right, predicted and true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from peftlab.measuring.intervals import Floats, Statistic

# The columns, in the order of the counts.
COLUMNS = ("pixels_right", "pixels_predicted", "pixels_true")


def iou_values(
    right: ArrayLike, predicted: ArrayLike, true: ArrayLike, class_names: Sequence[str]
) -> dict[str, float | None]:
    """``iou_macro``, the mean over the classes that occur in predictions or references, and ``iou_CLASS`` of each; None for a
    class that no mask has. Args: right, predicted, true: [N, C] pixels of each class in each image."""
    both, found, wanted = (np.asarray(counts, dtype=np.int64).sum(0) for counts in (right, predicted, true))
    either = found + wanted - both
    occurs = either > 0
    shares = both / np.maximum(either, 1)
    classes = {f"iou_{name}": float(shares[i]) if wanted[i] else None for i, name in enumerate(class_names)}
    return {"iou_macro": float(shares[occurs].mean()) if occurs.any() else None, **classes}


def mean_iou_statistic(rows: Mapping[str, Floats]) -> Statistic:
    """``iou_macro`` over drawn rows, from the columns [N, C]."""
    right, either = _right_and_either(rows)

    def statistic(counts: Floats) -> Floats:
        above, below = counts @ right, counts @ either
        shares = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
        return np.asarray(shares.sum(-1) / np.maximum((below > 0).sum(-1), 1))

    return statistic


def iou_statistic(rows: Mapping[str, Floats], index: int) -> tuple[Statistic, int]:
    """The intersection over union of one class over drawn rows, and the number of rows with such a pixel."""
    right, either = _right_and_either(rows)

    def statistic(counts: Floats) -> Floats:
        above, below = counts @ right[:, index], counts @ either[:, index]
        return np.divide(above, below, out=np.zeros_like(above), where=below > 0)

    return statistic, int((rows["pixels_true"][:, index] > 0).sum())


def _right_and_either(rows: Mapping[str, Floats]) -> tuple[Floats, Floats]:
    right, predicted, true = (np.asarray(rows[name], dtype=np.float64) for name in COLUMNS)
    return right, predicted + true - right
