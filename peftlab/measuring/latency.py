"""How long one forward pass takes, of several models measured in turns.

Whole forward passes as a caller sees them, Python and launches included, unlike ``peftlab.measuring.timing``, which times
single ops between two events on the GPU with its cache emptied. What they share is that candidates take turns: a machine
that slows down for a second slows all of them. Here the order within a round is also drawn, because what ran before
leaves its weights in the cache.
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
        tokens_per_s: of the median; None where the batch's tokens were not given.
        speed, speed_low, speed_high: how many times as fast as the first model (2: half the time), as a ratio of medians
            with its 95 % interval over rounds; the bounds are None for the first model and below 5 rounds.
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
        """Its part of a report card; see ``evaluation.card_shape.Costs``."""
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
    """The time of each of ``runs``, with the ratio to the first.

    Rounds end after ``repeats`` or when the next one would pass ``seconds``, warm-up included; three are always taken.
    A round calls each model once, in random order, with the device idle before and after.

    Args:
        runs: by name, functions of no argument that run one forward over the same fixed batch, in evaluation mode and
            without gradients. The first is what the others are compared with.
        num_tokens: real tokens of that batch. device: where the models run; a GPU is waited for around each call.
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
    """Milliseconds of one call, until its device is done."""
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
