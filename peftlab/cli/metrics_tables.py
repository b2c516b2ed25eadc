"""Tables of metrics: before and after, per class, and confusions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftlab import formatting
from peftlab.specs.metrics import METRICS

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_FIRST = tuple(spec.headline for spec in METRICS.values())
_PER_CLASS = tuple(name for name, spec in METRICS.items() if spec.averaged or spec.of_entities)
_CONFUSION = re.compile(r"confusion_(.+)_as_\1")
# With more classes only the worst are shown; --json has all.
_MAX_CLASSES = 20
_MAX_MATRIX = 8
_STYLES = {1: "green", -1: "red", 0: "dim"}

Metrics = Mapping[str, Any]


def new_table() -> Table:
    """An empty table in the style of all tables."""
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")


def order(metrics: Metrics) -> list[str]:
    """The metric names, most important first, without the counts of a confusion matrix."""
    names = [name for name in _FIRST if name in metrics]
    names += [f"{f}_{c}" for c in class_names(metrics) for f in _PER_CLASS if f"{f}_{c}" in metrics]
    return names + [n for n in metrics if n not in names and not n.startswith("confusion_")]


def class_names(metrics: Metrics) -> list[str]:
    """The classes that have per-class values."""
    prefixes = tuple(f"{family}_" for family in _PER_CLASS)
    own = [n for n in metrics if n.startswith(prefixes) and n not in _FIRST]
    classes = [n.removeprefix(next(prefix for prefix in prefixes if n.startswith(prefix))) for n in own]
    return list(dict.fromkeys(classes))


def before_after(before: Metrics | None, after: Metrics, *, verbose: bool = False) -> Table:
    """A table of metric, before, after, change. verbose: include the per-class values of ``class_table``."""
    from rich.text import Text

    table = new_table()
    table.add_column("metric", overflow="fold")
    for title in ("before", "after", "change"):
        table.add_column(title, justify="right", no_wrap=True)
    for name in order(after) if verbose else overall_names(after):
        old = None if before is None else before.get(name)
        text, better = formatting.change(name, old, after[name])
        table.add_row(
            Text(name),
            "-" if before is None else _value(before, name),
            _value(after, name),
            Text(text, style=_STYLES[better]),
        )
    return table


def _value(metrics: Metrics, name: str) -> str:
    """The value as text; ``n/a`` if no row has its class, ``-`` if it was not asked for."""
    return "n/a" if name in metrics and metrics[name] is None else formatting.metric(name, metrics.get(name))


def overall_names(metrics: Metrics) -> list[str]:
    """The metric names of ``order`` without per-class values."""
    own = _of_classes(metrics)
    return [name for name in order(metrics) if name not in own]


def _of_classes(metrics: Metrics) -> set[str]:
    """The names of the per-class values."""
    return {f"{family}_{name}" for family in _PER_CLASS for name in class_names(metrics)}


def metric_table(metrics: Metrics) -> Table:
    """A table of metric and value, without the per-class values of ``class_table``."""
    from rich.text import Text

    table = new_table()
    table.add_column("metric", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    own = _of_classes(metrics)
    for name in order(metrics):
        if name not in own:
            table.add_row(Text(name), _value(metrics, name))
    return table


def class_table(metrics: Metrics, *, most: int = _MAX_CLASSES) -> Table | None:
    """A table of precision, recall and F1 per class; only the worst if there are more than ``most``."""
    from rich.text import Text

    names = class_names(metrics)
    if not names:
        return None
    families = [f for f in _PER_CLASS if any(f"{f}_{name}" in metrics for name in names)]
    shown, judge = names, families[-1]
    if len(names) > most:
        measured = [n for n in names if metrics.get(f"{judge}_{n}") is not None]
        shown = sorted(measured, key=lambda n: formatting.number(metrics[f"{judge}_{n}"]))[:most]
    table = new_table()
    table.add_column("class" if shown is names else f"class (lowest {judge})", overflow="fold")
    for family in families:
        table.add_column(family, justify="right", no_wrap=True)
    for name in shown:
        table.add_row(Text(name), *(_value(metrics, f"{f}_{name}") for f in families))
    if len(shown) < len(names):
        table.add_row(Text(f"and {len(names) - len(shown)} more", style="dim"), *[""] * len(families))
    return table


def confusion_lines(metrics: Metrics) -> list[RenderableType]:
    """The confusion matrix, or the most frequent confusions if it is too wide; empty without counts."""
    classes = [match[1] for name in metrics if (match := _CONFUSION.fullmatch(name))]
    if not classes:
        return []
    counts = {(a, b): round(formatting.number(metrics[f"confusion_{a}_as_{b}"])) for a in classes for b in classes}
    if len(classes) > _MAX_MATRIX:
        return [_worst_confusions(counts)]
    from rich.text import Text

    table = new_table()
    table.add_column("is \\ predicted", overflow="fold")
    for name in classes:
        table.add_column(Text(name), justify="right", overflow="fold")
    for actual in classes:
        cells = [Text(f"{counts[actual, b]:,}", style="bold" if actual == b else "") for b in classes]
        table.add_row(Text(actual), *cells)
    return [table]


def _worst_confusions(counts: Mapping[tuple[str, str], int]) -> Table:
    from rich.text import Text

    table = new_table()
    table.add_column("is", overflow="fold")
    table.add_column("predicted", overflow="fold")
    table.add_column("rows", justify="right", no_wrap=True)
    wrong = sorted(((n, a, b) for (a, b), n in counts.items() if a != b and n), key=lambda item: -item[0])
    for count, actual, predicted in wrong[:10]:
        table.add_row(Text(actual), Text(predicted), f"{count:,}")
    return table
