"""The Typer application, and the one place where exceptions become exit codes."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from peftlab import __version__
from peftlab.cli import (
    bench,
    bench_compare,
    bench_run,
    chat,
    check,
    distill,
    doctor,
    evaluate,
    merge,
    predict,
    recipes,
    teach,
    train,
)
from peftlab.cli.failures import EXIT_CODES, handle, usage_error
from peftlab.cli.options import Debug, Json
from peftlab.cli.output import Output
from peftlab.recipe.catalog import recipe_names

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


class Verb(TyperCommand):
    """A command whose help says RECIPE, not {RECIPE} <str>: that every argument is a text is no news."""

    def get_help(self, ctx: Any) -> str:
        text = re.sub(r"\{([A-Z]+)\}", r"\1", super().get_help(ctx))
        text = re.sub(r" <(?:str|list\[str\])>", lambda found: " " * len(found[0]), text)
        return "\n".join(line.rstrip() for line in text.splitlines())


class Verbs(TyperGroup):
    """A group whose unknown verbs get the nearest known one suggested."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            names = self.list_commands(ctx)
            near = get_close_matches(name, names, n=1, cutoff=0.5)
            guess = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(names)}"
            usage_error(f"unknown verb {name!r}, {guess}", ctx)
        return super().resolve_command(ctx, args)


class BenchVerbs(Verbs):
    """``bench RECIPE`` is ``bench run RECIPE``, unless the first word is nearly another verb and nothing else."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = [word for word in args if not word.startswith("-")]
        if words and words[0] not in self.list_commands(ctx) and not self._is_misspelt(ctx, words[0]):
            args = ["run", *args]
        return super().parse_args(ctx, args)  # type: ignore[no-any-return]

    def _is_misspelt(self, ctx: Any, word: str) -> bool:
        near = get_close_matches(word, self.list_commands(ctx), n=1, cutoff=0.8)
        return bool(near) and not Path(word).exists() and word not in recipe_names()


app = typer.Typer(
    cls=Verbs,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"peftlab {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    """Adapt or distill a transformer model with one recipe, and prove the result.

    peftlab VERB ARGUMENT [section.key=value ...] [--json] [--debug]
    """


app.command("check", cls=Verb, epilog="Example: peftlab check quickstart --show 3")(check.check)
app.command("train", cls=Verb, epilog="Example: peftlab train quickstart train.lr=5e-4 run.dir=runs/first")(train.train)
app.command("teach", cls=Verb, epilog="Example: peftlab teach film-student --plan")(teach.teach)
app.command("distill", cls=Verb, epilog="Example: peftlab distill film-student --seeds 3")(distill.distill)
app.command("eval", cls=Verb, epilog="Example: peftlab eval runs/quickstart data.eval=other.csv")(evaluate.evaluate)
app.command("predict", cls=Verb, epilog='Example: peftlab predict runs/quickstart "You won a prize"')(predict.predict)
app.command("chat", cls=Verb, epilog="Example: peftlab chat runs/quickstart --temperature 0.7")(chat.chat)
app.command("merge", cls=Verb, epilog="Example: peftlab merge runs/quickstart --base original")(merge.merge)
recipes_app = typer.Typer(cls=Verbs, rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes", epilog="Example: peftlab recipes copy quickstart mine.yaml")
recipes_app.callback(invoke_without_command=True)(recipes.recipes)
recipes_app.command("list", cls=Verb, epilog="Example: peftlab recipes list")(recipes.list_recipes)
recipes_app.command("show", cls=Verb, epilog="Example: peftlab recipes show quickstart")(recipes.show)
recipes_app.command("copy", cls=Verb, epilog="Example: peftlab recipes copy quickstart mine.yaml")(recipes.copy)
recipes_app.command("schema", cls=Verb, epilog="Example: peftlab recipes schema > recipe.schema.json")(recipes.schema)
bench_app = typer.Typer(cls=BenchVerbs, rich_markup_mode=None)
app.add_typer(bench_app, name="bench", epilog="Example: peftlab bench quickstart --quantize nf4")
bench_app.callback()(bench.bench)
_EXAMPLE = "Example: peftlab bench quickstart --ranks 8,64 --batch 1,4"
bench_app.command("run", cls=Verb, epilog=_EXAMPLE)(bench_run.bench_run)
_EXAMPLE = "Example: peftlab bench compare runs/bench-before runs/bench-after"
bench_app.command("compare", cls=Verb, epilog=_EXAMPLE)(bench_compare.compare)
_EXAMPLE = "Example: peftlab bench tune-kernels --kinds nf4 --rows 2048"
bench_app.command("tune-kernels", cls=Verb, epilog=_EXAMPLE)(bench.tune_kernels)
app.command("doctor", cls=Verb, epilog="Example: peftlab doctor --json")(doctor.doctor)


def run(arguments: Sequence[str]) -> int:
    """Does what the arguments say; the exit code. Prints, never raises."""
    options = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    out = Output(json="--json" in options, debug="--debug" in options)
    command = typer.main.get_command(app)
    try:
        if not arguments:
            with command.make_context("peftlab", [], resilient_parsing=True) as context:
                typer.echo(context.get_help(), err=True)
            return 2
        # Not app(): Click's own main would take Ctrl-C, a closed pipe and usage errors away from `handle`.
        with command.make_context("peftlab", list(arguments), obj=out) as context:
            command.invoke(context)
            out.stdout.flush()
        return 0
    except BaseException as error:
        return handle(error, out)


def main() -> NoReturn:
    """The console entry."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets its code, not a crash.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(run(sys.argv[1:]))
