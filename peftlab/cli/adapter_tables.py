"""Tables of adapters: what one changes, and what a rework of it kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftlab import formatting
from peftlab.cli.metrics_tables import before_after, new_table, overall_names
from peftlab.specs.methods import METHODS

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
# Modules shown of each kind; -v shows all.
_MOST_MODULES = 2
_BARS_SHOWN, _NAME = 7, 28


def show_tables(figures: Mapping[str, Any], *, verbose: bool = False) -> list[RenderableType]:
    """The kinds of modules with their totals, each followed by its modules with the largest change."""
    from rich.text import Text

    total = figures["total"]
    shown: list[RenderableType] = [
        Text(
            f"{figures['target']}: {METHODS[figures['method']].label}, {total['num_parameters']:,} parameters in "
            f"{total['num_modules']:,} modules of {figures['base']}"
        )
    ]
    if figures["modules"]:
        shown.append(_module_table(figures, verbose=verbose))
    if reasons := _reasons(figures["modules"]):
        shown += [Text(f"no update matrix: {line}") for line in reasons]
    if figures["in_full"]:
        parts = [f"{name} ({count:,})" for name, count in figures["in_full"].items()]
        shown.append(Text(f"trained in full: {', '.join(parts)}"))
    shown += [Text(f"note: {note}") for note in figures["notes"]]
    if any(m["values"] for m in figures["modules"]):
        text = (
            "change: norm of the update / norm of the weight. bars: singular values, of the largest. effective rank: "
        )
        text += "exp of the entropy of the singular values over their sum. 99 %: the rank that holds 99 % of the squared norm"
        shown.append(Text(text, style="dim"))
    return shown


def _module_table(figures: Mapping[str, Any], *, verbose: bool) -> Table:
    from rich.text import Text

    table = new_table()
    table.add_column("module", overflow="ellipsis", no_wrap=True, max_width=_NAME)
    for title in ("params", "change", "effective", "99 %", "rank"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("bars", no_wrap=True, min_width=_BARS_SHOWN)
    for kind in figures["kinds"]:
        own = [m for m in figures["modules"] if m["kind"] == kind["kind"]]
        own.sort(key=lambda m: -1.0 if m["relative"] is None else -m["relative"])
        many = "" if kind["num_modules"] == 1 else f" x{kind['num_modules']}"
        bars = _bars(own[0]["values"]) if len(own) == 1 else ""
        table.add_row(Text(f"{_tail(kind['kind'], _NAME - len(many))}{many}", "bold"), *_cells(kind), bars)
        rows = own if verbose else own[:_MOST_MODULES]
        for module in rows if len(own) > 1 else ():
            table.add_row(f"  layer {module['layer']}", *_cells(module), _bars(module["values"]))
        if len(own) > len(rows):
            table.add_row(Text(f"  {len(own) - len(rows)} with less change: -v", "dim"), *[""] * 6)
    table.add_section()
    table.add_row(Text("all", "bold"), *_cells(figures["total"]), "")
    return table


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    def rank(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}".removesuffix(".0")

    relative = "-" if row["relative"] is None else f"{100 * row['relative']:.2g} %"
    return (
        f"{row['num_parameters']:,}",
        relative,
        "-" if row["effective_rank"] is None else f"{row['effective_rank']:.1f}",
        rank(row["rank_99"]),
        rank(row["rank"]),
    )


def _bars(values: Sequence[float]) -> str:
    """A bar per singular value, relative to the first."""
    return "".join(_BARS[min(7, int(8 * value / values[0]))] for value in values[:_BARS_SHOWN])


def _tail(name: str, width: int) -> str:
    return name if len(name) <= width else f"...{name[3 - width :]}"


def _reasons(modules: Sequence[Mapping[str, Any]]) -> list[str]:
    """``why (3 modules, such as NAME)``."""
    by_reason: dict[str, list[str]] = {}
    for module in modules:
        if module["reason"] is not None:
            by_reason.setdefault(module["reason"], []).append(module["name"])
    return [f"{reason} ({len(names)} modules, such as {names[0]})" for reason, names in by_reason.items()]


def rework_tables(report: Mapping[str, Any]) -> list[RenderableType]:
    """The metrics, the agreement, and the size of a reworked adapter."""
    from rich.text import Text

    shown: list[RenderableType] = []
    metrics = report.get("metrics") or {}
    if report.get("parents") and metrics.get("after"):
        shown.append(_parents_table(report))
    elif metrics.get("after"):
        shown.append(before_after(metrics.get("before"), metrics["after"]))
    shown.append(Text(_size_line(report)))
    if report.get("error"):
        shown.append(Text(f"error of the update: {formatting.small(100 * report['error'])} % of its norm"))
    if report.get("rest"):
        fate = "stored in full" if report["rest_saved"] else "lost (--save-rest stores them)"
        shown.append(Text(f"{len(report['rest'])} other parameters differ, {fate}: {_kinds(report['rest'])}"))
    if report.get("logits"):
        shown.append(Text(_agreement_line(report), "green"))
    shown.append(Text(f"new adapter: {report['output']}"))
    return shown


def _kinds(names: Sequence[str]) -> str:
    """``LayerNorm.bias x25, query.bias x12``."""
    counts = Counter(".".join(name.split(".")[-2:]) for name in names)
    return ", ".join(f"{kind} x{count}" if count > 1 else kind for kind, count in counts.most_common())


def _parents_table(report: Mapping[str, Any]) -> Table:
    """The metrics of each combined adapter and of the result, on the same rows."""
    table = new_table()
    table.add_column("metric", overflow="fold")
    for index, parent in enumerate(report["parents"]):
        table.add_column(
            f"{'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[index % 26]} x{parent['weight']:g}", justify="right", no_wrap=True
        )
    table.add_column("result", justify="right", no_wrap=True)
    result = report["metrics"]["after"]
    for name in overall_names(result):
        columns = [parent["metrics"].get(name) for parent in report["parents"]] + [result[name]]
        table.add_row(name, *(formatting.metric(name, value) for value in columns))
    return table


def _size_line(report: Mapping[str, Any]) -> str:
    parameters = report["parameters"]
    ranks = [m["rank"] for m in report["modules"]]
    kept = [rank for rank in ranks if rank]
    size = f"{parameters['after']:,} parameters"
    if parameters.get("before"):
        share = formatting.share(parameters["after"], parameters["before"])
        size = f"{parameters['after']:,} parameters, {share} of {parameters['before']:,}"
    low, high = min(kept), max(kept)
    size += f", in {len(kept)} of {len(ranks)} modules, rank {low}" + (f" to {high}" if high > low else "")
    return size + (f"; trained in full, kept: {report['in_full']:,}" if report.get("in_full") else "")


def _agreement_line(report: Mapping[str, Any]) -> str:
    logits = report["logits"]
    against = report.get("reference") or ("the trained model" if report.get("of_training") else "base + adapter")
    return (
        f"verified against {against}: mean KL {formatting.small(logits['kl_mean'])} nats, the same top class at "
        f"{100 * formatting.number(logits['top1']):.1f} % of {logits['num_positions']:,} held-out positions"
    )
