"""All jobs of a benchmark in their order: ceilings, the gate of every cell, then the cells in turns, again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peftlab.bench.sweep import Cell, interleaved
from peftlab.measuring.journal import Journal
from peftlab.measuring.subprocesses import launch

_WORKER = "peftlab.bench.worker"
# From a job's settings to its result with ``status``, as ``processes.launch``.
Launch = Callable[[Mapping[str, Any]], dict[str, Any]]
Tell = Callable[[int, int, str], None]


def launch_worker(spec: Mapping[str, Any]) -> dict[str, Any]:
    """``processes.launch`` of a job of the benchmark."""
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
    """Measures what the journal does not have yet.

    A cell whose gate is red is never timed; one that fails in a repetition is not tried in the next.

    Args: cells: those that can exist. job_of: the settings of a job, "ceilings", "gate" or "run", of a cell. tell: (jobs
        done, all jobs, the next one).
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
    alive = [cell for cell in cells if gated[cell.key] == "ok"]
    total = done + sum((cell.key, i) not in ran for cell in alive for i in range(repeats))
    for repetition in range(repeats):
        for cell in interleaved(alive, repetition):
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
