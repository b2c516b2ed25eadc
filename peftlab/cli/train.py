"""``peftlab train``."""

from __future__ import annotations

import typer

from peftlab.cli.closing import show_training
from peftlab.cli.options import (
    Debug,
    Json,
    Overrides,
    Recipe,
    Replace,
    Resume,
    Verbose,
    check_overrides,
    check_recipe,
    check_start,
)
from peftlab.cli.output import output_of


def train(
    context: typer.Context,
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Resume = False,
    replace: Replace = False,
    _verbose: Verbose = False,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    settings = check_overrides(overrides, context, subject=recipe)
    check_start(context, resume=resume, replace=replace)
    with out.working():
        check_recipe(recipe, settings)
        import peftlab

        run = peftlab.train(recipe, settings, resume=resume, replace=replace, verbose=out.verbose)
    if out.json:
        out.document({"run": str(run.folder), **run.summary})
    else:
        show_training(out, str(run.folder), run.summary)
