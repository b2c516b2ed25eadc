"""Tables that ``peftlab bench`` prints, 80 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftlab import formatting
from peftlab.bench.captions import cell_label, dimensions, machine_text, protocol_text
from peftlab.cli.output import WIDTH, Output
from peftlab.specs.protocol import MOST_RATES_BEYOND

if TYPE_CHECKING:
    from rich.table import Table

_STATUS = {"red": "RED", "memory": "too large", "impossible": "impossible", "failed": "failed", "pending": "to measure"}


def show_bench(out: Output, report: Mapping[str, Any]) -> None:
    """Prints the table, machine and protocol, and the paths of the files."""
    header, cells = report["header"], report["cells"]
    varying, fixed = dimensions(cells)
    out.line()
    out.line(header["unit"]["model"])
    paragraph(out, machine_text(header))
    paragraph(out, "; ".join(filter(None, [", ".join(fixed), protocol_text(header)])))
    if "matmul_flops_per_s" in report["ceilings"]:
        paragraph(out, ceilings_text(report["ceilings"]))
    out.line()
    out.show(_figures(cells, varying))
    out.line()
    for note in notes(cells):
        paragraph(out, note)
    out.line(f"results  {report['folder']}/bench.json, bench.csv")
    if report.get("picture"):
        out.line(f"picture  {report['picture']}", style="cyan")


def paragraph(out: Output, text: str) -> None:
    for line in textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False):
        out.line(line)


def show_quality(out: Output, report: Mapping[str, Any]) -> None:
    """Prints the score and the cost of each method."""
    header, rows = report["header"], report["methods"]
    out.line()
    out.line(header["unit"]["model"])
    paragraph(out, machine_text(header))
    out.line()
    metric = header["metric"]
    table = plain_table(
        "cell", "lr", f"{metric}, 95 %", "trained", "seconds", "memory", f"{metric}, gain over the first"
    )
    table.columns[0].header = "method"
    for row in rows:
        if row["status"] != "ok":
            table.add_row(row["name"], _STATUS[row["status"]])
            continue
        score, seconds = row["metric"], row["seconds"]["value"]
        size = formatting.size(row["peak_bytes"])
        half = "" if score["high"] is None else f" ± {score['high'] - score['value']:.4f}"  # t intervals are symmetric
        score_text = f"{score['value']:.4f}{half}"
        cells = (row["name"], f"{row['lr']:g}", score_text, f"{row['num_trained']:,}", f"{seconds:,.1f}", size)
        table.add_row(*cells, _difference(row["difference"]))
    out.show(table)
    out.line()
    for row in rows:
        if row["status"] != "ok":
            paragraph(out, f"{row['name']}: {_STATUS[row['status']]}: {row['reason']}")
    for row in rows:
        if row["status"] == "ok" and row["at_end"]:
            paragraph(
                out,
                f"{row['name']}: the best learning rate is at the end of those tried; another --learning-rates may be better",
            )
    if len(header["protocol"]["learning_rates"]) > 1:
        paragraph(out, f"{metric} on the first seed by learning rate: {'; '.join(map(_tried, rows))}")
    out.line(f"results  {report['folder']}/quality.json, quality.csv")
    if report["picture"]:
        out.line(f"picture  {report['picture']}", style="cyan")


def _tried(row: Mapping[str, Any]) -> str:
    scores = [f"{lr} {'-' if score is None else f'{score:.4f}'}" for lr, score in row.get("tried", {}).items()]
    return f"{row['name']} {', '.join(scores) or 'none'}"


def show_trainings(out: Output, report: Mapping[str, Any]) -> None:
    """Prints what ``--quality`` would train."""
    header, rows = report["header"], report["methods"]
    out.line()
    out.line(header["unit"]["model"])
    out.line()
    out.show(
        _planned([(row["name"], row["reason"] if row["status"] == "impossible" else "") for row in rows], "method")
    )
    protocol = header["protocol"]
    rates = ", ".join(f"{r:g}" for r in protocol["learning_rates"])
    beyond = f" and at most {MOST_RATES_BEYOND} more by the same factor" if protocol["search"] else ""
    out.line()
    paragraph(
        out,
        f"learning rates {rates}{beyond} on the first of {protocol['seeds']} seeds, the best of each on the other seeds",
    )
    paragraph(
        out,
        f"{'at least ' if protocol['search'] else ''}{report['trainings']} trainings; nothing was trained. "
        f"peftlab check {header['name']} estimates the time of one",
    )


def _difference(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return "baseline"
    if difference["differs"] is None:
        return f"{difference['value']:+.4f}"
    return f"{difference['value']:+.4f}" if difference["differs"] else "no difference"


def show_cells(out: Output, report: Mapping[str, Any]) -> None:
    """Prints the cells that would be measured."""
    cells = report["cells"]
    varying, fixed = dimensions(cells)
    out.line()
    out.line(report["header"]["unit"]["model"])
    paragraph(out, machine_text(report["header"]))
    paragraph(out, "; ".join(filter(None, [", ".join(fixed), protocol_text(report["header"])])))
    out.line()
    out.show(_planned([(cell_label(cell, varying), cell["reason"] or "") for cell in cells], "cell"))
    pending = sum(cell["status"] == "pending" for cell in cells)
    repeats = report["header"]["protocol"]["repeats"]
    out.line()
    processes = 1 + pending * (1 + repeats) if pending else 0
    out.line(f"{pending} of {len(cells)} cells, {processes} processes; nothing was measured", style="dim")


def _planned(rows: Sequence[tuple[str, str]], kind: str) -> Table:
    """A numbered table of names, with a column of reasons if some cells are impossible."""
    reasons = any(reason for _, reason in rows)
    table = plain_table("#", "cell", *(["impossible because"] if reasons else []))
    table.columns[1].header = kind
    for number, (name, reason) in enumerate(rows, start=1):
        table.add_row(str(number), name, *([reason] if reasons else []))
    return table


def plain_table(*columns: str) -> Table:
    """A table with columns one blank apart; ``cell`` and the last column may wrap."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", padding=0)
    for name in columns:
        if name == "cell" or name == columns[-1]:
            table.add_column(name, overflow="fold", min_width=12)
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def _figures(cells: Sequence[Mapping[str, Any]], varying: Sequence[str]) -> Table:
    table = plain_table("#", "cell", "tokens/s", "IQR", "of\npeak", "memory", "times as fast")
    number = {cell["key"]: i for i, cell in enumerate(cells, start=1)}
    for i, cell in enumerate(cells, start=1):
        name = cell_label(cell, varying)
        if cell["status"] != "ok":
            table.add_row(str(i), name, _STATUS[cell["status"]], "", "", "", "")
            continue
        speed = cell["tokens_per_s"]
        table.add_row(
            str(i),
            name,
            formatting.rate(speed["median"]),
            _percent((speed["q3"] - speed["q1"]) / speed["median"]) if cell["repetitions"] > 1 else "-",
            _percent(cell["share_of_peak"]["median"]) if cell["share_of_peak"] else "-",
            formatting.size(cell["peak_bytes"]["median"]) + ("*" if cell["pareto"] else " "),
            "baseline" if cell["speed"] is None else f"{ratio_text(cell['speed'])} #{number[cell['baseline']]}",
        )
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.0995 else 1}f} %"


