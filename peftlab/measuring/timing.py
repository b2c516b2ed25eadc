"""Times several candidates in turns, and picks the fastest beyond noise."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from peftlab.measuring.intervals import quartiles

MIN_ROUNDS, MAX_ROUNDS = 5, 100
# Time limit per case and direction; MIN_ROUNDS take precedence.
LIMIT_S = {"cpu": 1.0, "cuda": 0.5}
WARM_UPS = {"cpu": 1, "cuda": 20}
# Maximum number of interleaved calls per round on a GPU.
_BLOCK = 30
FLUSH_BYTES = 256 * 2**20
MARGIN = 0.03
_CONFIDENCE = 0.95

Runs = Mapping[str, Callable[[], object]]
Times = dict[str, list[float]]


def measure(runs: Runs, device: str) -> Times:
    """Returns the milliseconds of each candidate per round; within a round they take turns, A B C A B C."""
    for _ in range(WARM_UPS[device]):
        for run in runs.values():
            run()
    calls = 1
    if device == "cuda":
        once_s = sum(time_round(runs, device, 1).values()) / 1000
        calls = max(1, min(_BLOCK, int(LIMIT_S[device] / MIN_ROUNDS / max(once_s, 1e-6))))
    times: Times = {name: [] for name in runs}
    started, rounds = time.monotonic(), 0
    while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.monotonic() - started < LIMIT_S[device]):
        for name, ms in time_round(runs, device, calls).items():
            times[name].append(ms)
        rounds += 1
    return times


def time_round(runs: Runs, device: str, calls: int) -> dict[str, float]:
    """Returns the median milliseconds of ``calls`` calls of each candidate, in turns."""
    clock = _cuda_times if device == "cuda" else _cpu_times
    return {name: statistics.median(ms) for name, ms in clock(runs, calls).items()}


def _cpu_times(runs: Runs, calls: int) -> Times:
    times: Times = {name: [] for name in runs}
    for _ in range(calls):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - started) * 1000)
    return times


def _cuda_times(runs: Runs, calls: int) -> Times:
    """Times calls on the GPU between two events. Overwriting the L2 cache before each call mimics the other layers of a model,
    and gives the CPU time to queue the call's kernels."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
    for _ in range(calls):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def fastest(times: Times, by_rule: str) -> str:
    """Returns the candidate with the smallest median among those at least ``MARGIN`` faster than ``by_rule`` beyond noise,
    else ``by_rule``.

    Beyond noise: by the 95 % confidence bound (order statistics) of the median ratio within a round.
    """
    better = [
        name
        for name in times
        if name != by_rule
        and _upper_bound([a / b for a, b in zip(times[name], times[by_rule], strict=True)]) <= 1 - MARGIN
    ]
    return min(better, key=lambda name: statistics.median(times[name]), default=by_rule)


def _upper_bound(values: list[float]) -> float:
    """Returns the upper 95 % confidence bound of the median: the largest of 5 values, the 58th of 100."""
    below, n = 0.0, len(values)
    for place, value in enumerate(sorted(values)):
        below += math.comb(n, place) / 2**n
        if below >= _CONFIDENCE:
            return value
    return math.inf


def spread(ms: list[float]) -> dict[str, float]:
    """Returns median and quartiles, for the table."""
    low, middle, high = quartiles(ms)
    return {"median": round(middle, 5), "low": round(low, 5), "high": round(high, 5)}
