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
# Sections of a recipe: a free text such as "a.b=c" is not taken for an override.
SECTIONS = ("model", "adapter", "data", "train", "eval", "distill", "run")
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[^=]+)?=")
_SECTION_OVERRIDE = re.compile(rf"({'|'.join(SECTIONS)})\.[A-Za-z_][\w.]*=")

# All are read before parsing, so that a usage error obeys them as well: see peftlab.cli.app.run.
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
    typer.Option("--recipe", metavar="R", help="Recipe in place of the run's; needed for a base model."),
]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="T", min=0.0, help="Sampling temperature; 0 is greedy.")
]
TopP = Annotated[float, typer.Option("--top-p", metavar="P", min=0.0, max=1.0, help="Nucleus sampling: its mass.")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume an interrupted run.")]
Replace = Annotated[bool, typer.Option("--replace", help="Overwrite what is there.")]


def check_overrides(extra: Sequence[str] | None, context: typer.Context, *, subject: str) -> list[str]:
    """``extra`` if all of it looks like overrides. Raises: a usage error that says the form."""
    for text in (subject, *(extra or [])):
        is_override = _OVERRIDE.match(text) is not None
        if text is subject and is_override and not Path(text).exists():
            usage_error(f"expected a name before the settings, found {text!r}", context)
        if text is not subject and not is_override:
            usage_error(f"unexpected argument {text!r}; settings are written {FORM}", context)
    return list(extra or [])


def check_start(context: typer.Context, *, resume: bool, replace: bool) -> None:
    """Raises a usage error for a run that would be both gone on with and removed."""
    if resume and replace:
        usage_error(RESUME_OR_REPLACE, context)


def check_recipe(recipe: str, overrides: Sequence[str]) -> None:
    """Raises what is wrong with a recipe, unless it is that of a run folder. For verbs that import torch next: a misspelt key is
    told in half a second, and not after the seconds which that takes."""
    from peftlab import load_recipe

    if not Path(recipe).is_dir():
        load_recipe(recipe, overrides)


def split_overrides(arguments: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Overrides and texts, in a list of arguments that holds both."""
    overrides = [text for text in arguments or [] if _SECTION_OVERRIDE.match(text)]
    return overrides, [text for text in arguments or [] if not _SECTION_OVERRIDE.match(text)]
