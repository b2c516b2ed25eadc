"""Shared code of the pictures: checking their names, placing labels without overlap, and writing the files."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from peftlab.errors import RecipeError

FORMATS = (".png", ".svg")
# Candidate offsets of a label from its point, in points, best first.
_PLACES = [(9, 5), (9, -11), (-9, 5), (-9, -11), (0, 11), (0, -17), (17, -3), (-17, -3), (20, 12), (-20, 12)]
_PLACES += [
    (20, -18),
    (-20, -18),
    (0, 24),
    (0, -30),
    (34, 0),
    (-34, 0),
    (34, 14),
    (-34, 14),
    (34, -20),
    (-34, -20),
    (0, 38),
    (0, -44),
]

# Okabe and Ito (2008): safe for colour-blind readers.
_PALETTE = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
_MARKS = "os^DvPX*"


def check_picture(path: Path) -> None:
    """Raises RecipeError for a file that cannot be drawn."""
    if path.suffix.lower() not in FORMATS:
        raise RecipeError(f"expected a picture that ends in .png or .svg, found {path.name!r}")
    if not path.absolute().parent.is_dir():
        raise RecipeError(f"{path.absolute().parent} is no folder; make it first")


def colours(names: Iterable[str]) -> dict[str, str]:
    """Returns a colour per name, by position; colours repeat after eight."""
    return dict(zip(names, itertools.cycle(_PALETTE), strict=False))


def markers(names: Iterable[str]) -> dict[str, str]:
    """Returns a marker per name, by position; after eight they repeat, shifted by one, so that no pair of colour and marker repeats."""
    turned = itertools.chain.from_iterable((*_MARKS[i:], *_MARKS[:i]) for i in itertools.count())
    return dict(zip(names, turned, strict=False))


def save_pictures(build: Callable[[], Any], *paths: Path) -> None:
    """Writes the figure of ``build`` to .png and .svg files, each by a rename; equal figures give equal SVG files."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "peftlab", "font.size": 10}):
        figure = build()
        for path in paths:
            kind = path.suffix[1:].lower()
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            figure.savefig(partial, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
            os.replace(partial, path)


def place_labels(axes: Any, points: Sequence[tuple[float, float, str, tuple[float, float], str]]) -> None:
    """Puts a label next to each point, if possible without covering a point, a bar or another label.

    Args: points: x, y, label, the ends of the y bar, and the colour of the label.
    """
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    taken = []
    for x, y, _, ends, _ in points:
        px, py = axes.transData.transform((x, y))
        taken.append(Bbox.from_extents(px - 8, py - 8, px + 8, py + 8))
        taken.extend(bar.get_window_extent(renderer) for bar in axes.collections)
        bottom, top = (axes.transData.transform((x, end))[1] for end in ends)
        taken.append(Bbox.from_extents(px - 4, bottom, px + 4, top))
    frame = axes.get_window_extent(renderer)
    for x, y, label, _, colour in points:
        best, least = None, float("inf")
        for rank, offset in enumerate(_PLACES if label else []):
            text = axes.annotate(
                label,
                (x, y),
                xytext=offset,
                textcoords="offset points",
                ha="center",
                fontsize=9,
                zorder=4,
                color=colour,
            )
            box = text.get_window_extent(renderer)
            cost = 10.0 * sum(box.overlaps(other) for other in taken) + 0.1 * rank
            cost += 0 if frame.containsx(box.x0) and frame.containsx(box.x1) and frame.containsy(box.y1) else 20
            if cost < least:
                if best is not None:
                    best.remove()
                best, least = text, cost
            else:
                text.remove()
        if best is not None:
            taken.append(best.get_window_extent(renderer))
