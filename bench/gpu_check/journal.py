"""gpu-check's journal: its header, and which of its rows count.

Records after the header are of three kinds. ``begin`` lists the tasks of a section. A ``row`` with a ``task`` is a measurement of
it, and the last one counts. A ``row`` without a ``task`` is about a whole section, until that begins again. ``resumed`` has
command, date and clocks of a later call.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench import ROOT
from bench.gpu_check.base import Device, Row

JOURNAL = "gpu_check.jsonl"
FORMAT = 2
# Files that the rows depend on, for git and for the digest that identifies a state without git.
CODE = ("peftlab", "kernels", "recipes", "bench/*.py", "tests/ops", "tests/adapters")
_CODE_FILES = (
    "peftlab/**/*.py",
    "kernels/**/*.py",
    "kernels/**/*.json",
    "recipes/*.yaml",
    "recipes/*.jsonl",
    "bench/**/*.py",
    "tests/ops/*.py",
    "tests/adapters/*.py",
)
_SORTED = json.JSONEncoder(sort_keys=True)  # json.dumps would make one for every row
_MORE_PACKAGES = ("liger-kernel", "quack-kernels", "nvidia-cutlass-dsl", "unsloth")


def header(device: Device, command: str, commit: str | None) -> Row:
    """commit: commit of this code, if there is no git repository."""
    from peftlab.measuring import machine

    return {
        "format": FORMAT,
        "name": "gpu-check",
        "dry_run": device.dry,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe_machine(device.kind) | machine.size_of_machine(),
        "versions": machine.versions((*machine.PACKAGES, *_MORE_PACKAGES)),
        "commit": commit or machine.git_commit(ROOT / "peftlab", *CODE),
        "source": machine.source_digest(ROOT, _CODE_FILES),
        "clocks": machine.clocks(device.kind),
    }


def plain(value: Any) -> Any:
    """The value after a round trip through JSON."""
    return json.loads(json.dumps(value, default=str))


def identity(task: Mapping[str, Any]) -> str:
    return _SORTED.encode(task)


def counting_rows(records: Iterable[Row]) -> list[Row]:
    """The rows that count, in the order in which they were written."""
    newest: dict[tuple[str, str], Row] = {}
    about: dict[str, list[Row]] = {}
    order: dict[int, int] = {}
    for number, record in enumerate(records):
        if record["kind"] == "begin":
            about.pop(record["section"], None)
        elif record["kind"] == "row":
            order[id(record)] = number
            if "task" in record:
                newest[record["section"], identity(record["task"])] = record
            else:
                about.setdefault(record["section"], []).append(record)
    kept = [*newest.values(), *(row for rows in about.values() for row in rows)]
    return sorted(kept, key=lambda row: order[id(row)])


def tasks_listed(records: Iterable[Row]) -> dict[str, list[Row]]:
    """The tasks of each section that has begun."""
    return {r["section"]: r["tasks"] for r in records if r["kind"] == "begin"}


def finished(records: Sequence[Row]) -> set[str]:
    """Sections in which every task has a green row and which have no other rows."""
    rows = counting_rows(records)
    green = {(r["section"], identity(r["task"])) for r in rows if "task" in r and r["ok"] is True}
    unsaid = {r["section"] for r in rows if "task" not in r}
    return {
        section
        for section, tasks in tasks_listed(records).items()
        if tasks and section not in unsaid and all((section, identity(task)) in green for task in tasks)
    }


def unproven(records: Sequence[Row], gates: Iterable[str]) -> list[str]:
    """What is wrong with each of these sections that is not green."""
    done, rows = finished(records), counting_rows(records)
    begun = tasks_listed(records)
    others = {gate: [r for r in rows if r["section"] == gate and r["ok"] is not True] for gate in gates}
    return [_state(gate, others[gate], begun=gate in begun) for gate in others if gate not in done]


def _state(gate: str, others: list[Row], *, begun: bool) -> str:
    """others: the gate's rows that are not green."""
    if red := [row for row in others if row["ok"] is False]:
        return f"`{gate}` has {len(red)} red {'row' if len(red) == 1 else 'rows'}{_why(red)}"
    if others or begun:
        return f"`{gate}` is unfinished{_why(others)}"
    return f"`{gate}` has not run"


def _why(rows: list[Row]) -> str:
    texts = (row.get("failed") or row.get("not_run") or row.get("stopped") for row in rows)
    reason = next((str(text).splitlines()[0][:120] for text in texts if text), "")
    return f" ({reason})" if reason else ""
