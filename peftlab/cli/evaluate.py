"""``peftlab eval``."""

from __future__ import annotations

from typing import Annotated

import typer

from peftlab.cli.metrics_tables import class_table, confusion_lines, metric_table
from peftlab.cli.options import Debug, Json, Overrides, RecipeOption, Target, Verbose, check_overrides
from peftlab.cli.output import output_of


def evaluate(
    context: typer.Context,
    target: Target,
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    picture: Annotated[
        str | None, typer.Option("--picture", metavar="FILE", help="Draw the confusion matrix: a .png or .svg file.")
    ] = None,
    _verbose: Verbose = False,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    settings = check_overrides(overrides, context, subject=target)
    with out.working():
        import peftlab

        report = peftlab.evaluate(target, recipe=recipe, overrides=settings, picture=picture)
    if out.json:
        out.document(report)
        return
    out.line(
        f"{report['target']} ({report['kind']}) on {report['rows']:,} held-out row{'' if report['rows'] == 1 else 's'}"
    )
    out.show(metric_table(report["metrics"]))
    if (table := class_table(report["metrics"])) is not None:
        out.show(table)
    out.show(*confusion_lines(report["metrics"]))
    if picture is not None:
        out.line(f"picture  {picture}", style="cyan")
