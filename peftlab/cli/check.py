"""``peftlab check``."""

from __future__ import annotations

from typing import Annotated

import typer

from peftlab.cli.ledger_tables import show_check
from peftlab.cli.options import Debug, Json, Overrides, Recipe, check_overrides, check_recipe
from peftlab.cli.output import output_of

# The exit code of peftlab.errors.DataError.
_REFUSED = 3


def check(
    context: typer.Context,
    recipe: Recipe,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option("--show", metavar="N", min=0, help="Training rows to show.")] = 1,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    settings = check_overrides(overrides, context, subject=recipe)
    with out.working():
        check_recipe(recipe, settings)
        import peftlab

        report = peftlab.check(recipe, settings, show=show)
    if out.json:
        out.document(report)
    else:
        show_check(out, report)
    if not report["ok"]:
        raise typer.Exit(_REFUSED)
