"""Shared by all parts of gpu-check: the device, tasks that become rows, deadlines."""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
CLOCK_HZ = 2e9  # roughly the clock of current GPUs


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        what: identifies its rows. run: returns the rest of a row.
        seconds: it does not start if less time is left. makes: later tasks of the section need its objects in memory, so
            ``--resume`` runs it again if one of them still has to be measured.
    """

    what: Row
    run: Callable[[], Row]
    seconds: float = 1.0
    makes: bool = False


@dataclass(frozen=True)
class Section:
    """Rows of one kind.

    Attributes:
        group: sections of a group run in one process, one after the other. source: module:function[:argument].
        seconds: time limit. least: seconds reserved for it while earlier sections run.
        wave: lower waves end first. Within a wave correctness runs in parallel, then timing group by group.
        needs: packages without which it is skipped. uses: packages without which only some of its rows are skipped.
        timing: it runs alone. stands_on: sections that must be green before it is timed, and for its figures to count.
        only_by_name: it takes so long that it runs only when --only names it.
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
    only_by_name: bool = False


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
    """A CUDA device, or in a dry run the CPU with Triton's interpreter and the smallest possible shapes.

    Attributes:
        shared: objects that later tasks of the same process need, such as models. rows: earlier measurements, of this
            process or of a resumed journal.
    """

    kind: str
    shared: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def dry(self) -> bool:
        return self.kind == "cpu"

    def pick(self, real: Any, dry: Any) -> Any:
        return dry if self.dry else real

    def has(self, card: str) -> bool:
        """Whether it is a GPU with this name, such as ``H200``."""
        import torch

        return not self.dry and card in torch.cuda.get_device_name()

    def row_of(self, **task: Any) -> Row | None:
        """The green row of the task with these values."""
        fitting = (r for r in reversed(self.rows) if r["ok"] and task.items() <= r["task"].items())
        return next(fitting, None)

    def backend(self, dtype: Any) -> str:
        """Triton, except for bfloat16 in its interpreter, which multiplies it wrongly (triton#11584)."""
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
        """A point in the device's queue; ``between_us`` takes two of them."""
        import torch

        if self.dry:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between_us(self, first: Any, second: Any) -> float:
        return 1e6 * (second - first) if self.dry else 1e3 * float(first.elapsed_time(second))

    def flush(self) -> None:
        """Overwrites the L2, so that nothing of earlier work is cached."""
        import torch

        from peftlab.measuring.timing import FLUSH_BYTES

        if "flush" not in self.shared:
            self.shared["flush"] = torch.empty(self.pick(FLUSH_BYTES, 1024), dtype=torch.uint8, device=self.kind)
        self.shared["flush"].zero_()

    def allocated(self) -> int:
        import torch

        return 0 if self.dry else int(torch.cuda.memory_allocated())

    def peak(self, run: Callable[[], Any]) -> int:
        """Peak bytes that ``run`` needs beyond those allocated before it. Its result is dropped."""
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
        """Keeps the GPU busy for about that long, so that work launched meanwhile then runs without gaps."""
        import torch

        if seconds and not self.dry:
            torch.cuda._sleep(int(seconds * CLOCK_HZ))


def lacking(*packages: str) -> list[str]:
    """The packages that cannot be imported."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def not_installed(*packages: str) -> Row | None:
    """The row of a task that needs these packages if one of them is missing, else None."""
    missing = lacking(*packages)
    return {"not_run": f"not installed: {', '.join(missing)}", "ok": None} if missing else None


def relative(error: Any, want: Any) -> float:
    """|error| / |want|, or |error| where ``want`` is zero."""
    return float(error.double().norm() / max(float(want.double().norm()), 1e-300))
