"""``peftlab doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from peftlab.cli.options import Debug, Json
from peftlab.cli.output import Output, output_of

if TYPE_CHECKING:
    from rich.table import Table

_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}
_MARKS = {"ok": "ok", "note": "note", "problem": "FAIL"}


def doctor(context: typer.Context, _json: Json = False, _debug: Debug = False) -> None:
    out = output_of(context)
    with out.working():
        import peftlab

        report = peftlab.doctor()
    if out.json:
        out.document(report)
        return
    for section in report["sections"]:
        out.line(section["title"], style="bold")
        out.show(_facts(section["facts"]))
    _conclusion(report, out)


def _facts(facts: list[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(width=5, justify="right", no_wrap=True)
    table.add_column(width=21, overflow="fold")
    table.add_column(overflow="fold")
    for fact in facts:
        detail = f"  {fact['detail']}" if fact["detail"] else ""
        text = Text.assemble(fact["value"], (detail, "dim" if fact["status"] == "ok" else ""))
        mark = Text(_MARKS[fact["status"]], style=_STYLES[fact["status"]])
        table.add_row(mark, Text(fact["name"]), text)
    return table


def _conclusion(report: dict[str, Any], out: Output) -> None:
    out.line()
    if not report["problems"]:
        out.line("no problems; try: peftlab train smoke", style="green")
        return
    count = report["problems"]
    out.line(f"{count} problem{'' if count == 1 else 's'}", style="bold red")
    problems = [f for s in report["sections"] for f in s["facts"] if f["status"] == "problem"]
    out.show(_facts(problems))
