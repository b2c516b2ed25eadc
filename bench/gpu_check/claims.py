"""gpu-check: what rows say about the claims of results/claims.json and of the ops' cases.py.

A claim has ``rules``; each names a section, the tasks whose rows decide it (``match``: key -> value, or a list of those that
fit), and with ``figure`` the path of a figure in those rows with its bound (``at_least``, ``at_most``, ``equals``) or none. It is
confirmed when all tasks that fit are green and their figures within the bounds, and the sections green that the figures stand
on. With ``card``, part of a GPU's name, it is about that card only and stays open on another. One without rules stays open.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peftlab_kernels.cases import gathered

from bench import RESULTS
from bench.gpu_check.base import Row
from bench.gpu_check.journal import counting_rows, identity, tasks_listed, unproven
from bench.gpu_check.sections import BY_NAME

CLAIMS = RESULTS / "claims.json"
State = Literal["open", "confirmed", "failed"]
Claim = dict[str, Any]
# More figures than these are shown as a range.
_MOST_FIGURES = 4


@dataclass(frozen=True)
class Verdict:
    """What the rows say of a claim.

    Attributes:
        measured: the figures, with the bound that one has missed. note: how far an open one has come.
    """

    state: State
    measured: str = ""
    note: str = ""


def load(path: Path = CLAIMS) -> list[Claim]:
    """Those of the file, and those that ops make in their cases.py."""
    return [*json.loads(path.read_text(encoding="utf-8")), *itertools.chain(*gathered("CLAIMS").values())]


def fits(rule: Row, task: Row) -> bool:
    return all(
        name in task and task[name] in (wanted if isinstance(wanted, list) else [wanted])
        for name, wanted in rule["match"].items()
    )


def figure_of(rule: Row, row: Row) -> Any:
    """None where the row lacks it: its contestant is not installed, or ran out of memory."""
    value: Any = row
    for name in rule["figure"]:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def keeps(rule: Row, figure: Any) -> bool:
    """Whether a figure is within the bound. An interval that has 1 in it reaches no target above 1, and exceeds a limit
    only where all of it lies beyond."""
    if isinstance(figure, dict):
        low = figure["low"] if figure["low"] is not None else figure["value"]
        if "at_least" in rule and figure["differs"] is False and rule["at_least"] > 1:
            return False
        return figure["value"] >= rule.get("at_least", figure["value"]) and low <= rule.get("at_most", low)
    if "equals" in rule:
        return bool(figure == rule["equals"])
    return bool(rule.get("at_least", figure) <= figure <= rule.get("at_most", figure))


def judge(claim: Claim, records: Sequence[Row]) -> Verdict:
    if not claim["rules"] or not records or records[0]["dry_run"]:
        return Verdict("open")
    machine = records[0]["machine"]["name"]
    if claim.get("card", "") not in machine:
        return Verdict("open", note=f"of another card than {machine}")
    listed = tasks_listed(records)
    counting = counting_rows(records)
    rows = {(r["section"], identity(r["task"])): r for r in counting if "task" in r}
    sections = {rule["section"] for rule in claim["rules"]}
    missed = [_red(r) for r in counting if "task" not in r and r["section"] in sections and r["ok"] is False]
    texts, done, wanted = [], 0, 0
    for rule in claim["rules"]:
        tasks = [task for task in listed.get(rule["section"], []) if fits(rule, task)]
        measured = [rows[key] for task in tasks if (key := (rule["section"], identity(task))) in rows]
        missed += [_red(row) for row in measured if row["ok"] is False]
        green = [row for row in measured if row["ok"] is True]
        figures = {}
        if "figure" in rule:
            figures = {i: figure for i, row in enumerate(green) if (figure := figure_of(rule, row)) is not None}
            missed += [_missed(rule, green[i], figure) for i, figure in figures.items() if not keeps(rule, figure)]
        texts.append(_measured(rule, [(green[i]["task"], figure) for i, figure in figures.items()], len(green)))
        done += len(figures) if "figure" in rule else len(green)
        wanted += max(len(tasks), 1)
    if missed:
        return Verdict("failed", "; ".join(dict.fromkeys(missed)))
    if done < wanted:
        return Verdict("open", note=f"{done} of {wanted} rows green" if done else "")
    gates = dict.fromkeys(gate for name in sorted(sections) for gate in BY_NAME[name].stands_on)
    if reasons := unproven(records, gates):
        return Verdict("open", note=f"measured, but {'; '.join(reasons)}")
    return Verdict("confirmed", "; ".join(texts))


def _red(row: Row) -> str:
    why = row.get("failed") or row.get("not_run") or row.get("stopped") or row.get("bad") or row.get("differing") or ""
    what = task_text(row["task"]) if "task" in row else f"`{row['section']}`"
    return f"red: {what}" + (f" ({str(why).splitlines()[0][:200]})" if why else "")


def _missed(rule: Row, row: Row, figure: Any) -> str:
    return f"{task_text(row['task'])}: {_label(rule)}{figure_text(rule, figure)}, expected {expected(rule)}"


def expected(rule: Row) -> str:
    bounds = {"at_least": "at least ", "at_most": "at most ", "equals": ""}
    return " and ".join(f"{words}{_number_text(rule, rule[name])}" for name, words in bounds.items() if name in rule)


def _measured(rule: Row, figures: list[tuple[Row, Any]], num_green: int) -> str:
    """``M=2048: 1.22 (1.20..1.24)``: by the keys in which the tasks differ."""
    if "figure" not in rule or "equals" in rule:
        return f"{num_green} {'row' if num_green == 1 else 'rows'} green in `{rule['section']}`"
    if len(figures) > _MOST_FIGURES:
        values = sorted(f["value"] if isinstance(f, dict) else f for _, f in figures)
        return f"{_label(rule)}{len(figures)} rows, {_number_text(rule, values[0])} to {_number_text(rule, values[-1])}"
    tasks = [task for task, _ in figures]
    differing = [name for name in tasks[0] if any(task.get(name) != tasks[0][name] for task in tasks)] if tasks else []
    return _label(rule) + ", ".join(
        ": ".join(filter(None, (task_text({n: task.get(n) for n in differing}), figure_text(rule, figure))))
        for task, figure in figures
    )


def _label(rule: Row) -> str:
    return f"{rule['label']} " if "label" in rule else ""


def task_text(task: Row) -> str:
    words = [str(task[name]) for name in ("check", "case") if name in task]
    words += [f"{name}={_plain(value)}" for name, value in task.items() if name not in ("check", "case")]
    return " ".join(words)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def figure_text(rule: Row, figure: Any) -> str:
    if isinstance(figure, list):  # quartiles
        low, median, high = (_number_text(rule, value) for value in figure)
        return f"{median} ({low}..{high})"
    if not isinstance(figure, dict):
        return _number_text(rule, figure)
    text = f"{figure['value']:.2f}"
    text += f" ({figure['low']:.2f}..{figure['high']:.2f})" if figure["low"] is not None else ""
    return text + (", no difference" if figure["differs"] is False else "")


def _number_text(rule: Row, value: Any) -> str:
    if isinstance(value, float | int) and not isinstance(value, bool):
        if any(name.endswith("_bytes") for name in rule["figure"]):
            return f"{value / 1e9:.2f} GB"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
