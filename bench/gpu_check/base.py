"""What the parts of gpu-check share: the device, tasks that become rows, deadlines."""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
CLOCK_HZ = 2e9  # about that of GPUs of these years


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        what: identifies its rows, whatever happens. run: gives the rest of a row.
        seconds: it is not begun when less time is left. makes: what later tasks of the section need in memory, so that
            it is done again with ``--resume`` when one of them is still to be measured.
    """

    what: Row
    run: Callable[[], Row]
    seconds: float = 1.0
    makes: bool = False


@dataclass(frozen=True)
class Section:
    """Rows of one kind.

    Attributes:
        group: sections of a group share a process, one after the other. source: module:function[:argument].
        seconds: at most. least: so many are kept for it while those before it run.
        wave: all of a lower one end first; within one, correctness runs side by side, then timing group by group.
        needs: packages without which it is left out. uses: packages without which only some of its rows are not run.
        timing: it runs alone. stands_on: sections that must be green before it is timed, and for its figures to count.
        asked: it takes so long that it runs only when --only names it.
    """

    name: str
    group: str
    source: str
    seconds: float
    wave: int = 1
    least: float = 0.0
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    timing: bool = False
    stands_on: tuple[str, ...] = ()
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
        found: objects that later tasks of the same process need, such as models. rows: what was measured before, in this
            process or in one whose journal is gone on with.
    """

    kind: str
    kept: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def dry(self) -> bool:
        return self.kind == "cpu"

    def pick(self, real: Any, dry: Any) -> Any:
        return dry if self.dry else real

    def has(self, card: str) -> bool:
        """Whether it is a GPU of this name, such as ``H200``."""
        import torch

        return not self.dry and card in torch.cuda.get_device_name()

    def row_of(self, **task: Any) -> Row | None:
        """The green row of the task that has these values."""
        fitting = (r for r in reversed(self.rows) if r["ok"] and task.items() <= r["task"].items())
        return next(fitting, None)

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

        from peftlab.measuring.timing import FLUSH_BYTES

        if "flush" not in self.kept:
            self.kept["flush"] = torch.empty(self.pick(FLUSH_BYTES, 1024), dtype=torch.uint8, device=self.kind)
        self.kept["flush"].zero_()

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


def lacking(*packages: str) -> list[str]:
    """Those that cannot be imported."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def not_installed(*packages: str) -> Row | None:
    """The row of a task that needs these packages where one of them is missing."""
    missing = lacking(*packages)
    return {"not_run": f"not installed: {', '.join(missing)}", "ok": None} if missing else None


def relative(error: Any, want: Any) -> float:
    """|error| / |want|, or |error| where nothing is wanted."""
    return float(error.double().norm() / max(float(want.double().norm()), 1e-300))
