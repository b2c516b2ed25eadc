"""gpu-check: runs the sections of one process. Every task without a green row writes a row."""

from __future__ import annotations

import time
import traceback
from typing import Any

from bench.gpu_check.base import Deadline, Device, Row, Section, Task, not_installed
from bench.gpu_check.journal import counting_rows, identity, plain
from bench.gpu_check.sections import PACKAGES, tasks_of
from peftlab.measuring.journal import Journal


class Rows:
    """Writes the rows of a process into the shared journal."""

    def __init__(self, journal: Journal, device: Device) -> None:
        self.journal, self.device = journal, device
        device.rows = [row for row in counting_rows(journal.records) if "task" in row]

    def begin(self, section: str, tasks: list[Task]) -> None:
        self.journal.write(plain({"kind": "begin", "section": section, "tasks": [task.what for task in tasks]}))

    def write(self, section: str, row: Row) -> None:
        record = plain({"kind": "row", "section": section, **row})
        self.journal.write(record)
        if "task" in record:
            self.device.rows.append(record)

    def green(self, section: str) -> set[str]:
        rows = (row for row in self.device.rows if row["section"] == section and row["ok"] is True)
        return {identity(row["task"]) for row in rows}


def run_group(sections: list[Section], rows: Rows, deadline: Deadline) -> None:
    """Runs every task of every section. An exception becomes a red row."""
    broken = ""
    for place, section in enumerate(sections):
        why = {"not_run": broken, "ok": None} if broken else not_installed(*section.needs)
        if why:
            rows.begin(section.name, [])
            rows.write(section.name, why)
            continue
        later = sum(s.least for s in sections[place + 1 :])
        seconds = min(section.seconds, max(section.least, deadline.left() - later))
        broken = _run_section(section, rows, deadline.part(seconds))
        if not broken:
            rows.device.release()


def _run_section(section: Section, rows: Rows, deadline: Deadline) -> str:
    """Why the device is unusable for the rest of the process, or an empty text."""
    device = rows.device
    device.shared["until"] = deadline.until
    left_out: list[Row] = []
    try:
        tasks = list(tasks_of(section, device))
        rows.begin(section.name, tasks)
        for task in still_to_do(tasks, rows.green(section.name)):
            if deadline.left() < task.seconds:
                left_out.append(task.what)
                continue
            started = time.perf_counter()
            try:
                result = task.run()
                device.synchronize()
            except Exception as error:  # of any kind: the other rows must still be measured
                result = _absent(error) or {"failed": _error_text(error), "ok": False}
            seconds = round(time.perf_counter() - started, 3)
            if device.dry:  # its figures mean nothing
                result |= {key: None for key in ("target", "met", "held_met") if key in result}
            rows.write(section.name, {"task": task.what, "ok": True, **result, "seconds": seconds})
            if broken := _broken(device, result):
                return broken
    except Exception as error:
        rows.write(section.name, {"failed": _error_text(error), "ok": False})
    if left_out:
        row = {"stopped": f"{len(left_out)} rows did not fit the time", "left_out": left_out[:40]}
        rows.write(section.name, {**row, "ok": None})
    return ""


def still_to_do(tasks: list[Task], green: set[str]) -> list[Task]:
    """Tasks without a green row, preceded by those whose objects they need in memory."""
    open_ = [identity(plain(task.what)) not in green for task in tasks]
    return [
        task
        for place, task in enumerate(tasks)
        if open_[place]
        or (task.makes and any(o and not t.makes for t, o in zip(tasks[place:], open_[place:], strict=True)))
    ]


def _absent(error: Exception) -> Row | None:
    """The row of a task that failed because a package is missing that sections need or use."""
    name = str(error.name).partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return not_installed(name) if name in PACKAGES else None


def _error_text(error: Exception) -> str:
    lines = traceback.format_exception(error)
    return f"{type(error).__name__}: {error}"[:1500] + "\n" + "".join(lines[-4:])[-1500:]


def _broken(device: Device, result: Any) -> str:
    """After a failure: why CUDA is unusable, or an empty text. An illegal access breaks it for the rest of the process."""
    if "failed" not in result:
        return ""
    try:
        device.release()
        device.synchronize()
    except Exception as error:
        return f"CUDA is unusable after a failure in this process: {error}".splitlines()[0]
    return ""
