"""Builds the command line from the table of verbs; the only place where exceptions become exit codes."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from peftlab import __version__
from peftlab.cli.failures import EXIT_CODES, handle, usage_error
from peftlab.cli.options import Debug, Json
from peftlab.cli.output import Output
from peftlab.cli.verbs import VERBS, Group, Verb
from peftlab.errors import RecipeError
from peftlab.ranks import is_first, leave, num_ranks

_TABLE = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())
_EPILOG = f"""\b
Start here:
  peftlab doctor                         does this machine work?
  peftlab recipes                        what can be trained?
  peftlab check quickstart               what would be trained?
  peftlab train smoke                    a tiny model, in seconds
  peftlab train quickstart train.lr=5e-4

\b
Exit codes:
{_TABLE}"""
_APP: dict[str, Any] = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}
_CONTEXT = {"help_option_names": ["-h", "--help"]}


class _Command(TyperCommand):
    """A command whose help says RECIPE, not {RECIPE} <str>."""

    def get_help(self, ctx: Any) -> str:
        text = re.sub(r"\{([A-Z]+)\}", r"\1", super().get_help(ctx))
        text = re.sub(r" <(?:str|list\[str\])>", lambda match: " " * len(match[0]), text)
        return "\n".join(line.rstrip() for line in text.splitlines())


class _Verbs(TyperGroup):
    """The verbs of a table. Each is imported when used; an unknown verb is an error with a suggestion."""

    table: Mapping[str, Verb | Group] = VERBS
    group: Group | None = None

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        verb = self.table.get(cmd_name)
        return None if verb is None else _click_command(cmd_name, verb)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.help) for name, verb in self.table.items()])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in self.table and not name.startswith("-"):
            near = get_close_matches(name, self.table, n=1, cutoff=0.5)
            guess = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(self.table)}"
            usage_error(f"unknown verb {name!r}, {guess}", ctx)
        if num_ranks() > 1 and self.group is None and not getattr(self.table.get(name), "ranks", name.startswith("-")):
            raise RecipeError(
                f"peftlab {name} runs in one process, but the launch has {num_ranks()}; start it without accelerate launch or "
                "torchrun"
            )
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads ``bench RECIPE`` as ``bench run RECIPE``, unless the first word looks like a misspelt verb."""
        default = None if self.group is None else self.group.default
        words = [word for word in args if not word.startswith("-")]
        if default and words and words[0] not in self.table and not self._is_misspelt(words[0]):
            args = [default, *args]
        return super().parse_args(ctx, args)

    def _is_misspelt(self, word: str) -> bool:
        from peftlab.recipe.shipped import recipe_names

        near = get_close_matches(word, self.table, n=1, cutoff=0.8)
        return bool(near) and not Path(word).exists() and word not in recipe_names()


def _click_command(name: str, verb: Verb | Group) -> Any:
    """The Click command of a verb."""
    app = typer.Typer(**_APP)
    if isinstance(verb, Group):
        kind = type("_GroupVerbs", (_Verbs,), {"table": verb.verbs, "group": verb})
        alone = None if verb.alone is None else _function(verb.verbs[verb.alone].function)
        app.callback(
            cls=kind,
            help=verb.help,
            epilog=f"Example: {verb.example}",
            invoke_without_command=alone is not None,
            context_settings=_CONTEXT,
        )(_group_callback(alone))
        return typer.main.get_group(app)
    text = f"{verb.help}\n\n{verb.more}" if verb.more else verb.help
    app.command(name, cls=_Command, help=text, epilog=f"Example: {verb.example}", context_settings=_CONTEXT)(
        _function(verb.function)
    )
    return typer.main.get_command(app)


def _function(name: str) -> Any:
    file, _, function = name.partition(":")
    return getattr(import_module(f".{file}", __package__), function)


def _group_callback(function: Any) -> Any:
    """The callback of a group: calls ``function`` if no verb is given, else does nothing."""

    def group(context: typer.Context, _json: Json = False, _debug: Debug = False) -> None:
        if function is not None and context.invoked_subcommand is None:
            function(context)

    return group


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"peftlab {__version__}")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    """Adapt or distill a transformer model with one recipe, and prove the result.

    peftlab VERB ARGUMENT [section.key=value ...] [--json] [--debug]
    """


def _command() -> Any:
    app = typer.Typer(**_APP)
    app.callback(cls=_Verbs, epilog=_EPILOG, context_settings=_CONTEXT)(_root)
    return typer.main.get_group(app)


def run(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code. Prints errors; never raises."""
    options = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    verbose = "-v" in options or "--verbose" in options
    out = Output(json="--json" in options, debug="--debug" in options, verbose=verbose)
    command = _command()
    try:
        if not arguments:
            with command.make_context("peftlab", [], resilient_parsing=True) as context:
                typer.echo(context.get_help(), err=True)
            return 2
        # Not app(): Click's main would handle Ctrl-C, closed pipes and usage errors before `handle` sees them.
        with command.make_context("peftlab", list(arguments), obj=out) as context:
            command.invoke(context)
            out.stdout.flush()
        leave()  # a rank that fails stays, until it has said why
        return 0
    except BaseException as error:
        return handle(error, out)


def main() -> NoReturn:
    """The console entry."""
    for stream in (sys.stdout, sys.stderr):
        # Escape characters that the terminal cannot show instead of crashing.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if not is_first():  # rank 0 prints the result
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (until the process ends)
    sys.exit(run(sys.argv[1:]))
