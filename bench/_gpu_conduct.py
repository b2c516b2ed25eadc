"""gpu-check: the processes that its sections run in, and the time they get."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from _gpu_base import Deadline, Row, Section
from _gpu_journal import counting_rows, finished
from _gpu_sections import SECTIONS

from peftlab.bench.journal import Journal, read_records

PROGRAM = Path(__file__).resolve().with_name("gpu_check.py")
GRACE_S = 10.0  # beyond its deadline, for the task that a process is in
# What the groups after one of timing are left at least, in seconds.
RESERVED_S = {"ops": 190.0, "steps": 25.0}


@dataclass
class Child:
    """A group in its own process. output: what it prints, kept for the row of a crash."""

    group: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    deadline: Deadline


class Conductor:
    """Starts the groups, waits for them, and keeps to the time."""

    def __init__(self, journal: Journal, sections: list[Section], deadline: Deadline, *, dry: bool) -> None:
        self.sections, self.deadline, self.dry = sections, deadline, dry
        self.journal, self._num_before = journal, len(journal.records)
        self._running: list[Child] = []

    def groups(self, *, timing: bool) -> list[str]:
        return list(dict.fromkeys(s.group for s in self.sections if s.timing == timing))

    def run(self) -> None:
        try:
            self._run()
        finally:
            for child in self._running:  # after Ctrl-C: they are in sessions of their own
                _kill(child.process)

    def _run(self) -> None:
        """Correctness side by side, then timing, group by group."""
        started = [self._start(group, self._cap(group)) for group in self.groups(timing=False)]
        for child in started:
            self._wait(child)
        done = finished(self._records())
        checked = any(s.gate for s in self.sections) or any(s.gate and s.name in done for s in SECTIONS)
        if self.groups(timing=True) and not checked:
            self._say(
                "gate", {"not_run": "no section of correctness was chosen: no figure stands on proof", "ok": None}
            )
        timed = {s.name for s in SECTIONS if s.timing}
        if red := [row for row in self.rows() if row["ok"] is False and row["section"] not in timed]:
            for section in self.sections:
                if section.timing:
                    self._say(section.name, {"not_run": f"{len(red)} correctness rows are red", "ok": None})
            return
        for group in self.groups(timing=True):
            cap = min(self._cap(group), self.deadline.left() - RESERVED_S.get(group, 0.0) - GRACE_S)
            if cap < 10:
                for section in self.sections:
                    if section.group == group:
                        self._say(section.name, {"not_run": "no time is left", "ok": None})
                continue
            self._wait(self._start(group, cap))

    def rows(self) -> list[Row]:
        return counting_rows(self._records())

    def _records(self) -> list[Row]:
        """Of all processes."""
        return read_records(self.journal.path)

    def _cap(self, group: str) -> float:
        return min(self.deadline.left() - GRACE_S, 25 + sum(s.seconds for s in self.sections if s.group == group))

    def _start(self, group: str, seconds: float) -> Child:
        deadline = self.deadline.part(seconds)
        names = [s.name for s in self.sections if s.group == group]
        command = [sys.executable, str(PROGRAM), "--child", str(deadline.until), "--only", *names]
        command += ["--out", str(self.journal.path.parent), *(["--dry-run-cpu"] if self.dry else [])]
        # Many processes at once need few threads each; those that are timed have the machine to themselves.
        timed = any(s.timing for s in self.sections if s.group == group)
        environment = os.environ | ({} if timed else {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")})
        output = tempfile.TemporaryFile()  # noqa: SIM115 -- closed when its process has been waited for
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._running.append(Child(group, process, output, deadline))
        return self._running[-1]

    def _wait(self, child: Child) -> None:
        try:
            code: int | None = child.process.wait(timeout=max(1.0, child.deadline.left() + GRACE_S))
        except subprocess.TimeoutExpired:
            _kill(child.process)
            code = None
        self._running.remove(child)
        child.output.seek(0)
        text = child.output.read().decode(errors="replace").strip()
        child.output.close()
        begun = {r["section"] for r in self._records()[self._num_before :] if r["kind"] == "begin"}
        for section in self._lost(child.group, code, begun):
            reason = "did not end in time and was stopped" if code is None else f"ended with exit code {code}"
            # Cut off by time, a section that is no gate is unknown rather than red.
            ok = None if code is None and not section.gate else False
            self._say(section.name, {"failed": f"the process {reason}", "output": text[-2000:], "ok": ok})
        ended = "done" if code == 0 else "see its rows"
        print(f"{child.group}: {ended}, {self.deadline.left():.0f} s left", file=sys.stderr)

    def _lost(self, group: str, code: int | None, names: set[str]) -> list[Section]:
        """Sections that have not begun, and of a process that came to harm the last one that has: it may lack rows."""
        sections = [s for s in self.sections if s.group == group]
        begun = [s for s in sections if s.name in names]
        return [s for s in sections if s not in begun] if code == 0 else sections[max(0, len(begun) - 1) :]

    def _say(self, section: str, row: Row) -> None:
        self.journal.write({"kind": "row", "section": section, **row})


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
