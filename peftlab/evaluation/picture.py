"""Draws a confusion matrix, and the objects found in an image. matplotlib is imported only when a picture is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peftlab.measuring.drawing import colours, save_pictures
from peftlab.specs.metrics import class_slugs

# More classes get no numbers in the cells, and the most get no names either.
_MOST_NUMBERED, _MOST_NAMED = 20, 60
_CELL = 0.42
# Inches of the longer side of an image with boxes.
_LONGEST = 6.7


def draw_confusion(metrics: Mapping[str, Any], class_names: Sequence[str], path: Path) -> None:
    """Writes the picture of the ``confusion_R_as_P`` counts in ``metrics``."""
    slugs = class_slugs(class_names)
    counts = np.array([[metrics[f"confusion_{a}_as_{b}"] for b in slugs] for a in slugs])
    save_pictures(lambda: build_confusion(counts, class_names), path)


def draw_objects(image: Any, objects: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes a ``PIL.Image`` with the boxes, classes and scores of ``objects``, as ``predict`` returns them."""
    save_pictures(lambda: build_objects(image, objects), path)


def build_objects(image: Any, objects: Sequence[Mapping[str, Any]]) -> Any:
    """A matplotlib ``Figure``: the longer side of the image has about 1000 pixels, so that small images show their boxes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    scale = _LONGEST / max(image.size)
    figure = Figure(figsize=(image.width * scale, image.height * scale))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(image, extent=(0, image.width, image.height, 0), interpolation="nearest")
    axes.set_axis_off()
    colour_of = colours(sorted({one["label"] for one in objects}))
    for one in reversed(objects):  # the likeliest on top
        left, top, right, bottom = one["box"]
        colour = colour_of[one["label"]]
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=2.5))
        axes.text(
            left,
            top,
            f" {one['label']} {one['score']:.2f} ",
            color="white",
            fontsize=10,
            ha="left",
            va="bottom" if top > 0.06 * image.height else "top",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.5},
        )
    return figure


def build_confusion(counts: np.ndarray, class_names: Sequence[str]) -> Any:
    """A matplotlib ``Figure``. Args: counts: [C, C] rows of each class (down) predicted as each class (across)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = len(counts)
    side = min(max(2.6, _CELL * size), 18.0)
    figure = Figure(figsize=(side + 2.6, side + 1.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    totals = counts.sum(axis=1, keepdims=True)
    shares = 100 * np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=100.0)
    figure.colorbar(image, ax=axes, shrink=0.85, label="% of the rows of a class")
    right, rows = int(np.trace(counts)), int(counts.sum())
    axes.set_title(f"{right:,} of {rows:,} rows right ({right / max(rows, 1):.1%})", fontsize=10, loc="left")
    axes.set_xlabel("predicted")
    axes.set_ylabel("correct")
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in class_names]
    if size <= _MOST_NAMED:
        axes.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks(range(size), names, fontsize=8)
    if size <= _MOST_NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 55 else "black"
                axes.text(column, row, f"{int(count):,}", ha="center", va="center", fontsize=8, color=colour)
    return figure
