"""``peftlab train``."""

from __future__ import annotations

from typing import Annotated

import typer

from peftlab.cli.closing import show_training
from peftlab.cli.options import Debug, Json, Overrides, check_overrides, check_recipe
from peftlab.cli.output import output_of


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, shipped recipe, or run folder.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an earlier run in the run folder.")] = False,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    """Train what a recipe describes and write a run folder."""
    out = output_of(context)
    settings = check_overrides(overrides, context, subject=recipe)
    if resume and replace:
        from peftlab.cli.failures import usage_error

        usage_error("--resume goes on with a run and --replace removes it: give one of them", context)
    with out.working():
        check_recipe(recipe, settings)
        import peftlab

        run = peftlab.train(recipe, settings, resume=resume, replace=replace)
    if out.json:
        out.document({"run": str(run.folder), **run.summary})
    else:
        show_training(out, str(run.folder), run.summary)
