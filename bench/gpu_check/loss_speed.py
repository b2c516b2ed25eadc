"""gpu-check: the fused linear losses against dense PyTorch, Liger and QuACK, and the floor of their products."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peftlab_kernels.cases import NUM_CLASSES, HeadProblem, TimedLoss

from bench.gpu_check.base import Device, Row, Task, not_installed
from bench.gpu_check.dequant_speed import flops_per_s
from bench.gpu_check.loss_model import TIMED
from bench.gpu_check.loss_rivals import Rival, implementation, make_problem, rival_of
from bench.gpu_check.roofline import CARD, gemm_flops
from bench.gpu_check.timing import Run, interleaved, reaches

# A row has ours and the rivals that need the same packages, so that a failure to compile or a lack of memory costs no other figure.
# The second part runs in its own process, because compiling may take a minute.
DENSE = "dense PyTorch"
AGAINST: dict[str, dict[str, tuple[str, ...]]] = {
    "first": {DENSE: (), "Liger": ("Liger", "Liger JSD", "Liger KLDiv")},
    "compiled": {"CuTe DSL": ("Liger CuTe", "QuACK"), "Liger, compiled by torch": ("Liger chunked JSD",)},
}
TIMED_S = 2.5
ROW_S = 6.0
AGREEMENT = 5e-2  # limit for gradients from logits that both sides round to 16 bits


def contestants(case: str, part: str, against: str) -> list[str]:
    """The contestants of a row for which the loss has targets."""
    timed = TIMED[case]
    names = (timed.plain.name,) if against == DENSE else AGAINST[part][against]
    return [name for name in names if name in timed.targets]


def rows_of(part: str) -> list[tuple[str, str]]:
    """(case, against): one row for each pair with a target, most important first."""
    return [(case, against) for against in AGAINST[part] for case in TIMED if contestants(case, part, against)]


def loss_speed(device: Device, part: str) -> Iterator[Task]:
    """part: ``first``, or ``compiled`` for rivals that take long to compile."""
    rows = [(case, against, (TIMED[case].tokens, TIMED[case].hidden, NUM_CLASSES)) for case, against in rows_of(part)]
    if device.dry:
        rows = [(case, against, (32, 64, 300)) for case, against, _ in rows if against != "Liger"]
    elif part == "first":
        rows += [(case, DENSE, shape) for case, timed in TIMED.items() for shape in timed.more]
    for case, against, shape in rows:
        what = {"case": f"{case}, forward + backward", "against": against, "shape": list(shape)}
        names = contestants(case, part, against)
        yield Task(what, partial(_loss_speed, device, TIMED[case], names, shape), seconds=ROW_S)


def _loss_speed(device: Device, case: TimedLoss, names: list[str], shape: tuple[int, int, int]) -> Row:
    problem = make_problem(device, case, shape)
    mine = case.make(problem)
    runs, states = {"peftlab": _run(problem, mine)}, {}
    want = torch.autograd.grad(mine(), problem.leaves)[
        0
    ]  # also makes cuBLAS allocate its workspace before bytes are counted
    peaks = {"peftlab": device.peak(lambda: runs["peftlab"](lambda phase: None))}
    for name in names:
        measured, states[name] = _tried(device, case, problem, rival_of(case, name), want)
        if measured is not None:
            runs[name], peaks[name] = measured
    del want
    if len(runs) == 1:
        why = "; ".join(f"{name}: {state}" for name, state in states.items())
        return {"not_run": why, "contestants": states, "ok": None}
    timed = interleaved(device, runs, seconds=TIMED_S)
    floor = 1e6 * _product_flops(case, problem) / flops_per_s(device)
    median = timed.times["peftlab"]["time"].median
    ratios = {name: timed.ratio(name, "peftlab", "time") for name in runs if name != "peftlab"}
    less = {name: peaks[name] / max(peaks["peftlab"], 1) for name in ratios}
    targets = {name: case.targets[name] for name in names} if device.has(CARD) and shape[2] == NUM_CLASSES else {}
    met = [_met(ratios[name], less[name], targets[name]) for name in ratios if name in targets]
    return {
        "us": {name: phases["time"] for name, phases in timed.spreads().items()},
        "rounds_us": timed.rounds(),
        "ratios": ratios,
        "extra_bytes": peaks,
        "times_less_memory": less,
        "contestants": states,
        "floor_us": floor,
        "over_floor": median / floor,
        "target": {name: list(pair) for name, pair in targets.items()} or None,
        "met": all(met) if met else None,
        "above_limit": not device.dry and median < 0.9 * floor,
        **timed.protocol(),
    }


def _run(problem: HeadProblem, loss: Callable[[], Any]) -> Run:
    return lambda mark: torch.autograd.grad(loss(), problem.leaves)


def _tried(
    device: Device, case: TimedLoss, problem: HeadProblem, rival: Rival, want: Any
) -> tuple[tuple[Run, int] | None, str]:
    """A contestant with the bytes that it needs, or None, and its state. It must work once and agree with ours."""
    if missing := not_installed(*rival.packages):
        return None, str(missing["not_run"])
    if not device.dry and device.shared["until"] - time.time() < ROW_S / 2:
        return None, "no time was left to try it"
    try:
        loss = rival.make(problem)
        run = _run(problem, loss)
        got = run(lambda phase: None)[0]
        if not case.stored:  # the rival's teacher is not a stored one
            factor = len(problem.x) if rival.mean else 1
            error = float((factor * got.double() - want.double()).norm() / want.double().norm())
            if not error <= AGREEMENT:
                return None, f"computes something else: its gradient is off by {error:.2g}"
        del got
        peak = device.peak(lambda: run(lambda phase: None))
        chosen = implementation(rival)
    except torch.OutOfMemoryError:
        device.release()
        return None, "out of memory"
    except Exception as error:  # of any kind: the other figures must still be measured
        device.release()
        return None, f"failed: {type(error).__name__}: {str(error)[:200]}"
    return (run, peak), f"measured, {chosen}" if chosen else "measured"


def _product_flops(case: TimedLoss, problem: HeadProblem) -> float:
    """FLOPs of the student's logits and dX, a trained head's dW, and the logits of an online teacher."""
    (num_tokens, hidden), vocab = problem.x.shape, len(problem.w)
    flops = (1 + len(problem.leaves)) * gemm_flops(num_tokens, vocab, hidden)
    if problem.tx is None or case.stored:
        return flops
    return flops + gemm_flops(num_tokens, vocab, problem.tx.shape[1])


def _met(ratio: Row, less: float, target: tuple[float, float | None]) -> bool:
    faster, smaller = target
    return bool(reaches(ratio, faster)) and (smaller is None or less >= smaller)
