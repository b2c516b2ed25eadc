"""``peftlab teach``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from peftlab import formatting
from peftlab.cli.metrics_tables import new_table
from peftlab.cli.options import Debug, Json, Overrides, Recipe, Replace, Verbose, check_overrides, check_recipe
from peftlab.cli.output import Output, output_of


def teach(
    context: typer.Context,
    recipe: Recipe,
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Estimate disk and time; store nothing.")] = False,
    replace: Replace = False,
    _verbose: Verbose = False,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    settings = check_overrides(overrides, context, subject=recipe)
    with out.working():
        check_recipe(recipe, settings)
        import peftlab

        report = peftlab.teach(recipe, settings, plan=plan, replace=replace, verbose=out.verbose)
    if out.json:
        out.document(report)
        return
    out.line()
    for teacher in report["teachers"]:
        _show(out, teacher, planned=report["plan"])
    if report["plan"]:
        out.line("Plan only; nothing was stored. Run without --plan to store it.", style="dim")
    else:
        out.line(f"next     {shlex.join(['peftlab', 'distill', recipe, *settings])}", style="cyan")


def _show(out: Output, teacher: Mapping[str, Any], *, planned: bool) -> None:
    about = "about " if planned else ""
    table = new_table()
    table.add_column("teacher", no_wrap=True)
    table.add_column(str(teacher["teacher"]), overflow="fold")
    table.add_row("stored per position", _fill(teacher["fill"]))
    table.add_row("positions", f"{teacher['positions']:,} of {teacher['examples']:,} examples")
    table.add_row(
        "disk", f"{about}{formatting.size(teacher['bytes'])} ({teacher['bytes_per_position']:.0f} bytes per position)"
    )
    if "free_bytes" in teacher:
        table.add_row("free disk", formatting.size(teacher["free_bytes"]))
    table.add_row("time", f"{about}{formatting.duration(teacher['seconds'])}")
    table.add_row("folder", str(teacher["folder"]))
    out.show(table)
    out.line()


def _fill(fill: Mapping[str, Any]) -> str:
    """Describes how a position is stored."""
    at = f", temperature {fill['temperature']:g}" if "temperature" in fill else ""
    if fill["kind"] == "topk":
        return f"top {fill['k']:,} of {fill['num_classes']:,} classes and the mass of the others{at}"
    if fill["kind"] == "sampled":
        return f"{fill['draws']:,} draws from {fill['num_classes']:,} classes{at}"
    if fill["kind"] == "mixed":
        return f"top {fill['k']:,} of {fill['num_classes']:,} classes and {fill['draws']:,} draws from the others{at}"
    return f"{fill['hidden_size']:,} hidden values as {fill['hidden']}"
