"""Writes results to stdout: tables and texts for people, or exactly one JSON document."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WIDTH = 80
_MAX_WIDTH = 100


class Output:
    """The output of one command.

    Attributes:
        json: one JSON document instead of tables. debug: show tracebacks. verbose: show every figure.
        written: whether the JSON document is already written; there is only one.
    """

    def __init__(self, *, json: bool = False, debug: bool = False, verbose: bool = False) -> None:
        self.json, self.debug, self.verbose = json, debug, verbose
        self.written = False
        self.stdout: TextIO = sys.stdout
        self._console: Console | None = None

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Redirects what libraries print to stderr: stdout is for the result."""
        with contextlib.redirect_stdout(sys.stderr):
            yield

    @property
    def console(self) -> Console:
        """The console for results; 80 columns wide if stdout is not a terminal."""
        if self._console is None:
            self._console = make_console(self.stdout)
        return self._console

    @property
    def styled(self) -> bool:
        return self.console.is_terminal

    def show(self, *renderables: RenderableType) -> None:
        with contextlib.nullcontext() if self.styled else self.console.capture() as captured:
            for renderable in renderables:
                self.console.print(renderable, markup=False, highlight=False, emoji=False)
        if captured is not None:
            self.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))

    def line(self, text: str = "", style: str | None = None) -> None:
        """Prints a line without wrapping, so that paths and commands can be copied."""
        if self.styled:
            self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        else:
            self.write(f"{text}\n")

    def write(self, text: str) -> None:
        """Writes the text unchanged and flushes."""
        self.stdout.write(text)
        self.stdout.flush()

    def document(self, value: Any) -> None:
        """Writes the JSON document."""
        self.written = True
        self.write(json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")


def output_of(context: typer.Context) -> Output:
    output = context.find_object(Output)
    assert output is not None
    return output


def make_console(stream: TextIO) -> Console:
    from rich.console import Console

    console = Console(file=stream, highlight=False, emoji=False)
    width = min(console.width, _MAX_WIDTH) if stream.isatty() else WIDTH
    return Console(file=stream, highlight=False, emoji=False, width=width)


def _finite(value: Any) -> Any:
    """As ``peftlab.runs.finite``, which is imported only if there may be a float."""
    if isinstance(value, str | int | bool | None):
        return value
    from peftlab.runs import finite

    return finite(value)
