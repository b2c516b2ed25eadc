"""What the parts of gpu-check share: the device, tasks that become rows, deadlines, interleaved timing."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
# A timed call: it calls ``mark(phase)`` at the end of each of its phases, or never if it has only one.
Run = Callable[[Callable[[str], None]], Any]
FLUSH_BYTES = 256 * 2**20  # more than any L2
CLOCK_HZ = 2e9  # about that of GPUs of these years
LONGEST_LEAD_S = 0.01


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        what: identifies its rows, whatever happens. run: gives the rest of a row, or of several.
        seconds: it is not begun when less time is left.
    """

    what: Row
    run: Callable[[], Row | list[Row]]
    seconds: float = 1.0


@dataclass(frozen=True)
class Section:
    """Rows of one kind.

    Attributes:
        group: sections of a group share a process, one after the other. source: module:function[:argument].
        needs: packages without which it is left out. seconds: at most. timing: runs alone, and on green rows only.
        gate: unfinished, it is red. asked: it takes so long that it runs only when --only names it.
    """

    name: str
    group: str
    source: str
    seconds: float
    needs: tuple[str, ...] = ()
    timing: bool = False
    gate: bool = False
    asked: bool = False


class Deadline:
    """A point in time that several processes can share."""

    def __init__(self, until: float) -> None:
        self.until = until

    def left(self) -> float:
        return self.until - time.time()

    def part(self, seconds: float) -> Deadline:
        return Deadline(min(self.until, time.time() + seconds))


@dataclass
class Device:
    """A CUDA device, or in a dry run the CPU with Triton's interpreter and shapes as small as they can be.

    Attributes:
        found: figures that later tasks of the same process need, such as the measured ceilings.
    """

    kind: str
    found: dict[Any, Any] = field(default_factory=dict)

    @property
    def dry(self) -> bool:
        return self.kind == "cpu"

    def pick(self, real: Any, dry: Any) -> Any:
        return dry if self.dry else real

    def backend(self, dtype: Any) -> str:
        """Triton, except for bfloat16 in its interpreter, which multiplies that wrongly (triton#11584)."""
        import torch

        return "torch" if self.dry and dtype == torch.bfloat16 else "triton"

    def randn(self, *size: int, seed: int, dtype: Any = None) -> Any:
        import torch

        generator = torch.Generator(self.kind).manual_seed(seed)
        return torch.randn(*size, generator=generator, device=self.kind).to(dtype or torch.float32)

    def synchronize(self) -> None:
        import torch

        if not self.dry:
            torch.cuda.synchronize()

    def now(self) -> Any:
        """A moment in the device's queue; two of them go into ``between_us``."""
        import torch

        if self.dry:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between_us(self, first: Any, second: Any) -> float:
        return 1e6 * (second - first) if self.dry else 1e3 * float(first.elapsed_time(second))

    def flush(self) -> None:
        """Takes the L2 away from whatever ran before."""
        import torch

        if "flush" not in self.found:
            self.found["flush"] = torch.empty(self.pick(FLUSH_BYTES, 1024), dtype=torch.uint8, device=self.kind)
        self.found["flush"].zero_()

    def allocated(self) -> int:
        import torch

        return 0 if self.dry else int(torch.cuda.memory_allocated())

    def peak(self, run: Callable[[], Any]) -> int:
        """Bytes that ``run`` needs at its highest beyond what was allocated before it; what it returns is dropped."""
        import torch

        if self.dry:
            run()
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - before

    def release(self) -> None:
        import torch

        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()

    def occupy(self, seconds: float) -> None:
        """Keeps the GPU waiting for about that long, so that what is launched meanwhile then runs without gaps."""
        import torch

        if seconds and not self.dry:
            torch.cuda._sleep(int(seconds * CLOCK_HZ))


@dataclass
class Times:
    """Microseconds of one contestant in one phase, by block."""

    blocks: list[list[float]] = field(default_factory=list)

    @property
    def all(self) -> list[float]:
        return [value for block in self.blocks for value in block]

    @property
    def median(self) -> float:
        return statistics.median(self.all)

    def spread(self) -> list[float]:
        """First quartile, median, third quartile."""
        values = self.all
        cut = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        return [float(f"{value:.5g}") for value in (cut[0], self.median, cut[2])]


@dataclass
class Comparison:
    """What ``interleaved`` measured: contestant -> phase -> times; ``both`` is the sum of several phases."""

    times: dict[str, dict[str, Times]]
    blocks: int
    per_block: int
    warmups: int

    def spreads(self) -> dict[str, dict[str, list[float]]]:
        return {name: {phase: t.spread() for phase, t in phases.items()} for name, phases in self.times.items()}

    def ratio(self, other: str, ours: str, phase: str) -> Row:
        """How many times as long ``other`` takes: of the medians, with the range over blocks."""
        a, b = self.times[other][phase], self.times[ours][phase]
        by_block = [statistics.median(x) / statistics.median(y) for x, y in zip(a.blocks, b.blocks, strict=True)]
        low, high = a.spread()[::2], b.spread()[::2]
        return {
            "ratio": round(a.median / b.median, 4),
            "range": [round(min(by_block), 4), round(max(by_block), 4)],
            "no_difference": low[0] <= high[1] and high[0] <= low[1],
        }

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
    least: int = 3,
) -> Comparison:
    """All contestants in one process on the same tensors: per block each in turn, ``per_block`` timed calls.

    ``per_block`` and ``warmups`` shrink (to no less than ``least``) where the whole would take more than ``seconds``.

    Args:
        flush: the L2 is overwritten before each call. ahead: the GPU waits before each call until it has been launched
            whole, so that the times are the GPU's, as within a step that keeps it busy; otherwise they are those of a
            call by itself, in which the GPU may wait for Python.
    """
    if device.dry:
        blocks, per_block, warmups, least = 2, 2, 1, 1
    times: dict[str, dict[str, Times]] = {name: {} for name in runs}
    before = _Before(device, flush, 0.0)
    round_s = launch_s = 0.0
    for _ in range(least):
        launch_s, started = 0.0, time.perf_counter()
        for run in runs.values():
            device.synchronize()
            before()
            launching = time.perf_counter()
            run(lambda phase: None)
            launch_s = max(launch_s, time.perf_counter() - launching)
        device.synchronize()
        round_s = time.perf_counter() - started
    if ahead:
        before.lead_s = min(1.5 * launch_s, LONGEST_LEAD_S)
        round_s += before.lead_s * len(runs)
    fits = int(seconds / max(round_s, 1e-6))
    warmups = max(min(warmups, fits // 8), least)
    per_block = max(min(per_block, (fits - warmups) // blocks), least)
    for _ in range(warmups - least):
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
    """What comes before every call."""

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
    found: dict[str, list[float]] = {}
    for marks in calls:
        for (_, start), (phase, end) in itertools.pairwise(marks):
            found.setdefault(phase, []).append(device.between_us(start, end))
        if len(marks) > 2:
            found.setdefault("both", []).append(device.between_us(marks[0][1], marks[-1][1]))
    for phase, values in found.items():
        times.setdefault(phase, Times()).blocks.append(values)


def relative(error: Any, want: Any) -> float:
    """|error| / |want|, or |error| where nothing is wanted."""
    return float(error.double().norm() / max(float(want.double().norm()), 1e-300))
