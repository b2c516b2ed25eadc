"""``peftlab bench compare``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from peftlab import formatting
from peftlab.cli.bench_tables import paragraph, plain_table
from peftlab.cli.options import Debug, Json
from peftlab.cli.output import Output, output_of

_FIRST = typer.Argument(metavar="A", help="bench.json, or the folder that holds it.")
_SECOND = typer.Argument(metavar="B", help="bench.json or folder to compare with A.")


def compare(
    context: typer.Context,
    first: Annotated[str, _FIRST],
    second: Annotated[str, _SECOND],
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    with out.working():
        import peftlab

        report = peftlab.compare_benchmarks(first, second)
    if out.json:
        out.document(report)
    else:
        _show(out, report)


def _show(out: Output, report: dict[str, Any]) -> None:
    from peftlab.bench.captions import cell_label, dimensions

    out.line()
    out.line(f"A  {report['a']}")
    out.line(f"B  {report['b']}")
    for line in report["said"]:
        paragraph(out, f"differs: {line}")
    if not report["said"]:
        out.line("same machine, versions and protocol")
    out.line()
    cells = report["cells"]
    if cells:
        varying, fixed = dimensions(cells)
        paragraph(out, ", ".join([report["unit"]["model"], *fixed]))
        out.line()
        table = plain_table("cell", "A\ntokens/s", "B\ntokens/s", "B over A", "memory\nB over A")
        for cell in cells:
            table.add_row(
                cell_label(cell, varying),
                *map(formatting.rate, cell["tokens_per_s"]),
                _ratio(cell["speed"]),
                _ratio(cell["memory_ratio"]),
            )
        out.show(table)
        out.line()
    else:
        out.line("no cell was measured in both")
    for name in ("a", "b"):
        for other in report[f"only_{name}"]:
            state = "" if other["status"] == "ok" else f" ({other['status']})"
            out.line(f"only in {name.upper()}: {other['key']}{state}")


def _ratio(ratio: dict[str, Any]) -> str:
    if ratio["differs"] is None:
        return f"{ratio['value']:.2f} (no interval)"
    interval = f"({ratio['low']:.2f}..{ratio['high']:.2f})"
    return f"{ratio['value']:.2f} {interval}" if ratio["differs"] else "no difference"
