"""Draws an adapter: heat maps of layer x kind of module. matplotlib is imported only when a picture is drawn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.errors import RecipeError
from peftlab.measuring.drawing import save_pictures

_CELL_WIDTH, _CELL_HEIGHT = 0.62, 0.34
# Numbers in the cells, as long as they fit.
_MOST_NUMBERED = 400
_MOST_CHARACTERS = 50
# A module that changes several times more than the others would make all of them look alike.
_OUTLIER = 2.0


def draw_adapter(figures: Mapping[str, Any], path: Path) -> None:
    """Writes the picture. Raises: RecipeError if no module has an update."""
    modules = [m for m in figures["modules"] if m["reason"] is None]
    if not modules:
        raise RecipeError("no module of this adapter has an update matrix, so there is nothing to draw")
    save_pictures(lambda: build_figure(figures, modules), path)


def build_figure(figures: Mapping[str, Any], modules: Sequence[Mapping[str, Any]]) -> Any:
    """A matplotlib ``Figure``: the norm of the update relative to the weight, and its effective rank."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(m["kind"] for m in modules))
    layers = sorted({m["layer"] for m in modules}, key=lambda layer: (layer is None, layer))
    wide = max(4.2, 1.6 + _CELL_WIDTH * len(kinds))
    tall = max(2.2, _CELL_HEIGHT * len(layers))
    figure = Figure(figsize=(2 * wide + 0.6, tall + 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    name = (
        Path(figures["target"]).parent.name
        if Path(figures["target"]).name == "adapter"
        else Path(figures["target"]).name
    )
    base = figures["base"] if len(figures["base"]) <= _MOST_CHARACTERS else Path(figures["base"]).name
    figure.suptitle(f"{name}: what {figures['method']} changes in {base}", fontweight="bold")
    left, right = figure.subplots(1, 2)
    _map(left, modules, layers, kinds, "relative", "norm of update / norm of weight, %", 100.0)
    _map(right, modules, layers, kinds, "effective_rank", "effective rank, exp(entropy of singular values)", 1.0)
    return figure


def _map(
    axes: Any,
    modules: Sequence[Mapping[str, Any]],
    layers: Sequence[int | None],
    kinds: Sequence[str],
    key: str,
    title: str,
    scale: float,
) -> None:
    import numpy as np

    cells: dict[tuple[int, int], list[float]] = defaultdict(list)
    for module in modules:
        cells[layers.index(module["layer"]), kinds.index(module["kind"])].append(scale * module[key])
    grid = np.full((len(layers), len(kinds)), np.nan)
    for place, values in cells.items():
        grid[place] = sum(values) / len(values)  # several modules of one place, such as experts
    usual = float(np.nanpercentile(grid, 95))
    clipped = float(np.nanmax(grid)) > _OUTLIER * usual > 0
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0.0, vmax=usual if clipped else None)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(layers)), ["-" if layer is None else str(layer) for layer in layers], fontsize=8)
    axes.set_ylabel("layer")
    axes.figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02, extend="max" if clipped else "neither")
    if grid.size > _MOST_NUMBERED:
        return
    middle = 0.6 * (usual if clipped else float(np.nanmax(grid)))
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            colour = "black" if value > middle else "white"
            text = f"{value:.2g}" if value < 100 else f"{value:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
