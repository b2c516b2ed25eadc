"""From any exception to an exit code and a message."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from dataclasses import dataclass
from typing import NoReturn

import typer

from peftlab.cli.output import Output
from peftlab.errors import PeftlabError

EXIT_CODES = {
    0: "done",
    1: "internal fault",
    2: "wrong usage or recipe",
    3: "wrong data",
    4: "does not fit in memory or on the disk",
    5: "checkpoint or artefact damaged or mismatched",
    6: "a verification failed",
    130: "interrupted",
}
# What a shell reports for a program that died writing into a closed pipe.
_BROKEN_PIPE = 141
# Typer ships its own copy of Click since 0.16 and does not export these two bases.
_UsageError, _ClickException = typer.BadParameter.__mro__[1:3]


@dataclass(frozen=True)
class Failure:
    """What is told about an error: ``kind`` and ``key`` are for JSON."""

    kind: str
    message: str
    exit_code: int
    key: str | None = None


def handle(error: BaseException, out: Output) -> int:
    """Tells people and programs about the error and returns the exit code."""
    if isinstance(error, typer.Exit):
        return int(error.exit_code)
    if isinstance(error, BrokenPipeError):
        _silence_stdout()
        return _BROKEN_PIPE
    failure = describe(error)
    if out.debug:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.write("\n")
    _print_error(failure)
    if out.json and not out.written:
        out.document(
            {
                "error": {
                    "type": failure.kind,
                    "message": failure.message,
                    "exit_code": failure.exit_code,
                    "key": failure.key,
                }
            }
        )
    return failure.exit_code


def describe(error: BaseException) -> Failure:
    """The kind, message and exit code of an error."""
    kind = type(error).__name__
    if isinstance(error, PeftlabError):
        return Failure(kind, str(error), error.exit_code, error.key)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return Failure("Interrupted", "interrupted", 130)
    if isinstance(error, _ClickException):
        return Failure("UsageError", _usage_message(error), 2)
    # torch's is a RuntimeError; importing torch to ask would take seconds.
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        detail = str(error).strip().split("\n")[0]
        message = "out of memory" + (f": {detail}" if detail else "")
        return Failure(kind, f"{message}; try a smaller train.batch_size, eval.batch_tokens or data.max_length", 4)
    message = f"internal error: {kind}: {error}".rstrip(" .:")
    message += ". This is a bug in peftlab; run again with --debug for the traceback"
    return Failure(kind, message, 1)


def usage_error(message: str, context: typer.Context) -> NoReturn:
    """Raises an error in how the command was written: exit code 2, with a pointer to its help."""
    raise _UsageError(message, ctx=context)


def _usage_message(error: BaseException) -> str:
    message: str = error.format_message().rstrip().rstrip(".")  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    message = message[:1].lower() + message[1:]
    return f"{message}; see: {context.command_path} --help" if context else message


def _print_error(failure: Failure) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    text = Text(failure.message)
    if failure.exit_code == 1:
        text.stylize("bold red", 0, len("internal error"))
    elif failure.exit_code != 130:  # who stops a run has made no error
        text = Text.assemble(("error: ", "bold red"), text)
    console.print(text)


def _silence_stdout() -> None:
    """Points stdout at nothing, so that the flush at exit does not complain."""
    with contextlib.suppress(OSError, ValueError):  # under a test it is no real file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
