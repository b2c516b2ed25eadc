"""Runs the jobs of a benchmark in order: ceilings, the gate of every cell, then repetitions over all cells in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peftlab.bench.sweep import Cell, interleaved
from peftlab.measuring.journal import Journal
from peftlab.measuring.subprocesses import launch

_WORKER = "peftlab.bench.worker"
# Runs a job from its settings; returns the result with ``status``, as ``processes.launch``.
Launch = Callable[[Mapping[str, Any]], dict[str, Any]]
Tell = Callable[[int, int, str], None]


def launch_worker(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a benchmark job with ``processes.launch``."""
    return launch(_WORKER, spec)


def run_sweep(
    cells: Sequence[Cell],
    *,
    job_of: Callable[[str, Cell], Mapping[str, Any]],
    start: Launch,
    journal: Journal,
    repeats: int,
    tell: Tell,
) -> None:
    """Measures what is missing in the journal.

    A cell whose gate is red is never timed; a cell that fails in a repetition is skipped in the next ones.

    Args: cells: the possible cells. job_of: settings of a cell's job, "ceilings", "gate" or "run". tell: called with (jobs
        done, all jobs, next job).
    """
    gated = {r["cell"]: r["status"] for r in journal.of("gate")}
    ran = {(r["cell"], r["repetition"]): r["status"] for r in journal.of("run")}
    total = 1 + len(cells) * (1 + repeats)
    done = len(journal.of("ceilings")) + len(gated) + len(ran)

    if cells and not journal.of("ceilings"):
        tell(done, total, "the machine's ceilings")
        journal.write({"kind": "ceilings", **start(job_of("ceilings", cells[0]))})
        done += 1
    for cell in cells:
        if cell.key in gated:
            continue
        tell(done, total, f"gate of {cell}")
        result = start(job_of("gate", cell))
        journal.write({"kind": "gate", "cell": cell.key, **result})
        gated[cell.key] = result["status"]
        done += 1
    passed = [cell for cell in cells if gated[cell.key] == "ok"]
    total = done + sum((cell.key, i) not in ran for cell in passed for i in range(repeats))
    for repetition in range(repeats):
        for cell in interleaved(passed, repetition):
            at = (cell.key, repetition)
            if any(ran.get((cell.key, i), "ok") != "ok" for i in range(repeats)):
                continue
            if at in ran:
                continue
            tell(done, total, f"repetition {repetition + 1} of {repeats}, {cell}")
            result = start(job_of("run", cell))
            journal.write({"kind": "run", "cell": cell.key, "repetition": repetition, **result})
            ran[at] = result["status"]
            done += 1
    tell(total, total, "")
