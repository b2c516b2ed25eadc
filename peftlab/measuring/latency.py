"""Times the forward passes of several models in turns.

Times whole forward passes, including Python and launches. ``peftlab.measuring.timing`` instead times single ops between two
GPU events with a flushed cache. In both, candidates take turns, so that a slowdown of the machine affects all of them. Here
the order within a round is random too, because each model leaves its weights in the cache.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from peftlab.measuring.intervals import quartiles, ratio_of_medians

# With fewer rounds the median ratio gets no interval.
_MIN_ROUNDS_FOR_INTERVAL = 5
_MIN_ROUNDS = 3


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass over the fixed batch.

    Attributes:
        median_ms, low_ms, high_ms: median and quartiles over ``num_rounds`` rounds.
        tokens_per_s: at the median; None if the batch's tokens are unknown.
        speed, speed_low, speed_high: speed relative to the first model (2: half the time), as a ratio of medians with its
            95 % interval over rounds; the bounds are None for the first model and below 5 rounds.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    num_rounds: int
    tokens_per_s: float | None
    speed: float
    speed_low: float | None
    speed_high: float | None

    def costs(self) -> dict[str, Any]:
        """Returns the entries for a report card; see ``evaluation.card_shape.Costs``."""
        return {
            "latency_ms": self.median_ms,
            "latency_low_ms": self.low_ms,
            "latency_high_ms": self.high_ms,
            "tokens_per_s": self.tokens_per_s,
            "speed": {
                "value": self.speed,
                "low": self.speed_low,
                "high": self.speed_high,
                "over": "rounds",
                "n": self.num_rounds,
            },
        }


def measure_latency(
    runs: Mapping[str, Callable[[], object]],
    *,
    num_tokens: int | None = None,
    device: str | torch.device = "cpu",
    warmup: int = 2,
    repeats: int = 50,
    seconds: float = 20.0,
    seed: int = 0,
) -> dict[str, Latency]:
    """Measures the time of each of ``runs``, and its ratio to the first.

    Measuring ends after ``repeats`` rounds, or if the next would exceed ``seconds``, including warm-up; but not before three.
    A round calls each model once, in random order, with the device idle before and after.

    Args:
        runs: name -> function without arguments that runs one forward over the same fixed batch, in evaluation mode and
            without gradients. The others are compared with the first.
        num_tokens: real tokens of that batch. device: the models' device; a GPU is synchronized around each call.
        warmup: untimed calls of each model. seconds: of wall time.
    """
    if not runs or warmup < 0 or repeats < _MIN_ROUNDS:
        raise ValueError(
            f"expected runs, warmup >= 0 and repeats >= {_MIN_ROUNDS}, found {len(runs)}, {warmup}, {repeats}"
        )
    device = torch.device(device)
    started = time.perf_counter()
    order, shuffle = list(runs), random.Random(seed)
    for name in order * warmup:
        _once(runs[name], device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    longest = 0.0
    for taken in range(repeats):
        round_started = time.perf_counter()
        if taken >= _MIN_ROUNDS and round_started - started + longest > seconds:
            break
        shuffle.shuffle(order)
        for name in order:
            times[name].append(_once(runs[name], device))
        longest = max(longest, time.perf_counter() - round_started)
    first = times[next(iter(runs))]
    return {name: _summary(ms, first, num_tokens, seed) for name, ms in times.items()}


def _once(run: Callable[[], object], device: torch.device) -> float:
    """Returns the milliseconds of one call, until its device is idle."""
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return (time.perf_counter() - started) * 1000


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(ms: list[float], first: list[float], num_tokens: int | None, seed: int) -> Latency:
    low, median, high = quartiles(ms)
    speed = ratio_of_medians(first, ms, min_rounds=_MIN_ROUNDS_FOR_INTERVAL, seed=seed)
    bounds = (None, None) if ms is first else (speed.low, speed.high)
    return Latency(
        median_ms=median,
        low_ms=low,
        high_ms=high,
        num_rounds=len(ms),
        tokens_per_s=None if num_tokens is None else num_tokens / median * 1000,
        speed=speed.value,
        speed_low=bounds[0],
        speed_high=bounds[1],
    )
