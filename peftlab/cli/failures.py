"""Turns any exception into an exit code and a message."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from typing import NoReturn

import typer

from peftlab.cli.output import Output
from peftlab.errors import FailedElsewhere, PeftlabError
from peftlab.ranks import is_first, lost_another, num_ranks, rank

EXIT_CODES = {
    0: "done",
    1: "internal error",
    2: "invalid usage or recipe",
    3: "invalid data",
    4: "does not fit in memory or on the disk",
    5: "damaged or mismatched file",
    6: "verification failed",
    130: "interrupted",
}
# Ranks meet the same mistake at different times; the launcher ends the others within a second of the first.
_ALIKE_S = 10.0
# What a shell reports for a program that died writing into a closed pipe.
_BROKEN_PIPE = 141
# Since 0.16, Typer ships a copy of Click and does not export these two base classes.
_UsageError, _ClickException = typer.BadParameter.__mro__[1:3]


@dataclass(frozen=True)
class Failure:
    """The report of an error; ``kind`` and ``key`` go to JSON."""

    kind: str
    message: str
    exit_code: int
    key: str | None = None


def handle(error: BaseException, out: Output) -> int:
    """Prints the error, as text and with --json as a document, and returns the exit code."""
    if isinstance(error, typer.Exit):
        return int(error.exit_code)
    if isinstance(error, BrokenPipeError):
        _silence_stdout()
        return _BROKEN_PIPE
    failure = describe(error)
    if not is_first() and _is_said_elsewhere(error, failure):
        return failure.exit_code
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


def _is_said_elsewhere(error: BaseException, failure: Failure) -> bool:
    """Whether rank 0 reports this error, or its cause: then this rank says nothing. If rank 0 goes on, the error is this
    rank's own."""
    if isinstance(error, FailedElsewhere) or failure.exit_code == 130 or lost_another(error):
        return True
    ended: list[int] = []
    # A launcher sends SIGTERM to the others when rank 0 ends.
    signal.signal(signal.SIGTERM, lambda signum, frame: ended.append(signum))
    deadline = time.monotonic() + _ALIKE_S
    while not ended and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(ended)


def describe(error: BaseException) -> Failure:
    """The kind, message and exit code of an error."""
    kind = type(error).__name__
    if isinstance(error, PeftlabError):
        return Failure(kind, str(error), error.exit_code, error.key)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return Failure("Interrupted", "interrupted", 130)
    if isinstance(error, _ClickException):
        return Failure("UsageError", _usage_message(error), 2)
    if lost_another(error):
        return Failure(
            "LostProcess", f"another of the {num_ranks()} processes of this launch has ended; see its message", 1
        )
    # By name: torch's class is a RuntimeError, and importing torch to check takes seconds.
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        detail = str(error).strip().split("\n")[0]
        message = "out of memory" + (f": {detail}" if detail else "")
        return Failure(kind, f"{message}; try a smaller train.batch_size, eval.batch_tokens or data.max_length", 4)
    message = f"internal error: {kind}: {error}".rstrip(" .:")
    message += ". This is a bug in peftlab; run again with --debug for the traceback"
    return Failure(kind, message, 1)


def usage_error(message: str, context: typer.Context) -> NoReturn:
    """Raises a usage error: exit code 2, with a pointer to the command's help."""
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
    if failure.kind == "LostProcess":
        text = Text.assemble(("error: ", "bold red"), text)
    elif failure.exit_code == 1:
        text.stylize("bold red", 0, len("internal error"))
    elif failure.exit_code != 130:  # stopping a run is not an error
        text = Text.assemble(("error: ", "bold red"), text)
    console.print(text if is_first() else Text.assemble((f"process {rank()} of {num_ranks()}: ", "bold"), text))


def _silence_stdout() -> None:
    """Points stdout at nothing, so that the flush at exit does not complain."""
    with contextlib.suppress(OSError, ValueError):  # under pytest stdout is not a real file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
