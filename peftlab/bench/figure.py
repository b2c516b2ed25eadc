"""Draws a benchmark: tokens per second against peak memory, a numbered point per cell, the Pareto front.

matplotlib is imported only when a picture is drawn.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.bench.captions import CAPTIONS, cell_label, dimensions, machine_text, memory_unit, protocol_text
from peftlab.measuring.drawing import place_labels, save_pictures
from peftlab.specs.kernels import KERNEL_MODES
from peftlab.specs.storages import STORAGES

# PEFT's path is a hollow triangle.
MARKERS = dict(zip((mode.name for mode in KERNEL_MODES.values() if mode.benched), "osDvP", strict=False)) | {
    "reference": "^"
}
_GREY = "#666666"
_WIDTH, _PANEL_HEIGHT, _KEY_LINE, _LEFT = 10.0, 4.6, 0.19, 0.085
# Maximum panel height, even with a long key.
_MOST_HEIGHT = 11.0


def draw_picture(document: Mapping[str, Any], png: Path, svg: Path) -> bool:
    """Writes the picture as PNG and SVG; returns False if no cell has figures."""
    if not drawn_cells(document):
        return False
    save_pictures(lambda: build_figure(document), png, svg)
    return True


def drawn_cells(document: Mapping[str, Any]) -> list[tuple[int, Mapping[str, Any]]]:
    """The cells with figures, and their numbers in the table."""
    return [(i, cell) for i, cell in enumerate(document["cells"], start=1) if cell["status"] == "ok"]


def build_figure(document: Mapping[str, Any]) -> Any:
    """Returns a matplotlib ``Figure`` with a panel each for training and generation, if measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = drawn_cells(document)
    works = list(dict.fromkeys(cell["what"] for _, cell in drawn))
    varying, fixed = dimensions([cell for _, cell in drawn])
    key_lines = max(sum(cell["what"] == work for _, cell in drawn) for work in works)
    height = max(_PANEL_HEIGHT, _KEY_LINE * (key_lines + 9))
    figure = Figure(figsize=(_WIDTH, height * len(works) + 1.25))
    FigureCanvasAgg(figure)
    top = figure.get_figheight()
    title = textwrap.shorten(f"{document['header']['unit']['model']}: speed against memory", 90)
    size = 14 if len(title) <= 60 else 11
    figure.suptitle(title, x=_LEFT, y=1 - 0.3 / top, ha="left", fontsize=size, fontweight="bold")
    below = [machine_text(document["header"]), "; ".join([", ".join(fixed), protocol_text(document["header"])])]
    lines = [line for text in below for line in textwrap.wrap(text.strip("; "), 118)]
    figure.text(_LEFT, 1 - 0.52 / top, "\n".join(lines), ha="left", va="top", fontsize=9, color=_GREY, linespacing=1.4)
    for index, work in enumerate(works):
        cells = [(i, cell) for i, cell in drawn if cell["what"] == work]
        bottom = (height * (len(works) - 1 - index) + 0.85) / top
        tall = min(height - 0.85, _MOST_HEIGHT)
        axes = figure.add_axes((_LEFT, bottom + (height - 0.85 - tall) / top, 0.55, tall / top))
        _panel(axes, work, cells)
        _key(axes, cells, [name for name in varying if name != "what"])
    figure.text(
        _LEFT,
        0.16 / top,
        "Bars: 95 % interval of the median; quartiles with fewer than 3 repetitions. Grey line: no cell is both faster and "
        "smaller.",
        fontsize=8,
        color=_GREY,
    )
    return figure


def _panel(axes: Any, work: str, cells: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    scale, unit = memory_unit([cell["peak_bytes"]["median"] for _, cell in cells])
    points = []
    known = all(cell["tokens_per_s"]["low"] is not None for _, cell in cells)
    low, high = ("low", "high") if known else ("q1", "q3")
    for _, cell in cells:
        speed, memory = cell["tokens_per_s"], cell["peak_bytes"]
        x, y = memory["median"] / scale, speed["median"]
        axes.errorbar(
            x,
            y,
            yerr=[[max(0.0, y - speed[low])], [max(0.0, speed[high] - y)]],
            xerr=[[x - memory["q1"] / scale], [memory["q3"] / scale - x]],
            fmt=MARKERS[cell["kernels"]],
            color=STORAGES[cell["quantize"]].colour,
            markerfacecolor="white" if cell["kernels"] == "reference" else STORAGES[cell["quantize"]].colour,
            markersize=8,
            markeredgewidth=1.6,
            capsize=3,
            elinewidth=1.2,
            zorder=3,
            label="_cell",
        )
        points.append((x, y))
    front = sorted((p for p, (_, cell) in zip(points, cells, strict=True) if cell["pareto"]), key=lambda p: p[0])
    axes.plot([x for x, _ in front], [y for _, y in front], color="#999999", linewidth=1.2, zorder=1, label="_front")
    axes.set_title(CAPTIONS[work], loc="left", fontsize=11)
    axes.set_xlabel(f"peak memory ({unit}), smaller is better")
    axes.set_ylabel("tokens/s, larger is better")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:g}")
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.12)
    place_labels(
        axes,
        [
            (x, y, str(i), (cell["tokens_per_s"][low], cell["tokens_per_s"][high]), "black")
            for (x, y), (i, cell) in zip(points, cells, strict=True)
        ],
    )


def _key(axes: Any, cells: Sequence[tuple[int, Mapping[str, Any]]], varying: Sequence[str]) -> None:
    """Draws the key of marks and numbers to the right of the panel."""
    from matplotlib.lines import Line2D

    handles: list[Any] = []
    for kernels in dict.fromkeys(cell["kernels"] for _, cell in cells):
        face = "white" if kernels == "reference" else _GREY
        handles.append(Line2D([], [], color=_GREY, marker=MARKERS[kernels], markerfacecolor=face, linestyle="",
                              markersize=7, label=KERNEL_MODES[kernels].long_label))  # fmt: skip
    for quantize in dict.fromkeys(cell["quantize"] for _, cell in cells):
        handles.append(
            Line2D([], [], color=STORAGES[quantize].colour, linewidth=5, label=STORAGES[quantize].long_label)
        )
    handles.append(Line2D([], [], color="#999999", linewidth=1.2, label="Pareto front"))
    legend = axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.03, 1.0), frameon=False, fontsize=9,
                         borderaxespad=0)  # fmt: skip
    figure = axes.figure
    figure.canvas.draw()
    top = axes.transAxes.inverted().transform(legend.get_window_extent().get_points())[0][1]
    labels = [f"{i:>{len(str(cells[-1][0]))}}  {cell_label(cell, varying)}" for i, cell in cells]
    axes.text(1.04, top - 0.03, "\n".join(labels), transform=axes.transAxes, va="top", fontsize=8.5,
              family="monospace", linespacing=1.35)  # fmt: skip
