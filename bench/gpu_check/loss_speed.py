"""gpu-check: the fused linear losses against dense PyTorch, Liger and QuACK, and the floor of their products."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from bench.gpu_check.base import Device, Row, Task, not_installed
from bench.gpu_check.dequant_speed import flops_per_s
from bench.gpu_check.loss_model import CE_FROZEN, CE_TRAINED, CLASSES, JSD, KL, SHAPES, TARGETS, TOP
from bench.gpu_check.loss_rivals import RIVALS, Problem, Rival, implementation, make_problem, ours
from bench.gpu_check.roofline import CARD, gemm_flops
from bench.gpu_check.timing import Run, interleaved, reaches

# A row is ours beside those that need the same packages: what they compile, or run out of, costs no other figure.
AGAINST: dict[str, tuple[str, ...]] = {
    "dense PyTorch": ("full logits", "lean KL", "JSD + CE"),
    "Liger": ("Liger", "Liger JSD", "Liger KLDiv"),
    "CuTe DSL": ("Liger CuTe", "QuACK"),
    "Liger, compiled by torch": ("Liger chunked JSD",),
}
ROWS = {
    "first": [
        *((case, "dense PyTorch") for case in (CE_FROZEN, CE_TRAINED, KL, JSD, TOP)),
        *((case, "Liger") for case in (CE_TRAINED, KL)),
    ],
    # In a process of its own: a compiler may take a minute.
    "compiled": [(CE_TRAINED, "CuTe DSL"), *((case, "Liger, compiled by torch") for case in (KL, JSD, TOP))],
}
SMALL_SHAPE = (4096, 576, 49152)  # of SmolLM2
TIMED_S = 2.5
ROW_S = 6.0
AGREEMENT = 5e-2  # of gradients from logits that are rounded to 16 bits on either side


def loss_speed(device: Device, part: str) -> Iterator[Task]:
    """part: ``first``, most important first, or those against what is ``compiled`` at length."""
    rows = [(case, against, (*SHAPES[case], CLASSES)) for case, against in ROWS[part]]
    rows += [(CE_FROZEN, "dense PyTorch", SMALL_SHAPE)] if part == "first" else []
    if device.dry:
        rows = [(case, against, (32, 64, 300)) for case, against in ROWS[part] if against != "Liger"]
    for case, against, shape in rows:
        what = {"case": f"{case}, forward + backward", "against": against, "shape": list(shape)}
        yield Task(what, partial(_loss_speed, device, case, against, shape), seconds=ROW_S)


def _loss_speed(device: Device, case: str, against: str, shape: tuple[int, int, int]) -> Row:
    import torch

    problem = make_problem(device, case, shape)
    mine = ours(problem)
    runs, states = {"peftlab": _run(problem, mine)}, {}
    want = torch.autograd.grad(mine(), problem.leaves)[0]  # and cuBLAS takes its workspace before bytes are counted
    peaks = {"peftlab": device.peak(lambda: runs["peftlab"](lambda phase: None))}
    chosen = [name for name in AGAINST[against] if name in TARGETS[case]]
    for name in chosen:
        found, states[name] = _tried(device, problem, RIVALS[name], want)
        if found is not None:
            runs[name], peaks[name] = found
    del want
    if len(runs) == 1:
        why = "; ".join(f"{name}: {state}" for name, state in states.items())
        return {"not_run": why, "contestants": states, "ok": None}
    timed = interleaved(device, runs, seconds=TIMED_S)
    floor = 1e6 * _product_flops(problem) / flops_per_s(device)
    median = timed.times["peftlab"]["time"].median
    ratios = {name: timed.ratio(name, "peftlab", "time") for name in runs if name != "peftlab"}
    less = {name: peaks[name] / max(peaks["peftlab"], 1) for name in ratios}
    targets = {name: TARGETS[case][name] for name in chosen} if device.has(CARD) and shape[2] == CLASSES else {}
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


def _run(problem: Problem, loss: Callable[[], Any]) -> Run:
    import torch

    return lambda mark: torch.autograd.grad(loss(), problem.leaves)


def _tried(device: Device, problem: Problem, rival: Rival, want: Any) -> tuple[tuple[Run, int] | None, str]:
    """A contestant with the bytes that it needs, after it has worked once and agrees with ours, and what became of it."""
    import torch

    if missing := not_installed(*rival.packages):
        return None, str(missing["not_run"])
    if not device.dry and device.found["until"] - time.time() < ROW_S / 2:
        return None, "no time was left to try it"
    try:
        loss = rival.make(problem)
        run = _run(problem, loss)
        got = run(lambda phase: None)[0]
        if problem.case != TOP:  # there the teacher is not a stored one
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
    except Exception as error:  # of any kind: the other figures are worth having too
        device.release()
        return None, f"failed: {type(error).__name__}: {str(error)[:200]}"
    return (run, peak), f"measured, {chosen}" if chosen else "measured"


def _product_flops(problem: Problem) -> float:
    """The student's logits and dX, dW of a trained head, the logits of a teacher that is asked."""
    (num_tokens, hidden), vocab = problem.x.shape, len(problem.w)
    flops = (1 + len(problem.leaves)) * gemm_flops(num_tokens, vocab, hidden)
    asked = problem.distils and problem.case != TOP
    return flops + (gemm_flops(num_tokens, vocab, problem.tx.shape[1]) if asked else 0.0)


def _met(ratio: Row, less: float, target: tuple[float, float | None]) -> bool:
    faster, smaller = target
    return bool(reaches(ratio, faster)) and (smaller is None or less >= smaller)
