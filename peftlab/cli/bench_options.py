"""Shared by the verbs of ``peftlab bench``: parsing of lists, and progress."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import typer

from peftlab.cli.failures import usage_error
from peftlab.cli.output import make_console
from peftlab.formatting import duration

_LINE_EVERY_S = 10.0
Number = TypeVar("Number", int, float)


def split_names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers_of(
    text: str, parse: Callable[[str], Number], option: str, form: str, context: typer.Context
) -> list[Number]:  # fmt: skip
    try:
        return [parse(part) for part in split_names(text)]
    except ValueError:
        usage_error(f"{option}: expected {form}, found {text!r}", context)


@contextlib.contextmanager
def bench_progress(clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[int, int, str], None]]:
    """Shows on stderr which case is being measured: a live line in a terminal, else a line every ten seconds."""
    console = make_console(sys.stderr)
    printed = clock()
    seen: list[tuple[int, float]] = []  # jobs done, and when; cells measured before a resume took no time now

    def text(done: int, total: int, case: str) -> str:
        if not seen or seen[-1][0] != done:
            seen.append((done, clock()))
        before, since = seen[len(seen) // 2 if len(seen) > 2 else 0]  # checks come first and take less time than runs
        left = (clock() - since) / (done - before) * (total - done) if done > before else 0
        return f"measuring {min(done + 1, total)} of {total}: {case}" + (
            f", about {duration(left)} left" if left else ""
        )

    if console.is_terminal:
        with console.status("measuring", spinner="line") as status:
            yield lambda done, total, case: status.update(text(done, total, case))
        return

    def print_line(done: int, total: int, case: str) -> None:
        nonlocal printed
        first, line = not seen, text(done, total, case)
        if case and (first or clock() - printed >= _LINE_EVERY_S):
            printed = clock()
            console.print(line, markup=False, soft_wrap=True)

    yield print_line
