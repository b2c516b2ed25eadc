"""Masks of the drawn shapes without a model, for the figures in the header of recipes/shape-masks.yaml."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
from sklearn.metrics import jaccard_score

from peftlab.data import Rows


def mask_baselines(train: Rows, held_out: Rows) -> dict[str, float]:
    """Mean IoU of two answers for every held-out image: all ground; and a colour threshold, where a pixel far from the median
    colour of its row and of its column is an object, of the class that most objects' pixels have in ``train``."""
    counts = np.bincount(np.concatenate([_decoded(m) for m in train.columns["mask"]], axis=None), minlength=4)
    likeliest = 1 + int(counts[1:].argmax())
    distances = [_distances(_decoded(image)) for image in train.columns["image"][:300]]
    masks = np.stack([_decoded(mask) for mask in train.columns["mask"][:300]])
    # The threshold that finds objects best in the training images.
    threshold = max(range(10, 100, 5), key=lambda t: jaccard_score(masks.ravel() > 0, np.stack(distances).ravel() > t))
    truth = np.stack([_decoded(mask) for mask in held_out.columns["mask"]])
    found = np.stack([_distances(_decoded(image)) > threshold for image in held_out.columns["image"]])
    return {
        "ground": _mean_iou(truth, np.zeros_like(truth)),
        "threshold": _mean_iou(truth, np.where(found, likeliest, 0)),
    }


def _distances(image: np.ndarray) -> np.ndarray:
    """[H, W] the largest difference of a pixel's colours from the median of its row or of its column, whichever is less."""
    pixels = image.astype(np.float64)
    along = [np.abs(pixels - np.median(pixels, axis=axis, keepdims=True)).max(-1) for axis in (0, 1)]
    return np.asarray(np.minimum(*along))


def _mean_iou(truth: np.ndarray, found: np.ndarray) -> float:
    return float(jaccard_score(truth.ravel(), found.ravel(), average="macro", labels=range(4), zero_division=0))


def _decoded(raw: bytes) -> np.ndarray:
    with PIL.Image.open(io.BytesIO(raw)) as image:
        return np.asarray(image)
