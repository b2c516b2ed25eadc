"""``peftlab adapters``."""

from __future__ import annotations

from typing import Annotated

import typer

from peftlab.cli.adapter_tables import rework_tables, show_tables
from peftlab.cli.options import Debug, Json, Overrides, RecipeOption, Verbose, check_overrides
from peftlab.cli.output import Output, output_of

Run = Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or adapter folder.")]
To = Annotated[str, typer.Option("--to", metavar="FOLDER", help="The folder to write.")]
Tolerance = Annotated[
    float | None,
    typer.Option("--tolerance", metavar="X", help="Largest mean KL from what was trained, in nats."),
]


def show(
    context: typer.Context,
    run: Run,
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    picture: Annotated[
        str | None, typer.Option("--picture", metavar="FILE", help="Draw heat maps: a .png or .svg file.")
    ] = None,
    verbose: Verbose = False,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    settings = check_overrides(overrides, context, subject=run)
    with out.working():
        import peftlab

        figures = peftlab.show_adapter(run, picture=picture, recipe=recipe, overrides=settings)
    if out.json:
        out.document(figures)
        return
    out.show(*show_tables(figures, verbose=verbose))
    if picture is not None:
        out.line(f"picture: {picture}")


def shrink(
    context: typer.Context,
    run: Run,
    to: To,
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    keep: Annotated[
        float | None, typer.Option("--keep", metavar="SHARE", help="Share of the parameters to keep at most.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", metavar="T", help="Smallest singular value, as a share of the largest."),
    ] = None,
    budget: Annotated[
        int | None, typer.Option("--budget", metavar="N", help="Number of parameters to keep at most.")
    ] = None,
    tolerance: Tolerance = None,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    settings = check_overrides(overrides, context, subject=run)
    with out.working():
        import peftlab

        report = peftlab.shrink_adapter(
            run,
            to,
            keep=keep,
            threshold=threshold,
            budget=budget,
            tolerance=tolerance,
            recipe=recipe,
            overrides=settings,
        )
    _finish(out, report)


def _finish(out: Output, report: dict[str, object]) -> None:
    """Prints the report of a rework that wrote a folder."""
    if out.json:
        out.document(report)
        return
    out.show(*rework_tables(report))
    out.line()
    out.line(f"use it:   peftlab eval {report['output']}")
    out.line(f"          peftlab merge {report['output']}")
