"""Finds the fastest plans for adapted linears on this machine, per kind of weight, rows, shape and dropout."""

from __future__ import annotations

import datetime
import difflib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peftlab import ops
from peftlab.bench.kernel_cases import Case, candidates, make_case, make_weight
from peftlab.bench.plan_file import check_file, write_plans
from peftlab.errors import RecipeError, ResourceError, VerificationError
from peftlab.measuring import timing
from peftlab.measuring.machine import describe_machine, free_bytes, versions
from peftlab.models import resolve_precision
from peftlab.models.presets import check_preset, linear_shapes, random_weight
from peftlab.paths import kernel_plans_file

KINDS = ("dense", "nf4", "int8")
ROWS, RANK, DROPOUT = (512, 2048, 8192), 16, (0.0, 0.05)
MODELS = {"cpu": "shape:smollm2-135m", "cuda": "shape:llama-3-8b"}
_GIB = 2**30


@dataclass(frozen=True)
class _Job:
    """A case to measure and its candidates."""

    key: ops.PlanKey
    rows: int
    dropout: float
    forward: list[str]
    backward: list[str]

    def __str__(self) -> str:
        return f"{self.key.kind}, {self.rows} rows, {self.key.n} x {self.key.k}, dropout {self.dropout:g}"


def tune(
    *,
    model: str | None = None,
    rows: Sequence[int] = ROWS,
    rank: int = RANK,
    kinds: Sequence[str] = KINDS,
    dropout: Sequence[float] = DROPOUT,
    out: Path | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> dict[str, Any]:
    """Measures the plans and writes the fastest to a file that later runs read.

    Args:
        model: preset whose linears are measured, ``shape:NAME``. rows: input rows; each count covers its power of two.
        rank: adapter rank. kinds: among ``KINDS``. dropout: probabilities; plans differ only between zero and nonzero.
        out: default: the file in the cache that every run reads. progress: called with (cases done, all cases, next case).
    Returns: ``{"file", "plans", "kept", "notes", "machine", "versions", "date"}``; a plan has its lookup key, the choice,
        the choice by rule, and milliseconds per candidate.
    Raises: RecipeError (invalid arguments, a file that cannot be written), ResourceError (memory), VerificationError (a
        plan does not match the formula).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = resolve_precision("auto", device)
    _check(rows, rank, kinds, dropout)
    shapes = _shapes(model or MODELS[device])
    jobs, notes = _jobs(device, dtype, shapes, rows, list(dict.fromkeys(kinds)), dropout)
    _check_memory(jobs, rank, dtype, device)
    file = kernel_plans_file() if out is None else out
    notes += check_file(file)
    plans: list[dict[str, Any]] = []
    try:
        for case, job in _cases(jobs, rank, dtype, device):
            progress(len(plans), len(jobs), str(job))
            plans.append(_measured(case, job, device, notes) | {"rank": rank, "dtype": str(dtype)})
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise ResourceError(f"out of memory at case {len(plans) + 1} of {len(jobs)}; lower --rows") from error
    finally:
        ops.release_scratch()
    progress(len(jobs), len(jobs), "")
    about = {"machine": describe_machine(device), "versions": versions(), "date": _now()}
    for plan in plans:
        plan["date"] = about["date"]
    kept = write_plans(file, plans, **about)
    return {"file": str(file), "plans": plans, "kept": kept, "notes": notes, **about}


def _check(rows: Sequence[int], rank: int, kinds: Sequence[str], dropout: Sequence[float]) -> None:
    for name, values in (("rows", rows), ("kinds", kinds), ("dropout", dropout)):
        if not values:
            raise RecipeError(f"nothing to measure: --{name} is empty")
    for kind in kinds:
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"--kinds: expected some of {', '.join(KINDS)}, found {kind!r}{hint}")
    if wrong := [n for n in rows if n < 1]:
        raise RecipeError(f"--rows: expected at least 1, found {wrong[0]}")
    if rank < 1:
        raise RecipeError(f"--rank: expected at least 1, found {rank}")
    if wrong_dropout := [p for p in dropout if not 0 <= p < 1]:
        raise RecipeError(f"--dropout: expected probabilities in [0, 1), found {wrong_dropout[0]:g}")
    if len(above_zero := sorted({p for p in dropout if p})) > 1:
        raise RecipeError(
            f"--dropout: expected 0 and at most one other probability, found {above_zero[0]:g} and {above_zero[1]:g}"
        )


def _shapes(model: str) -> list[tuple[int, int]]:
    try:
        check_preset(model)
    except RecipeError as error:  # without the recipe key: there is no recipe
        raise RecipeError(f"--model: {error}") from error
    return linear_shapes(model)


def _jobs(
    device: str,
    dtype: torch.dtype,
    shapes: list[tuple[int, int]],
    rows: Sequence[int],
    kinds: list[str],
    dropout: Sequence[float],
) -> tuple[list[_Job], list[str]]:
    """Returns every combination with a choice of plans, and notes on those without."""
    jobs: dict[ops.PlanKey, _Job] = {}
    notes = []
    for kind, p in itertools.product(kinds, dict.fromkeys(dropout)):
        forward, backward = candidates(kind, device, dropout=p > 0, dtype=dtype)
        if len(forward) == len(backward) == 1:
            notes.append(f"{kind}, dropout {p:g}: {forward[0]} is the only plan, nothing to measure")
            continue
        for (num_out, num_in), num_rows in itertools.product(shapes, dict.fromkeys(rows)):
            key = ops.plan_key(kind, torch.device(device), M=num_rows, N=num_out, K=num_in, dropout=p > 0)
            if (other := jobs.get(key)) is not None:
                raise RecipeError(
                    f"--rows: {other.rows} and {num_rows} use the same plan, that of {key.m} rows; keep one of them"
                )
            jobs[key] = _Job(key, num_rows, p, forward, backward)
    if not jobs:
        raise RecipeError(f"nothing to measure: {'; '.join(notes)}")
    return list(jobs.values()), notes


def _check_memory(jobs: list[_Job], rank: int, dtype: torch.dtype, device: str) -> None:
    """Raises ResourceError if a case does not fit: its check holds inputs and outputs and about four float32 copies, and
    decoding a weight takes up to 32 bytes per element."""
    free, bytes_each = free_bytes(device), 16 + 4 * dtype.itemsize
    for job in jobs:
        inputs = (job.rows + rank) * (job.key.n + job.key.k) + job.rows * rank
        needed = 32 * job.key.n * job.key.k + inputs * bytes_each
        if needed > free:
            raise ResourceError(
                f"{job}: needs about {needed / _GIB:.1f} GiB, but {free / _GIB:.1f} GiB are free; lower --rows or use a smaller "
                "--model"
            )


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # on a CPU


def _cases(jobs: list[_Job], rank: int, dtype: torch.dtype, device: str) -> Iterator[tuple[Case, _Job]]:
    """Yields the cases of the jobs; jobs share their weights."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for shape, of_shape in itertools.groupby(sorted(jobs, key=_shape), key=_shape):
            values = random_weight(shape, dtype=torch.float32, device=device, seed=f"tune/{shape}", pool=pool)
            for kind, of_kind in itertools.groupby(of_shape, key=lambda job: job.key.kind):
                weight = make_weight(kind, values, dtype)
                for job in of_kind:
                    case = make_case(weight, rows=job.rows, rank=rank, dropout=job.dropout, dtype=dtype, device=device)
                    yield case, job


def _shape(job: _Job) -> tuple[int, int]:
    return job.key.n, job.key.k


def _measured(case: Case, job: _Job, device: str, notes: list[str]) -> dict[str, Any]:
    """Measures ``job`` and returns its table row. Backward candidates are timed after the rule's forward, on which they do not
    depend."""
    rule = ops.plan_by_rule(job.key)
    forward, backward = _usable(case, job, rule, notes)
    forward_ms = _times({how: partial(case.forward, ops.Plan(how, rule.backward)) for how in forward}, device)
    outputs = {how: case.forward(ops.Plan(rule.forward, how)) for how in backward}
    backward_ms = _times({how: partial(case.backward, y) for how, y in outputs.items()}, device)
    return {
        **job.key._asdict(),
        "forward": timing.fastest(forward_ms, rule.forward),
        "backward": timing.fastest(backward_ms, rule.backward),
        "rule": {"forward": rule.forward, "backward": rule.backward},
        "rows": job.rows,
        "probability": job.dropout,
        "forward_ms": {how: timing.spread(ms) for how, ms in forward_ms.items()},
        "backward_ms": {how: timing.spread(ms) for how, ms in backward_ms.items()},
    }


def _times(runs: timing.Runs, device: str) -> timing.Times:
    return timing.measure(runs, device) if len(runs) > 1 else {}


def _usable(case: Case, job: _Job, rule: ops.Plan, notes: list[str]) -> tuple[list[str], list[str]]:
    """Returns the candidates that run here, after checking them; the rule's plan must be among them."""
    want = case.formula()

    def is_usable(plan: ops.Plan) -> bool:
        name = f"{job}: the plan forward {plan.forward}, backward {plan.backward}"
        try:
            fault = case.fault(plan, want)
        except Exception as error:  # libraries raise anything for an unsupported device or shape
            if plan == rule or _is_out_of_memory(error):
                raise
            notes.append(f"{name} does not run here: {type(error).__name__}: {error}")
            return False
        if fault:
            raise VerificationError(
                f"{name} is wrong: {fault}. No plans were written. This is a bug in peftlab or a library; train with "
                "run.kernels=reference"
            )
        return True

    return (
        [how for how in job.forward if is_usable(ops.Plan(how, rule.backward))],
        [how for how in job.backward if is_usable(ops.Plan(rule.forward, how))],
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
