"""Formats the progress lines and measures their times."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence

Clock = Callable[[], float]

_MAX_SHOWN_METRICS = 8
_MIN_STAGE_S = 0.05
# The space in "0.3 s", "2.1 GB", "98 %", and that before the time of a stage.
_NUMBER_AND_UNIT = re.compile(r"(?<=\d) (?=(?:s|ms|min|h|[kMG]i?B|%)(?!\w))|(?<= \.\.\.) (?=\d)")
_NO_BREAK = "\0"


class Stage:
    """The current stage, if any."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._text: str | None = None
        self._began = 0.0

    def begin(self, text: str) -> None:
        self._text, self._began = text, self._clock()

    def running(self) -> str | None:
        """The current line, with the seconds so far; None without a stage."""
        return None if self._text is None else f"{self._text} ... {self._clock() - self._began:.0f} s"

    def end(self) -> tuple[str, str]:
        """Ends the stage; returns its text, and its time if not negligible. Both are empty without a stage."""
        text, self._text = self._text, None
        elapsed = self._clock() - self._began
        return text or "", "" if text is None or elapsed < _MIN_STAGE_S else f"{elapsed:.1f} s"


class Pace:
    """Steps done and the time they take. Read by Rich's thread while the training loop writes it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.begin(0, 0)

    def begin(self, total_steps: int, first_step: int) -> None:
        self.total_steps, self.first_step, self.done = total_steps, first_step, first_step
        self._began = self._last = self._clock()
        # Measured from the end of the first step, which includes compilation and first allocations.
        self._origin: tuple[int, float] | None = None

    def advance(self, step: int) -> None:
        self._last = self._clock()
        if self._origin is None:
            self._origin = (step, self._last)
        self.done = step

    def step_text(self) -> str:
        return f"step {self.done:,}/{self.total_steps:,}"

    def time_text(self) -> str:
        """The time left, or the total time after the last step; empty until two steps are done."""
        origin, done = self._origin, self.done
        if done >= self.total_steps:
            return f"took {format_duration(self._last - self._began)}"
        if origin is None or done <= origin[0]:
            return ""
        left = (self._last - origin[1]) / (done - origin[0]) * (self.total_steps - done)
        return f"{format_duration(max(0.0, left - (self._clock() - self._last)))} left"


def format_number(value: float) -> str:
    """Four significant digits, such as 12.34, 0.01234, 1.234e-05; whole with commas from 1,000 to 10 million."""
    return f"{value:,.0f}" if 999.95 <= abs(value) < 1e7 else f"{value:#.4g}"


def format_bytes(num_bytes: float) -> str:
    """Decimal units: 2.1 GB is 2.1e9 bytes."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 999.5e6 else f"{num_bytes / 1e6:.0f} MB"


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds, rounded up: 0:45, 1:23, 1:02:03, 50:00:00."""
    minutes, seconds_left = divmod(math.ceil(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours}:{minutes_left:02}:{seconds_left:02}" if hours else f"{minutes}:{seconds_left:02}"


def value_texts(values: Mapping[str, float | None], *, with_optimizer: bool) -> list[str]:
    """The known values of a step, most important first; with_optimizer adds lr and grad_norm."""
    formats: dict[str, Callable[[float], str]] = {"loss": lambda v: f"loss {format_number(v)}"}
    if with_optimizer:
        formats |= {"lr": lambda v: f"lr {v:.1e}", "grad_norm": lambda v: f"grad {v:.2g}"}
    formats |= {"tokens_per_s": lambda v: f"{v:,.0f} tok/s", "memory_bytes": format_bytes}
    known = ((text, values.get(name)) for name, text in formats.items())
    return [text(value) for text, value in known if value is not None]


def metrics_text(step: int, metrics: Mapping[str, float | None], width: int | None = None) -> str:
    """The first eight metrics, in lines of at most width columns if the names fit; None: one line."""
    values = list(metrics.items())[:_MAX_SHOWN_METRICS]
    shown = [f"{name} {'n/a' if value is None else format_number(value)}" for name, value in values]
    if len(metrics) > len(shown):
        shown.append(f"and {len(metrics) - len(shown)} more")
    return _wrap_items(f"eval at step {step:,}:", shown, width)


def wrapped(text: str, width: int) -> str:
    """Wraps ``text`` between words to at most ``width`` columns; continuation lines are indented by two more.

    A word longer than a line, such as a path, stays whole; so does a number with its unit.
    """
    text = _NUMBER_AND_UNIT.sub(_NO_BREAK, text)
    lines = []
    for line in text.split("\n"):
        indent = line[: len(line) - len(line.lstrip())]
        parts = textwrap.wrap(
            line.strip(),
            max(20, width),
            initial_indent=indent,
            subsequent_indent=f"{indent}  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += parts or [""]
    return "\n".join(lines).replace(_NO_BREAK, " ")


def _wrap_items(head: str, items: Sequence[str], width: int | None) -> str:
    lines = [head]
    for index, item in enumerate(items):
        text = item if index == len(items) - 1 else f"{item},"
        if width is None or len(lines[-1]) + 1 + len(text) <= width:
            lines[-1] += f" {text}"
        else:
            lines.append(f"  {text}")
    return "\n".join(lines)
