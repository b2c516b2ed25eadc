"""gpu-check: times contestants in turn on the device's own clock, and computes ratios."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.gpu_check.base import Device, Row
from peftlab.bench.summary import ratio
from peftlab.measuring.intervals import quartiles, ratio_of_medians

# A timed call. It calls ``mark(phase)`` at the end of each phase, or never if it has only one.
Run = Callable[[Callable[[str], None]], Any]
LONGEST_LEAD_S = 0.01


def compared(above: Sequence[float], below: Sequence[float]) -> Row:
    """The ratio of the medians, with its interval over blocks. ``differs`` is false if the interval contains 1."""
    return ratio(ratio_of_medians(above, below))


def reaches(measured: Row, target: float | None) -> bool | None:
    """Whether a ratio reaches its target beyond noise; None without a target."""
    return None if target is None else measured["value"] >= target and measured["differs"] is not False


@dataclass
class Times:
    """Microseconds of one contestant in one phase, by block."""

    blocks: list[list[float]] = field(default_factory=list)

    @property
    def all(self) -> list[float]:
        return [value for block in self.blocks for value in block]

    @property
    def median(self) -> float:
        return quartiles(self.all)[1]

    @property
    def medians(self) -> list[float]:
        """Medians per block."""
        return [quartiles(block)[1] for block in self.blocks]

    def spread(self) -> list[float]:
        """First quartile, median and third quartile of the calls."""
        return [_short(value) for value in quartiles(self.all)]


@dataclass
class Comparison:
    """Result of ``interleaved``: contestant -> phase -> times. ``both`` is the sum of several phases."""

    times: dict[str, dict[str, Times]]
    blocks: int
    per_block: int
    warmups: int

    def spreads(self) -> dict[str, dict[str, list[float]]]:
        return {name: {phase: t.spread() for phase, t in phases.items()} for name, phases in self.times.items()}

    def rounds(self) -> dict[str, dict[str, list[float]]]:
        """The median of each block; the intervals are computed from them."""
        return {
            name: {phase: [_short(value) for value in t.medians] for phase, t in phases.items()}
            for name, phases in self.times.items()
        }

    def ratio(self, other: str, ours: str, phase: str) -> Row:
        """How many times as long the other contestant takes."""
        return compared(self.times[other][phase].medians, self.times[ours][phase].medians)

    def fastest(self, names: Sequence[str], phase: str) -> str:
        return min(names, key=lambda name: self.times[name][phase].median)

    def protocol(self) -> Row:
        return {"blocks": self.blocks, "per_block": self.per_block, "warmups": self.warmups}


def interleaved(
    device: Device,
    runs: dict[str, Run],
    *,
    seconds: float,
    flush: bool = False,
    ahead: bool = False,
    blocks: int = 5,
    per_block: int = 30,
    warmups: int = 20,
) -> Comparison:
    """Times all contestants in one process on the same tensors: in each block every one in turn, ``per_block`` timed calls.

    ``per_block`` and ``warmups`` shrink, down to one, if the total would exceed ``seconds``. For calls of a tenth of a second
    a few are as good as many, since each block has its own median.

    Args:
        flush: the L2 is overwritten before each call. ahead: the GPU waits until a call is launched completely, so that the
            times are the GPU's, as within a step that keeps it busy. Otherwise they are those of single calls, in which the
            GPU may wait for Python.
    """
    if device.dry:
        blocks, per_block, warmups = 2, 2, 1
    times: dict[str, dict[str, Times]] = {name: {} for name in runs}
    before = _Before(device, flush, 0.0)
    began = time.perf_counter()
    round_s = launch_s = 0.0
    done = 0
    while not done or (done < min(warmups, 3) and time.perf_counter() - began < seconds / 8):
        launch_s, started = 0.0, time.perf_counter()
        for run in runs.values():
            device.synchronize()
            before()
            launching = time.perf_counter()
            run(lambda phase: None)
            launch_s = max(launch_s, time.perf_counter() - launching)
        device.synchronize()
        round_s = time.perf_counter() - started
        done += 1
    if ahead:
        before.lead_s = min(1.5 * launch_s, LONGEST_LEAD_S)
        round_s += before.lead_s * len(runs)
    fits = int(seconds / max(round_s, 1e-6))
    warmups = max(done, min(warmups, fits // 8))
    per_block = max(1, min(per_block, (fits - warmups) // blocks))
    for _ in range(warmups - done):
        for run in runs.values():
            run(lambda phase: None)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(blocks):
            for name, run in runs.items():
                _block(device, run, times[name], per_block, before)
    finally:
        if collecting:
            gc.enable()
    return Comparison(times, blocks, per_block, warmups)


@dataclass
class _Before:
    """Runs before every call."""

    device: Device
    flush: bool
    lead_s: float

    def __call__(self) -> None:
        self.device.occupy(self.lead_s)
        if self.flush:
            self.device.flush()


def _block(device: Device, run: Run, times: dict[str, Times], per_block: int, before: Callable[[], None]) -> None:
    calls = []
    for _ in range(per_block):
        before()
        marks: list[tuple[str, Any]] = [("", device.now())]

        def mark(phase: str, marks: list[tuple[str, Any]] = marks) -> None:
            marks.append((phase, device.now()))

        run(mark)
        if len(marks) == 1:
            mark("time")
        calls.append(marks)
    device.synchronize()
    durations: dict[str, list[float]] = {}
    for marks in calls:
        for (_, start), (phase, end) in itertools.pairwise(marks):
            durations.setdefault(phase, []).append(device.between_us(start, end))
        if len(marks) > 2:
            durations.setdefault("both", []).append(device.between_us(marks[0][1], marks[-1][1]))
    for phase, values in durations.items():
        times.setdefault(phase, Times()).blocks.append(values)


def _short(value: float) -> float:
    return float(f"{value:.5g}")
