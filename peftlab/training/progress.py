"""Progress for people, on stderr: a live bar in a terminal, plain lines elsewhere, or nothing.

Stdout is never written, so that ``--json`` keeps it to one document.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from peftlab.training.progress_text import Clock, Pace, Stage, metrics_text, value_texts

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_FIRST_STEPS = (1, 2, 5, 10)
_MIN_INTERVAL_S = 5.0
_MAX_INTERVAL_S = 60.0
_MIN_BAR_WIDTH = 8
_PLAIN_WIDTH = 80


class Progress(Protocol):
    """What the training loop and the verbs report to; usable as a context manager that stops at the end."""

    def stage(self, text: str) -> None:
        """A long piece of work begins, such as "loading model"; it ends, and its time is shown, at the next call
        of stage, start, step or evaluated."""

    def note(self, text: str) -> None:
        """A line of information."""

    def warn(self, text: str) -> None:
        """A line that needs attention."""

    def show(self, renderable: RenderableType) -> None:
        """Something for Rich to lay out, such as a coloured text."""

    def start(self, total_steps: int, first_step: int = 0) -> None:
        """Training begins; first_step steps were done before a resume."""

    def step(self, step: int, values: Mapping[str, float | None]) -> None:
        """Optimizer step ``step`` (1-based) is done. Known values, each optional: loss (nats), lr, grad_norm,
        tokens_per_s, memory_bytes."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """The flat metric values after ``step`` steps; the first eight are shown."""

    def stop(self) -> None:
        """Gives the terminal back; may be called at any time and more than once."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def make_progress(stream: TextIO | None = None) -> Progress:
    """A live bar if the stream (default: stderr) is a terminal that can redraw lines, else plain lines."""
    stream = sys.stderr if stream is None else stream
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return PlainProgress(stream)
    from rich.console import Console

    return RichProgress(Console(file=stream))


class SilentProgress:
    """Reports nothing."""

    def stage(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def show(self, renderable: RenderableType) -> None: ...

    def start(self, total_steps: int, first_step: int = 0) -> None: ...

    def step(self, step: int, values: Mapping[str, float | None]) -> None: ...

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def stop(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class PlainProgress:
    """Whole lines without control codes, for files and pipes.

    Steps 1, 2, 5, 10 and the last have a line. Between them one comes when 5 s and 2 % of the steps have passed since
    the last line, at the latest after 60 s: about fifty lines, or one a minute in a long run.
    """

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._stage = Stage(clock)
        self._pace = Pace(clock)
        self._clock = clock
        self._line_step = 0
        self._line_time = 0.0

    def stage(self, text: str) -> None:
        self._end_stage()
        self._print(f"{text} ...")
        self._stage.begin(text)

    def note(self, text: str) -> None:
        self._print(text)

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}")

    def show(self, renderable: RenderableType) -> None:
        from rich.console import Console

        console = Console(width=_PLAIN_WIDTH, color_system=None, force_terminal=False, highlight=False, emoji=False)
        with console.capture() as captured:
            console.print(renderable, markup=False)
        self._print("\n".join(line.rstrip() for line in captured.get().splitlines()))

    def start(self, total_steps: int, first_step: int = 0) -> None:
        self._end_stage()
        self._pace.begin(total_steps, first_step)
        self._line_step, self._line_time = first_step, self._clock()

    def step(self, step: int, values: Mapping[str, float | None]) -> None:
        self._end_stage()
        self._pace.advance(step)
        if self._is_due(step):
            parts = [self._pace.step_text(), *value_texts(values, with_optimizer=True), self._pace.time_text()]
            self._print("  ".join(part for part in parts if part))
            self._line_step, self._line_time = step, self._clock()

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._end_stage()
        self._print(metrics_text(step, metrics))

    def stop(self) -> None:
        self._stage.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _is_due(self, step: int) -> bool:
        if step - self._pace.first_step in _FIRST_STEPS or step == self._pace.total_steps:
            return True
        waited = self._clock() - self._line_time
        far_enough = (step - self._line_step) * 50 >= self._pace.total_steps
        return waited >= _MAX_INTERVAL_S or (waited >= _MIN_INTERVAL_S and far_enough)

    def _end_stage(self) -> None:
        ended = self._stage.end()
        if ended:
            self._print(ended)

    def _print(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()


class RichProgress:
    """One live line in a terminal: a spinner for a stage, a bar for training; notes and evaluations scroll above.

    The line is fitted to the width: first the bar goes, then memory, then tokens/s.
    """

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        from rich.live import Live
        from rich.spinner import Spinner

        self._console = console
        self._stage = Stage(clock)
        self._pace = Pace(clock)
        self._values: Mapping[str, float | None] = {}
        self._spinner = Spinner("line")
        # Stdout is not redirected: Rich would send what is printed there to this console.
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, redirect_stdout=False)

    def stage(self, text: str) -> None:
        self._end_stage()
        self._stage.begin(text)
        self._live.start(refresh=True)

    def note(self, text: str) -> None:
        self._print(text)

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}", style="yellow")

    def show(self, renderable: RenderableType) -> None:
        self._console.print(renderable, markup=False, emoji=False, highlight=False)

    def start(self, total_steps: int, first_step: int = 0) -> None:
        self._end_stage()
        self._pace.begin(total_steps, first_step)
        self._live.start(refresh=True)

    def step(self, step: int, values: Mapping[str, float | None]) -> None:
        self._end_stage()
        self._pace.advance(step)
        self._values = dict(values)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._end_stage()
        self._print(metrics_text(step, metrics, self._console.width))

    def stop(self) -> None:
        self._stage.end()
        # Without a bar there is nothing to leave on the screen.
        self._live.transient = self._pace.total_steps == 0
        self._live.stop()
        self._pace.begin(0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _end_stage(self) -> None:
        ended = self._stage.end()
        if ended:
            self._print(ended, style="dim")

    def _print(self, text: str, style: str | None = None) -> None:
        # Paths must stay whole for copying, and [brackets] of user data are not markup.
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
