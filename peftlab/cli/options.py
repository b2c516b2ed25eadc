"""Arguments and options that verbs share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from peftlab.cli.failures import usage_error

RESUME_OR_REPLACE = "--resume and --replace exclude each other"
FORM = "section.key=value, such as train.lr=1e-3"
# Sections of a recipe: a text such as "a.b=c" is not an override.
SECTIONS = ("model", "adapter", "data", "train", "eval", "distill", "run")
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[^=]+)?=")
_SECTION_OVERRIDE = re.compile(rf"({'|'.join(SECTIONS)})\.[A-Za-z_][\w.]*=")

# peftlab.cli.app.run reads these before parsing, so that usage errors obey them too.
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, shipped recipe, or run folder.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show every detail.")]
Target = Annotated[
    str, typer.Argument(metavar="TARGET", help="Run folder, merged model, adapter folder, or base model.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Override recipe settings.")]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="R",
        help="Recipe instead of the run's; required for a base model, or an adapter without its run.",
    ),
]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="T", min=0.0, help="Sampling temperature; 0 is greedy.")
]
TopP = Annotated[float, typer.Option("--top-p", metavar="P", min=0.0, max=1.0, help="Nucleus sampling probability.")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume an interrupted run.")]
Replace = Annotated[bool, typer.Option("--replace", help="Overwrite existing output.")]


def check_overrides(extra: Sequence[str] | None, context: typer.Context, *, subject: str) -> list[str]:
    """Returns ``extra`` if every item looks like an override. Raises: a usage error that shows the form."""
    for text in (subject, *(extra or [])):
        is_override = _OVERRIDE.match(text) is not None
        if text is subject and is_override and not Path(text).exists():
            usage_error(f"expected a name before the settings, found {text!r}", context)
        if text is not subject and not is_override:
            usage_error(f"unexpected argument {text!r}; settings are written {FORM}", context)
    return list(extra or [])


def check_start(context: typer.Context, *, resume: bool, replace: bool) -> None:
    """Raises a usage error if both --resume and --replace are given."""
    if resume and replace:
        usage_error(RESUME_OR_REPLACE, context)


def check_recipe(recipe: str, overrides: Sequence[str]) -> None:
    """Raises the errors of a recipe file; skips run folders. Call it before importing torch: a misspelt key is then
    reported in half a second instead of after several."""
    from peftlab import load_recipe

    if not Path(recipe).is_dir():
        load_recipe(recipe, overrides)


def split_overrides(arguments: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Splits arguments into overrides and texts."""
    overrides = [text for text in arguments or [] if _SECTION_OVERRIDE.match(text)]
    return overrides, [text for text in arguments or [] if not _SECTION_OVERRIDE.match(text)]
