"""gpu-check: judges and times the rows of each op's cases.py, the same way for every op."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peftlab_kernels.cases import Check, Compared, Timing, cases_of

from bench.gpu_check.base import Device, Row, Task
from bench.gpu_check.timing import Run, interleaved


def checks_of(device: Device, op: str, *arguments: str) -> Iterator[Task]:
    for check in cases_of(op).checks(device, *arguments):
        yield Task(check.what, partial(_checked, check))


def _checked(check: Check) -> Row:
    worst, bad = (0.0, ""), []
    for shape in check.shapes:
        value, where = judge(check.compare(shape))
        worst = max(worst, (value, f"{where} at {check.names} = {list(shape)}"))
        if not value <= 1:
            bad.append({"shape": list(shape), "where": where, "by_limit": value})
    return {
        "shapes": len(check.shapes),
        "worst_by_limit": worst[0],
        "worst_at": worst[1],
        "bad": bad[:8],
        "ok": not bad,
    }


def judge(compared: Compared) -> tuple[float, str]:
    """The largest error divided by its limit, and where it is. Limits:

    - Root mean square: 1.1 x that of plain PyTorch in the same types. Largest: twice plain PyTorch's, so that one wrong element
      among millions shows.
    - Sums in float32, in any order: sqrt(terms) * 2^-24 of the result.
    - Both paths round intermediate numbers. With few of them the errors may differ by up to a rounding, with many they are
      equal: 2 / sqrt(rounded) roundings of the result.
    """
    worst, where = 0.0, ""
    eps = torch.finfo(next(iter(compared.actual.values())).dtype).eps
    slack = compared.terms**0.5 * 2**-24 + (eps * compared.rounded**-0.5 if compared.rounded else 0.0)
    for name, want in compared.want.items():
        if not bool(torch.isfinite(compared.actual[name]).all()):
            return float("inf"), f"{name} is not finite"
        ours, theirs = ((t[name].double() - want).abs() for t in (compared.actual, compared.plain))
        mean = float(ours.norm()) / (1.1 * float(theirs.norm()) + slack * float(want.norm()))
        largest = float(ours.max()) / (2 * float(theirs.max()) + 4 * slack * float(want.abs().max()))
        for value, which in ((mean, "rms"), (largest, "largest")):
            if not value <= worst:
                worst, where = value, f"{which} of {name}"
    return worst, where


def times_of(device: Device, op: str) -> Iterator[Task]:
    for timing in cases_of(op).times(device):
        yield Task(timing.what, partial(_timed, device, timing))


def _timed(device: Device, timing: Timing) -> Row:
    calls, details = timing.make()
    runs: dict[str, Run] = {name: _one_phase(call) for name, call in calls.items()}
    timed = interleaved(device, runs, seconds=timing.seconds, ahead=True)
    return {
        "us": {name: phases["time"] for name, phases in timed.spreads().items()},
        "rounds_us": timed.rounds(),
        "ratio": timed.ratio(*timing.ratio, "time"),
        **details,
        **timed.protocol(),
    }


def _one_phase(call: Any) -> Run:
    return lambda mark: call()
