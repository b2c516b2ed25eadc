"""Runs the cases of the loss contract through peftlab and the distillation losses of other projects.

A peer takes part if it can be imported, also from a source tree on PYTHONPATH. Each is called as its own trainer calls
it, on the same models and texts, and loss and gradients are compared with sums in float64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tests.conformance.kd_cases import CASES, LOGIT_CASES, Case, LogitCase
from tests.conformance.kd_problems import NotOffered, deviation, truth
from tests.conformance.kd_systems import System

ALL_CASES = (*CASES, *LOGIT_CASES)
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]


def measure_all(system: System) -> dict[str, dict[str, Any]]:
    """Outcome of every case. Hides what libraries print while they are imported and called."""
    with quiet():
        return {case.name: measure(system, case) for case in ALL_CASES}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def measure(system: System, case: Case | LogitCase) -> dict[str, Any]:
    """``outcome``: pass, fail, raises or not offered; ``deviation`` of a result, ``error`` if there is none."""
    run = _on_logits if isinstance(case, LogitCase) else _step
    if (system.on_logits if isinstance(case, LogitCase) else system.step) is None:
        return {"outcome": "not offered"}
    try:
        error_size = run(system, case)
    except NotOffered:
        return {"outcome": "not offered"}
    except Exception as error:
        if "SimpleNamespace" in str(
            error
        ):  # our stand-in for a trainer lacks something, so it says nothing about the peer
            raise
        return {"outcome": "raises", "error": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
    outcome = "pass" if error_size <= case.tolerance else "fail"
    return {"outcome": outcome, "deviation": error_size if math.isfinite(error_size) else None}


def _step(system: System, case: Case) -> float:
    assert system.step is not None
    worst = 0.0
    for i in range(len(case.make())):
        torch.manual_seed(0)  # GOLD fills up a head with random rows
        problem = case.make()[i]
        outcome = system.step(problem)
        if any(p.grad is not None for p in problem.teacher.parameters()):
            return math.inf
        wanted = [problem.settings, dataclasses.replace(problem.settings, t2=False)]
        deviations = []
        for settings in wanted[: 1 + case.with_or_without_t2]:
            problem.settings = settings
            deviations.append(deviation(outcome, truth(problem), gradients_only=case.gradients_only))
        worst = max(worst, min(deviations))
    return worst


def _on_logits(system: System, case: LogitCase) -> float:
    assert system.on_logits is not None
    student, teacher, k, want = case.make()
    losses = system.on_logits(student, teacher, k).double()
    error = float(((losses - want).abs() / want.abs()).max())
    return error if math.isfinite(error) else math.inf


def table(versions: Mapping[str, str | None], results: Results) -> str:
    """A Markdown table with a row per case and a column per installed system."""
    names = [name for name, version in versions.items() if version]
    lines = [
        f"| case | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for case in ALL_CASES:
        cells = [_cell(results[name][case.name]) for name in names]
        lines.append(f"| {case.name}: {case.what} | {' | '.join(cells)} |")
    passed = [
        f"{sum(r['outcome'] == 'pass' for r in results[n].values())} of "
        f"{sum(r['outcome'] != 'not offered' for r in results[n].values())}"
        for n in names
    ]
    lines.append(f"| **passed of those it offers** | {' | '.join(passed)} |")
    tested = "; ".join(
        f"{name} {version}" if version else f"{name} not installed" for name, version in versions.items()
    )
    return "\n".join([*lines, "", f"{tested}."])


def _cell(result: Mapping[str, Any]) -> str:
    if result["outcome"] == "not offered":
        return "-"
    if result["outcome"] == "raises":
        return "**raises**"
    value = result["deviation"]
    text = "inf" if value is None else f"{value:.0e}" if value < 0.01 else f"{value:.2f}"
    return f"pass ({text})" if result["outcome"] == "pass" else f"**fail** ({text})"