def ratio_text(ratio: Mapping[str, Any]) -> str:
    """``1.31 (1.28..1.35) as``, or ``no difference to``; the other's name follows."""
    if ratio["differs"] is None:
        return f"{ratio['value']:.2f} (no interval) as"
    return (
        f"{ratio['value']:.2f} ({ratio['low']:.2f}..{ratio['high']:.2f}) as" if ratio["differs"] else "no difference to"
    )


def notes(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line per reason why cells have no figures or modules on PEFT's path, and the meaning of the marks."""
    by_reason: dict[str, list[str]] = {}
    for i, cell in enumerate(cells, start=1):
        if cell["status"] != "ok":
            by_reason.setdefault(f"{_STATUS[cell['status']]}: {cell['reason']}", []).append(f"#{i}")
        elif cell["kernels"] != "reference" and cell["num_fused"] < cell["num_adapted"]:
            slow = f"{cell['num_adapted'] - cell['num_fused']} of {cell['num_adapted']} modules on PEFT's path"
            by_reason.setdefault(f"{slow}: {'; '.join(cell['slow'])}", []).append(f"#{i}")
    lines = [f"{', '.join(which)}: {reason}" for reason, which in by_reason.items()]
    done = [cell for cell in cells if cell["status"] == "ok"]
    if len(done) > 1:
        lines.append(
            "* no other cell is both faster and smaller. IQR: interquartile range as a share of the median. In brackets: "
            "95 % interval of the ratio of medians, by bootstrap over repetitions."
        )
    largest = max(done, key=lambda cell: cell["memory"]["load_peak_bytes"] / cell["peak_bytes"]["median"], default=None)
    if largest is not None and largest["memory"]["load_peak_bytes"] > 1.05 * largest["peak_bytes"]["median"]:
        size = formatting.size(largest["memory"]["load_peak_bytes"])
        lines.append(
            f"memory is the peak of the measured steps; loading took up to {size} (load_peak_bytes in bench.csv)"
        )
    return lines


def ceilings_text(ceilings: Mapping[str, Any]) -> str:
    return (
        f"peak: {ceilings['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s ({ceilings['dtype']} matmul), "
        f"{ceilings['copy_bytes_per_s'] / 1e9:.3g} GB/s (copy)"
    )
