"""``peftlab chat``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from typing import Annotated, Any, TextIO

import typer

from peftlab import formatting
from peftlab.cli.failures import usage_error
from peftlab.cli.options import Debug, Json, RecipeOption, Target, Temperature, TopP, split_overrides
from peftlab.cli.output import output_of

_PROMPT = "> "
_HELP = """  /reset  forget the conversation
  /help   show these lines
  /quit   leave, as do Ctrl-D, and Ctrl-C at the prompt
  Ctrl-C  stop the answer while the model writes"""


def chat(
    context: typer.Context,
    target: Target,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="SECTION.KEY=VALUE", help="Override recipe settings."),
    ] = None,
    recipe: RecipeOption = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System message; default: the recipe's.")
    ] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 0.95,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", metavar="N", min=1, help="Maximum answer length in tokens; default 256."),
    ] = None,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    settings, rest = split_overrides(overrides)
    if rest:
        usage_error(f"unexpected argument {rest[0]!r}; start chat without a text and type it at the prompt", context)
    out_of_band = sys.stderr if out.json else out.stdout
    sys.stderr.write(f"loading {target} ...\n")
    with out.working():
        import peftlab

        session = peftlab.Chat(
            target,
            recipe=recipe,
            overrides=settings,
            system=system,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
        )
    manner = f"temperature {temperature:g}" if temperature else "greedy"
    sys.stderr.write(f"{manner}, at most {session.max_new_tokens:,} tokens an answer; /help lists the commands\n")
    _show_notes(session)
    talk(session, out_of_band, interactive=sys.stdin.isatty())
    if out.json:
        out.document({"target": target, "messages": session.messages})


def talk(session: Any, stream: TextIO, *, interactive: bool) -> None:
    """Runs one conversation until the user leaves.

    Args:
        session: has ``reply(text)``, a generator of pieces, ``reset()`` and ``notes``, which are shown once each.
        stream: where answers go. interactive: show prompts and allow line editing.
    """
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() its line editing and history
    while (text := _ask(stream, interactive)) is not None:
        text = text.strip()
        if text in ("/quit", "/exit"):
            return
        if text == "/reset":
            session.reset()
            stream.write("(conversation forgotten)\n")
        elif text == "/help":
            stream.write(f"{_HELP}\n")
        elif text.startswith("/") and " " not in text:
            stream.write(f"unknown command {text}\n{_HELP}\n")
        elif text:
            _answer(session.reply(text), stream)
            _show_notes(session)
        stream.flush()


def _show_notes(session: Any) -> None:
    for note in session.notes:
        sys.stderr.write(f"{note}\n")
    session.notes.clear()


def _ask(stream: TextIO, interactive: bool) -> str | None:
    """The next line; None at the end of input, or when the user leaves."""
    try:
        if not interactive:
            line = sys.stdin.readline()
            return line if line else None
        # input() edits lines only when it prompts on the real stdout.
        if stream is sys.stdout:
            return input(_PROMPT)
        stream.write(_PROMPT)
        stream.flush()
        return input()
    except (EOFError, KeyboardInterrupt):
        stream.write("\n")
        return None


def _answer(pieces: Generator[str, None, None], stream: TextIO) -> None:
    """Prints the pieces as they arrive; Ctrl-C stops the answer."""
    clean = formatting.printable if stream.isatty() else str
    try:
        with contextlib.closing(pieces):
            for piece in pieces:
                stream.write(clean(piece))
                stream.flush()
    except KeyboardInterrupt:
        stream.write(" [stopped]")
    stream.write("\n")
