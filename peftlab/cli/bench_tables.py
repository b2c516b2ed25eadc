"""Tables of ``peftlab bench`` for people, 80 columns wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftlab.bench.sweep import PATH_NAMES
from peftlab.cli import numbers
from peftlab.cli.metrics_tables import new_table
from peftlab.cli.output import Output

if TYPE_CHECKING:
    from rich.table import Table

# Dimensions of a sweep, as columns of the table where their values differ, else in the line above it.
_DIMENSIONS = {
    "what": "work",
    "method": "method",
    "rank": "rank",
    "quantize": "weights",
    "kernels": "path",
    "batch": "rows",
    "length": "tokens",
    "adapters": "adapters",
}
_STATUS = {"red": "RED", "memory": "too large", "impossible": "impossible", "failed": "failed", "pending": "to measure"}


def show_bench(out: Output, report: Mapping[str, Any]) -> None:
    """The table, what it was measured with, and where the files are."""
    header, cells = report["header"], report["cells"]
    varying, fixed = dimensions(cells)
    out.line()
    out.line(f"{header['unit']['model']} on {machine_text(header)}")
    out.line(f"{', '.join(fixed)}; {protocol_text(header)}" if fixed else protocol_text(header))
    if "matmul_flops_per_s" in report["ceilings"]:
        out.line(ceilings_text(report["ceilings"]))
    out.line()
    out.show(_figures(cells, varying))
    out.line()
    for line in notes(cells):
        out.line(line)
    out.line(f"results  {report['folder']}/bench.json, bench.csv")
    if report.get("picture"):
        out.line(f"picture  {report['picture']}", style="cyan")


def show_cells(out: Output, report: Mapping[str, Any]) -> None:
    """The cells that would be measured."""
    cells = report["cells"]
    varying, fixed = dimensions(cells)
    out.line()
    out.line(f"{report['header']['unit']['model']} on {machine_text(report['header'])}")
    out.line("; ".join(filter(None, [", ".join(fixed), protocol_text(report["header"])])))
    out.line()
    table = _start(varying)
    table.add_column("", overflow="fold")
    for number, cell in enumerate(cells, start=1):
        table.add_row(str(number), *_names(cell, varying), cell["reason"] or "")
    out.show(table)
    alive = sum(cell["status"] == "pending" for cell in cells)
    repeats = report["header"]["protocol"]["repeats"]
    out.line()
    out.line(f"{alive} of {len(cells)} cells, {1 + alive * (1 + repeats)} processes; nothing was measured", style="dim")


def dimensions(cells: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Names of the dimensions whose values differ, and a text for each of the others."""
    varying = [name for name in _DIMENSIONS if len({cell[name] for cell in cells}) > 1]
    first = cells[0]
    fixed = []
    for name, label in _DIMENSIONS.items():
        if name in varying or (name == "adapters" and first[name] == 1) or (name == "rank" and first[name] is None):
            continue
        value = _value(name, first[name])
        before = name in ("rank",)
        fixed.append(f"{label} {value}" if before else f"{value} {label}" if name not in ("what", "method") else value)
    return varying, fixed


def _value(name: str, value: Any) -> str:
    if name == "kernels":
        return PATH_NAMES[value]
    if name == "quantize":
        return "dense" if value == "none" else str(value)
    return "-" if value is None else str(value)


def _start(varying: Sequence[str]) -> Table:
    table = new_table()
    table.add_column("#", justify="right", no_wrap=True)
    for name in varying:
        right = name in ("rank", "batch", "length", "adapters")
        table.add_column(_DIMENSIONS[name], justify="right" if right else "left", no_wrap=True)
    return table


def _names(cell: Mapping[str, Any], varying: Sequence[str]) -> list[str]:
    return [_value(name, cell[name]) for name in varying]


def _figures(cells: Sequence[Mapping[str, Any]], varying: Sequence[str]) -> Table:
    table = _start(varying)
    number = {cell["key"]: i for i, cell in enumerate(cells, start=1)}
    table.add_column("tokens/s", justify="right", no_wrap=True)
    table.add_column("quartiles", justify="right", no_wrap=True)
    table.add_column("of\npeak", justify="right", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    table.add_column("speed", overflow="fold")
    for i, cell in enumerate(cells, start=1):
        if cell["status"] != "ok":
            table.add_row(str(i), *_names(cell, varying), _STATUS[cell["status"]], "", "", "", "")
            continue
        speed = cell["tokens_per_s"]
        share = "-" if not cell["share_of_peak"] else f"{100 * cell['share_of_peak']['median']:.0f} %"
        star = " *" if cell["pareto"] else ""
        table.add_row(
            str(i),
            *_names(cell, varying),
            numbers.rate(speed["median"]),
            f"{numbers.rate(speed['q1'])}..{numbers.rate(speed['q3'])}",
            share,
            numbers.size(cell["peak_bytes"]["median"]) + star,
            "baseline" if cell["speed"] is None else f"{ratio_text(cell['speed'])} #{number[cell['baseline']]}",
        )
    return table


def ratio_text(ratio: Mapping[str, Any]) -> str:
    """``1.31 (1.28..1.35) x``, or that there is no difference to be seen."""
    if ratio["differs"] is None:
        return f"{ratio['value']:.2f} (no interval) x"
    text = f"({ratio['low']:.2f}..{ratio['high']:.2f})"
    return f"{ratio['value']:.2f} {text} x" if ratio["differs"] else f"no difference {text} to"


def notes(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each cell without figures or not wholly on its path, and what the marks mean."""
    lines = []
    for i, cell in enumerate(cells, start=1):
        if cell["status"] != "ok":
            lines.append(f"#{i}: {_STATUS[cell['status']]}: {cell['reason']}")
        elif cell["kernels"] == "auto" and cell["num_fused"] < cell["num_adapted"]:
            slow = cell["num_adapted"] - cell["num_fused"]
            lines.append(f"#{i}: {slow} of {cell['num_adapted']} modules on PEFT's path: {'; '.join(cell['slow'])}")
    done = [cell for cell in cells if cell["status"] == "ok"]
    if len(done) > 1:
        lines.append(
            "* nothing else here is both faster and smaller; speed is a ratio of medians with its 95 % interval"
        )
    largest = max(done, key=lambda cell: cell["memory"]["load_peak_bytes"] / cell["peak_bytes"]["median"], default=None)
    if largest is not None and largest["memory"]["load_peak_bytes"] > 1.05 * largest["peak_bytes"]["median"]:
        size = numbers.size(largest["memory"]["load_peak_bytes"])
        lines.append(
            f"memory is the peak of the measured steps; loading took up to {size} (load_peak_bytes in bench.csv)"
        )
    return lines


def machine_text(header: Mapping[str, Any]) -> str:
    machine, versions = header["machine"], header["versions"]
    threads = (
        f", {machine['threads']} thread{'s' if machine['threads'] != 1 else ''}" if machine["device"] == "cpu" else ""
    )
    return f"{machine['name']}{threads}; torch {versions['torch']}, peft {versions.get('peft', '-')}"


def protocol_text(header: Mapping[str, Any]) -> str:
    p = header["protocol"]
    return f"{p['repeats']} processes per cell in turns, each {p['steps']} steps after {p['warm_up']} of warm-up"


def ceilings_text(ceilings: Mapping[str, Any]) -> str:
    return (
        f"peak: {ceilings['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s ({ceilings['dtype']} matmul), "
        f"{ceilings['copy_bytes_per_s'] / 1e9:.3g} GB/s (copy)"
    )
