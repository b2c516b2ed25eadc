"""``shapes:N``: drawn images of circles, squares and triangles, with their boxes and masks."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

SIDE = 64
NAMES = ("circle", "square", "triangle")
_MOST_OBJECTS = 4
_SMALLEST, _LARGEST = 12, 28
# A pixel of an object at least this many times larger than its edges' blur.
_SUPERSAMPLED = 4
_SEED = 20


def draw_shapes(count: int) -> dict[str, list[Any]]:
    """The columns of ``count`` images of 64 x 64 pixels with 1 to 4 objects each, on a coloured gradient with noise. Image i
    is the same for every ``count``.

    ``image``, ``mask``: PNG files; a pixel of the mask is 0 for the ground, else 1 + the index in ``NAMES``. ``objects``: a
    record of lists, as COCO's.
    """
    columns: dict[str, list[Any]] = {"image": [], "objects": [], "mask": []}
    for index in range(count):
        image, objects, mask = _draw(np.random.default_rng([_SEED, index]))
        columns["image"].append(_png(image))
        columns["objects"].append(objects)
        columns["mask"].append(_png(mask))
    return columns


def _draw(rng: np.random.Generator) -> tuple[np.ndarray, dict[str, list[Any]], np.ndarray]:
    ends = rng.uniform(30, 225, (2, 3))
    slope = np.linspace(0, 1, SIDE)
    ramp = slope[:, None] if rng.random() < 0.5 else slope[None, :]
    pixels = np.broadcast_to(ramp[..., None], (SIDE, SIDE, 3)) * (ends[1] - ends[0]) + ends[0]
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    objects: dict[str, list[Any]] = {"bbox": [], "category": []}
    taken = np.zeros((SIDE, SIDE), dtype=bool)
    for _ in range(int(rng.integers(1, _MOST_OBJECTS + 1))):
        kind, size = int(rng.integers(len(NAMES))), int(rng.integers(_SMALLEST, _LARGEST + 1))
        left, top = (int(v) for v in rng.integers(0, SIDE - size + 1, 2))
        cover = _cover(kind, size)
        around = taken[max(top - 1, 0) : top + size + 1, max(left - 1, 0) : left + size + 1]
        here = pixels[top : top + size, left : left + size]
        colour = rng.uniform(0, 255, 3)
        if around.any() or np.abs(colour - here.mean((0, 1))).max() < 60:
            continue  # it would hide another one, or could not be seen
        here += cover[..., None] * (colour - here)
        taken[top : top + size, left : left + size] = True
        inside = cover > 0.5
        mask[top : top + size, left : left + size][inside] = 1 + kind
        rows, cols = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        box = [left + cols[0], top + rows[0], cols[-1] - cols[0] + 1, rows[-1] - rows[0] + 1]
        objects["bbox"].append([float(v) for v in box])
        objects["category"].append(NAMES[kind])
    noisy = pixels + rng.normal(0, 8, pixels.shape)
    return noisy.clip(0, 255).round().astype(np.uint8), objects, mask


def _cover(kind: int, size: int) -> np.ndarray:
    """[size, size] the share of each pixel that a shape of this size covers."""
    fine = (np.arange(size * _SUPERSAMPLED) + 0.5) / (size * _SUPERSAMPLED)
    y, x = fine[:, None], fine[None, :]
    if kind == 0:
        inside = (x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25
    elif kind == 1:
        inside = np.ones((len(fine), len(fine)), dtype=bool)
    else:
        inside = np.abs(x - 0.5) <= y / 2
    cover: np.ndarray = inside.reshape(size, _SUPERSAMPLED, size, _SUPERSAMPLED).mean((1, 3))
    return cover


def _png(pixels: np.ndarray) -> bytes:
    import PIL.Image

    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
