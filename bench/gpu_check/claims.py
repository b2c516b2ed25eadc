"""gpu-check: judges the claims of results/claims.json and of the ops' cases.py by the measured rows.

A claim has ``rules``. Each rule names a section and the tasks whose rows decide it (``match``: key -> value, or a list of allowed
values). ``figure`` is the path of a figure in those rows, with a bound (``at_least``, ``at_most``, ``equals``) or none. A claim is
confirmed if all matching tasks are green, their figures are within the bounds, and the sections that the figures depend on
are green. ``card`` is part of a GPU's name: the claim is about that card and stays open on others. A claim without rules stays open.
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
    """The verdict of the rows on a claim.

    Attributes:
        measured: the figures, or the bound that one of them missed. note: progress of an open claim.
    """

    state: State
    measured: str = ""
    note: str = ""


def load(path: Path = CLAIMS) -> list[Claim]:
    """The claims of the file and of the ops' cases.py."""
    return [*json.loads(path.read_text(encoding="utf-8")), *itertools.chain(*gathered("CLAIMS").values())]


def fits(rule: Row, task: Row) -> bool:
    return all(
        name in task and task[name] in (values if isinstance(values, list) else [values])
        for name, values in rule["match"].items()
    )


def figure_of(rule: Row, row: Row) -> Any:
    """The figure, or None if the row lacks it: its contestant is not installed or ran out of memory."""
    value: Any = row
    for name in rule["figure"]:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def keeps(rule: Row, figure: Any) -> bool:
    """Whether a figure is within the bound. An interval that contains 1 reaches no target above 1. It exceeds a limit only
    if all of it lies beyond."""
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
        return Verdict("open", note=f"for a card other than {machine}")
    listed = tasks_listed(records)
    counting = counting_rows(records)
    rows = {(r["section"], identity(r["task"])): r for r in counting if "task" in r}
    sections = {rule["section"] for rule in claim["rules"]}
    missed = [_red(r) for r in counting if "task" not in r and r["section"] in sections and r["ok"] is False]
    texts, done, num_expected = [], 0, 0
    for rule in claim["rules"]:
        tasks = [task for task in listed.get(rule["section"], []) if fits(rule, task)]
        measured_rows = [rows[key] for task in tasks if (key := (rule["section"], identity(task))) in rows]
        missed += [_red(row) for row in measured_rows if row["ok"] is False]
        green = [row for row in measured_rows if row["ok"] is True]
        figures = {}
        if "figure" in rule:
            figures = {i: figure for i, row in enumerate(green) if (figure := figure_of(rule, row)) is not None}
            missed += [_missed(rule, green[i], figure) for i, figure in figures.items() if not keeps(rule, figure)]
        texts.append(_measured(rule, [(green[i]["task"], figure) for i, figure in figures.items()], len(green)))
        done += len(figures) if "figure" in rule else len(green)
        num_expected += max(len(tasks), 1)
    if missed:
        return Verdict("failed", "; ".join(dict.fromkeys(missed)))
    if done < num_expected:
        return Verdict("open", note=f"{done} of {num_expected} rows green" if done else "")
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
    """``M=2048: 1.22 (1.20..1.24)``: labelled by the keys in which the tasks differ."""
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
