"""gpu-check: the order of its sections, the time that each gets, and which may be timed.

A wave runs its checks in parallel, then times group by group, alone on the machine. A section is timed once all sections that it
depends on are green. While something runs, the conductor reserves the least time of the later timing sections of the wave.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol

from bench.gpu_check.base import Deadline, Row, Section
from bench.gpu_check.journal import counting_rows, unproven
from bench.gpu_check.processes import GRACE_S
from peftlab.measuring.journal import Journal, read_records

# To import torch and initialize CUDA, in a sandbox while other processes start: a safe estimate.
START_S = 25.0
SHORTEST_S = 10.0


class Starter(Protocol):
    """Runs groups of sections, each until a deadline. See ``Processes``."""

    def start(self, sections: list[Section], deadline: Deadline) -> Any: ...

    def wait(self, child: Any) -> tuple[int | None, str]: ...

    def stop(self) -> None: ...


class Conductor:
    """Runs sections wave by wave within the time limit."""

    def __init__(self, journal: Journal, sections: list[Section], deadline: Deadline, processes: Starter) -> None:
        self.sections, self.deadline, self.processes = sections, deadline, processes
        self.journal, self._num_before = journal, len(journal.records)

    def run(self) -> None:
        try:
            for wave in sorted({s.wave for s in self.sections}):
                of_wave = [s for s in self.sections if s.wave == wave]
                timing = [s for s in of_wave if s.timing]
                self._check([s for s in of_wave if not s.timing], kept_s=kept(timing))
                self._time(self._ready(timing))
        finally:
            self.processes.stop()

    def rows(self) -> list[Row]:
        return counting_rows(self._records())

    def _check(self, sections: list[Section], *, kept_s: float) -> None:
        """Runs all groups in parallel."""
        started = [(group, self._start(group, self._cap(group, kept_s))) for group in groups_of(sections)]
        for group, child in started:
            if child is not None:
                self._wait(group, child)

    def _ready(self, sections: list[Section]) -> list[Section]:
        """The sections that depend on green sections only. For the others it records which one is not green, and why."""
        records, ready = self._records(), []
        for section in sections:
            if reasons := unproven(records, section.stands_on):
                self._say(section.name, {"not_run": f"not timed: {'; '.join(reasons)}", "ok": None})
            else:
                ready.append(section)
        return ready

    def _time(self, sections: list[Section]) -> None:
        groups = groups_of(sections)
        for place, group in enumerate(groups):
            later = [section for other in groups[place + 1 :] for section in other]
            child = self._start(group, self._cap(group, kept(later)))
            if child is not None:
                self._wait(group, child)

    def _cap(self, group: list[Section], kept_s: float) -> float:
        return min(START_S + sum(s.seconds for s in group), self.deadline.left() - kept_s - GRACE_S)

    def _start(self, group: list[Section], seconds: float) -> Any | None:
        if seconds >= SHORTEST_S:
            return self.processes.start(group, self.deadline.part(seconds))
        for section in group:
            self._say(section.name, {"not_run": "no time is left", "ok": None})
        return None

    def _wait(self, group: list[Section], child: Any) -> None:
        code, text = self.processes.wait(child)
        begun = {r["section"] for r in self._records()[self._num_before :] if r["kind"] == "begin"}
        for section in lost(group, code, begun):
            reason = "did not end in time and was stopped" if code is None else f"ended with exit code {code}"
            # A section stopped by the time limit is unknown, not red.
            ok = None if code is None else False
            self._say(section.name, {"failed": f"the process {reason}", "output": text, "ok": ok})
        ended = "done" if code == 0 else "see its rows"
        print(f"{group[0].group}: {ended}, {self.deadline.left():.0f} s left", file=sys.stderr)

    def _records(self) -> list[Row]:
        """The records of all processes."""
        return read_records(self.journal.path)

    def _say(self, section: str, row: Row) -> None:
        self.journal.write({"kind": "row", "section": section, **row})


def groups_of(sections: Sequence[Section]) -> list[list[Section]]:
    names = dict.fromkeys(s.group for s in sections)
    return [[s for s in sections if s.group == name] for name in names]


def kept(sections: Sequence[Section]) -> float:
    """Least seconds that groups need, each including its start and the last task of the group before it."""
    needed = [sum(s.least for s in group) for group in groups_of(sections)]
    return sum(START_S + least + GRACE_S for least in needed if least)


def lost(group: list[Section], code: int | None, begun: set[str]) -> list[Section]:
    """Sections that have not begun. After a crash also the last one that has, since it may lack rows."""
    seen = [s for s in group if s.name in begun]
    return [s for s in group if s not in seen] if code == 0 else group[max(0, len(seen) - 1) :]
