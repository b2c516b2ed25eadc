"""gpu-check's conductor without a GPU and without processes: which sections are timed, and that their time suffices.

Groups run in this process, on a simulated clock and with tasks that only take time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.gpu_check import base, conductor, run
from bench.gpu_check.sections import SECTIONS
from peftlab.measuring.journal import begin, read_records

ROOT = Path(__file__).resolve().parents[3]
Row = dict[str, Any]
IMPORTS_S = 25.0  # of a process, when many start at once in a sandbox
# The main sections, with the seconds of each task on a slow machine. A row of the losses compiles its kernels first.
# The first task of the steps builds the model.
SLOW: dict[str, list[float]] = {
    "ceilings": [4.0] * 2,
    "loss speed": [9.0] * 8,
    "NF4 linears, 8,192 rows": [4.0] * 8,
    "training steps": [35.0, 20.0, 20.0, 20.0],
}


class Fake:
    """The processes, run one after another on a simulated clock. Parallel ones begin at the same time."""

    def __init__(self, path: Path) -> None:
        self.path, self.now = path, 0.0
        self.ends: list[tuple[float, int | None]] = []
        self.timed: list[tuple[float, float]] = []
        self.checked: list[tuple[float, float]] = []

    def start(self, sections: list[Any], deadline: Any) -> int:
        began = self.now
        self.now += IMPORTS_S
        device = base.Device("cpu")
        device.release = lambda: None
        journal = run.Journal(self.path, read_records(self.path))
        run.run_group(sections, run.Rows(journal, device), deadline)
        stopped = deadline.until + conductor.GRACE_S
        end = min(self.now, stopped)
        (self.timed if sections[0].timing else self.checked).append((began, end))
        self.ends.append((end, None if self.now > stopped else 0))
        self.now = began
        return len(self.ends) - 1

    def wait(self, child: int) -> tuple[int | None, str]:
        end, code = self.ends[child]
        self.now = max(self.now, end)
        return code, ""

    def stop(self) -> None: ...


Tasks = Callable[[Any], list[tuple[float, Row]]]


def conducted(
    monkeypatch: pytest.MonkeyPatch, path: Path, tasks: Tasks, *, minutes: float = 9.0
) -> tuple[Fake, list[Row]]:
    """A run of all usual sections. tasks: the seconds and the row of each task of a section."""
    journal = begin(path, {})
    fake = Fake(path)

    def of(section: Any, device: Any) -> Iterator[Any]:
        for number, (seconds, row) in enumerate(tasks(section)):
            yield base.Task({"number": number}, partial(take, seconds, row), seconds=min(seconds / 2, 20))

    def take(seconds: float, row: Row) -> Row:
        fake.now += seconds
        return row

    monkeypatch.setattr(base, "time", SimpleNamespace(time=lambda: fake.now, perf_counter=lambda: fake.now))
    monkeypatch.setattr(run, "tasks_of", of)
    monkeypatch.setattr(run, "not_installed", lambda *names: None)
    sections = [s for s in SECTIONS if not s.only_by_name]
    conductor.Conductor(journal, sections, base.Deadline(60 * minutes), fake).run()
    return fake, [r for r in read_records(path) if r["kind"] == "row"]


def green(section: str, rows: list[Row]) -> int:
    return sum(row["section"] == section and row["ok"] is True for row in rows)


@pytest.mark.parametrize(("minutes", "share"), [(9.0, 0.95), (7.0, 0.65)])
def test_schedule_times_the_main_sections_when_all_is_slow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, minutes: float, share: float
) -> None:
    """The checks take nearly all of their time (share), and no section of the second wave ends."""

    def tasks(section: Any) -> list[tuple[float, Row]]:
        usual = [share * section.seconds / 10] * 10 if section.wave == 1 else [section.seconds / 4] * 8
        return [(seconds, {}) for seconds in SLOW.get(section.name, usual)]

    fake, rows = conducted(monkeypatch, tmp_path / "rows.jsonl", tasks, minutes=minutes)
    assert green("loss speed", rows) >= 5
    assert green("NF4 linears, 8,192 rows", rows) == 8
    assert green("training steps", rows) >= 2, "the model, and a whole step"
    assert fake.now <= 60 * minutes


def test_schedule_times_the_main_sections_when_a_task_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A check that nothing depends on hangs, and so does a row of the losses in the process before the steps."""

    def tasks(section: Any) -> list[tuple[float, Row]]:
        usual = [(seconds, {}) for seconds in SLOW.get(section.name, [1.0])]
        hangs = {"lora_linear float16": 0, "loss speed": 2}
        return [*usual[: hangs[section.name]], (1000.0, {})] if section.name in hangs else usual

    fake, rows = conducted(monkeypatch, tmp_path / "rows.jsonl", tasks, minutes=7.0)
    assert green("loss speed", rows) >= 2
    assert green("training steps", rows) >= 2, "the model, and a whole step"
    stopped = [row["section"] for row in rows if "did not end in time" in row.get("failed", "")]
    assert "lora_linear float16" in stopped and stopped[-1:] == ["NF4 linears, 8,192 rows"], stopped
    assert fake.now <= 420


def test_schedule_times_each_process_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a quick machine everything is done within the time."""
    fake, rows = conducted(monkeypatch, tmp_path / "rows.jsonl", lambda section: [(1.0, {})] * 5)
    assert {row["ok"] for row in rows} == {True}
    assert {row["section"] for row in rows} == {s.name for s in SECTIONS if not s.only_by_name}
    for number, (start, end) in enumerate(fake.timed):
        others = fake.checked + fake.timed[:number] + fake.timed[number + 1 :]
        assert all(ended <= start or end <= began for began, ended in others)
    assert any(a[0] < b[1] and b[0] < a[1] for a in fake.checked for b in fake.checked if a is not b)
    first = [fake.timed[0][0], max(end for _, end in fake.checked)]
    assert first[0] < first[1], "the checks on which nothing stands come after the first times"


CORRECTNESS = [section.name for section in SECTIONS if not section.timing]


@pytest.mark.parametrize(
    "bad", [{"ok": False, "failed": "off by 3\ntrace"}, {"ok": None, "not_run": "not installed: x"}]
)
@pytest.mark.parametrize("spoilt", CORRECTNESS)
def test_bad_row_stops_only_timings_that_depend_on_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoilt: str, bad: Row
) -> None:
    sections = [s for s in SECTIONS if not s.only_by_name]

    def tasks(section: Any) -> list[tuple[float, Row]]:
        return [(1.0, {}), (1.0, bad if section.name == spoilt else {})]

    _, rows = conducted(monkeypatch, tmp_path / "rows.jsonl", tasks)
    for section in sections:
        if section.timing and spoilt in section.stands_on:
            (row,) = [r for r in rows if r["section"] == section.name]
            state = "has 1 red row (off by 3)" if bad["ok"] is False else "is unfinished (not installed: x)"
            assert row["ok"] is None and row["not_run"] == f"not timed: `{spoilt}` {state}"
        elif section.timing:
            assert green(section.name, rows) == 2, section.name
