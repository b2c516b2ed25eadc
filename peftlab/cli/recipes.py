"""``peftlab recipes``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from peftlab.cli.options import Debug, Json
from peftlab.cli.output import output_of
from peftlab.recipe import shipped

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped recipe.")]


def list_recipes(context: typer.Context, _json: Json = False, _debug: Debug = False) -> None:
    out = output_of(context)
    summaries = {name: shipped.recipe_summary(name) for name in shipped.recipe_names()}
    if out.json:
        out.document({"recipes": [{"name": name, "summary": text} for name, text in summaries.items()]})
        return
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in summaries.items():
        table.add_row(name, text)
    out.show(table)
    out.line()
    out.line("Run one: peftlab train NAME (or distill NAME if it has a teacher).", style="dim")
    out.line("Copy one: peftlab recipes copy NAME", style="dim")


def show(context: typer.Context, name: Name, _json: Json = False, _debug: Debug = False) -> None:
    out = output_of(context)
    text = shipped.recipe_text(name)
    if out.json:
        out.document({"name": name, "summary": shipped.recipe_summary(name), "text": text})
    elif out.styled:
        from rich.syntax import Syntax

        out.show(Syntax(text.rstrip(), "yaml", theme="ansi_dark", background_color="default", word_wrap=True))
    else:
        out.write(text if text.endswith("\n") else text + "\n")


def copy(
    context: typer.Context,
    name: Name,
    path: Annotated[str | None, typer.Argument(metavar="PATH", help="File or folder; default NAME.yaml.")] = None,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    target = shipped.copy_recipe(name, path)
    if out.json:
        out.document({"name": name, "path": str(target)})
    else:
        out.line(f"{target}")
        out.line(f"edit it, then: peftlab train {target}", style="dim")


def schema(context: typer.Context, _json: Json = False, _debug: Debug = False) -> None:
    out = output_of(context)
    out.written = True
    out.write(json.dumps(shipped.recipe_schema(), indent=2) + "\n")
