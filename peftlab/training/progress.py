"""Progress for people, on stderr: a live bar in a terminal, plain lines elsewhere, or nothing.

Stdout is never written, so that ``--json`` keeps it to one document.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO, TypeVar

from peftlab.ranks import is_first
from peftlab.training.progress_text import Clock, Pace, Stage, metrics_text, value_texts, wrapped

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_FIRST_STEPS = (1, 2, 5, 10)
_MIN_INTERVAL_S = 5.0
_MAX_INTERVAL_S = 60.0
_MIN_BAR_WIDTH = 8
_PLAIN_WIDTH = 80

T = TypeVar("T")


class Progress(Protocol):
    """The interface that the training loop and the verbs report to; a context manager that stops at the end."""

    def stage(self, text: str) -> None:
        """Starts a stage, such as "loading model". The next call of stage, start, step or evaluated ends it and shows its
        time."""

    def done(self) -> None:
        """Ends the stage before its results are reported."""

    def note(self, text: str) -> None:
        """Shows a line of information."""

    def detail(self, text: str) -> None:
        """Shows a line in verbose mode only."""

    def quietly(self) -> AbstractContextManager[None]:
        """Inside the context only warnings and the bar are shown, unless verbose."""

    def warn(self, text: str) -> None:
        """Shows a warning."""

    def show(self, renderable: RenderableType) -> None:
        """Shows a Rich renderable, such as a coloured text."""

    def start(self, total_steps: int, first_step: int = 0) -> None:
        """Starts training; first_step steps were done before a resume."""

    def step(self, step: int, values: Mapping[str, float | None]) -> None:
        """Reports optimizer step ``step`` (1-based). Known values, each optional: loss (nats), lr, grad_norm, tokens_per_s,
        memory_bytes."""

    def evaluated(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Shows the first eight flat metric values after ``step`` steps."""

    def stop(self) -> None:
        """Releases the terminal; may be called at any time and repeatedly."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def make_progress(stream: TextIO | None = None, *, verbose: bool = False) -> Progress:
    """Returns a live bar if the stream (default: stderr) is a terminal that can redraw lines, else plain lines; nothing in
    the processes of a launch after the first.

    Args: verbose: show details too.
    """
    if not is_first():
        return SilentProgress()
    stream = sys.stderr if stream is None else stream
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return PlainProgress(stream, verbose=verbose)
    from rich.console import Console

    return RichProgress(Console(file=stream), verbose=verbose)


def first_in_full(progress: Progress, items: Iterable[T]) -> Iterator[T]:
    """The items one by one. While the first is worked on everything is shown, afterwards only warnings and the bar."""
    for number, item in enumerate(items):
        with progress.quietly() if number else nullcontext():
            yield item


class SilentProgress:
    """Reports nothing."""

    def stage(self, text: str) -> None: ...

    def done(self) -> None: ...

    def note(self, text: str) -> None: ...

    def detail(self, text: str) -> None: ...

    def quietly(self) -> AbstractContextManager[None]:
        return nullcontext()

    def warn(self, text: str) -> None: ...

    def show(self, renderable: RenderableType) -> None: ...

    def start(self, total_steps: int, first_step: int = 0) -> None: ...

    def step(self, step: int, values: Mapping[str, float | None]) -> None: ...

    def evaluated(self, step: int, metrics: Mapping[str, float | None]) -> None: ...

    def stop(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class PlainProgress:
    """Prints whole lines without control codes, for files and pipes.

    Steps 1, 2, 5, 10 and the last get a line. In between, a line is due once 5 s and 2 % of the steps have passed since the
    last one, at the latest after 60 s: about fifty lines, or one per minute in a long run. A stage gets one line that ends
    with its time.
    """

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic, *, verbose: bool = False) -> None:
        self._stream = stream
        self._verbose, self._quiet = verbose, False
        self._open = False  # whether the current line still needs its stage's time
        self._stage = Stage(clock)
        self._pace = Pace(clock)
        self._clock = clock
        self._line_step = 0
        self._line_time = 0.0

    def stage(self, text: str) -> None:
        self._end_stage()
        if not self._quiet:
            self._write(f"{text} ...")
            self._open = True
        self._stage.begin(text)

    def done(self) -> None:
        self._end_stage()

    def note(self, text: str) -> None:
        if not self._quiet:
            self._print(text)

    def detail(self, text: str) -> None:
        if self._verbose:
            self._print(text)

    @contextmanager
    def quietly(self) -> Iterator[None]:
        before, self._quiet = self._quiet, not self._verbose
        self._end_stage()
        try:
            yield
        finally:
            self._end_stage()
            self._quiet = before

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}")

    def show(self, renderable: RenderableType) -> None:
        from rich.console import Console

        if self._quiet:
            return
        console = Console(width=_PLAIN_WIDTH, color_system=None, force_terminal=False, highlight=False, emoji=False)
        with console.capture() as captured:
            console.print(renderable, markup=False)
        self._write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))

    def start(self, total_steps: int, first_step: int = 0) -> None:
        self._end_stage()
        self._pace.begin(total_steps, first_step)
        self._line_step, self._line_time = first_step, self._clock()

    def step(self, step: int, values: Mapping[str, float | None]) -> None:
        self._end_stage()
        self._pace.advance(step)
        if self._is_due(step):
            self._write(f"{self._step_line(value_texts(values, with_optimizer=True))}\n")
            self._line_step, self._line_time = step, self._clock()

    def evaluated(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self._end_stage()
        if not self._quiet:
            self._print(metrics_text(step, metrics))

    def stop(self) -> None:
        self._end_stage()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _step_line(self, values: list[str]) -> str:
        """One line: the last values go where they do not fit."""
        line = "  ".join(part for part in (self._pace.step_text(), *values, self._pace.time_text()) if part)
        return line if len(line) <= _PLAIN_WIDTH or len(values) <= 1 else self._step_line(values[:-1])

    def _is_due(self, step: int) -> bool:
        waited = self._clock() - self._line_time
        if self._quiet:
            return waited >= _MAX_INTERVAL_S
        if step - self._pace.first_step in _FIRST_STEPS or step == self._pace.total_steps:
            return True
        far_enough = (step - self._line_step) * 50 >= self._pace.total_steps
        return waited >= _MAX_INTERVAL_S or (waited >= _MIN_INTERVAL_S and far_enough)

    def _end_stage(self) -> None:
        name, seconds = self._stage.end()
        if self._open:
            self._write(f" {seconds}\n" if seconds else "\n", continues=True)
        elif seconds and not self._quiet:  # other lines came in between
            self._print(f"{name}: {seconds}")

    def _print(self, text: str) -> None:
        self._write(f"{wrapped(text, _PLAIN_WIDTH)}\n")

    def _write(self, text: str, *, continues: bool = False) -> None:
        if self._open and not continues:
            self._stream.write("\n")
        self._open = False
        self._stream.write(text)
        self._stream.flush()


class RichProgress:
    """Keeps one live line in a terminal: a spinner for a stage, a bar for training; notes and evaluations scroll above.

    A narrow terminal drops the bar first, then memory, then tokens/s.
    """

    def __init__(self, console: Console, clock: Clock = time.monotonic, *, verbose: bool = False) -> None:
        from rich.live import Live
        from rich.spinner import Spinner

        self._console = console
        self._verbose, self._quiet = verbose, False
        self._stage = Stage(clock)
        self._pace = Pace(clock)
        self._values: Mapping[str, float | None] = {}
        self._spinner = Spinner("line")
        # Do not redirect stdout: Rich would send its prints to this console.
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, redirect_stdout=False)

    def stage(self, text: str) -> None:
        self._end_stage()
        self._stage.begin(text)
        self._live.start(refresh=True)

    def done(self) -> None:
        self._end_stage()

    def note(self, text: str) -> None:
        if not self._quiet:
            self._print(text)

    def detail(self, text: str) -> None:
        if self._verbose:
            self._print(text)

    @contextmanager
    def quietly(self) -> Iterator[None]:
        before, self._quiet = self._quiet, not self._verbose
        self._end_stage()
        try:
            yield
        finally:
            self._end_stage()
            self._quiet = before

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}", style="yellow")

    def show(self, renderable: RenderableType) -> None:
        if not self._quiet:
            self._console.print(renderable, markup=False, emoji=False, highlight=False)

    def start(self, total_steps: int, first_step: int = 0) -> None:
        self._end_stage()
        self._pace.begin(total_steps, first_step)
        self._live.start(refresh=True)

    def step(self, step: int, values: Mapping[str, float | None]) -> None:
        self._end_stage()
        self._pace.advance(step)
        self._values = dict(values)

    def evaluated(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self._end_stage()
        if not self._quiet:
            self._print(metrics_text(step, metrics, self._console.width))

    def stop(self) -> None:
        self._stage.end()
        # Without a bar, leave nothing on the screen.
        self._live.transient = self._quiet or self._pace.total_steps == 0
        self._live.stop()
        self._pace.begin(0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _end_stage(self) -> None:
        name, seconds = self._stage.end()
        if seconds and not self._quiet:
            self._print(f"{name} ... {seconds}", style="dim")

    def _print(self, text: str, style: str | None = None) -> None:
        # Keep paths whole for copying; [brackets] in user data are not markup.
        text = wrapped(text, self._console.width)
        self._console.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        rows: list[RenderableType] = []
        if self._pace.total_steps:
            rows.append(self._bar_row())
        running = self._stage.running()
        if running:
            self._spinner.update(text=Text(running[: self._console.width - 4]))
            rows.append(self._spinner)
        return Group(*rows)

    def _bar_row(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = self._console.width - 1
        head, left = self._pace.step_text(), self._pace.time_text()
        values = value_texts(self._values, with_optimizer=False)
        while values and len("  ".join([head, *values, left])) > width:
            values.pop()
        tail = "  ".join([*values, left] if left else values)
        room = width - len(head) - len(tail) - 4
        if room < _MIN_BAR_WIDTH:
            return Text(f"{head}  {tail}"[:width])
        row = Table.grid()
        bar = ProgressBar(total=self._pace.total_steps, completed=self._pace.done, width=room)
        row.add_row(Text(f"{head}  "), bar, Text(f"  {tail}"))
        return row
