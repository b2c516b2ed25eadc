"""Measures times and memory of repeated work, such as training steps."""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftlab.measuring.memory import memory_bytes, peak_memory_bytes


@dataclass
class Stopwatch:
    """Call ``begin`` right before the first step, ``tick`` after each, ``end`` after the last.

    Attributes:
        times, cpu_times: wall-clock and processor seconds at the end of each step.
        load_peak_bytes: peak before ``begin``; before_bytes: in use at ``begin``; peak_bytes: peak since.
        reserved_bytes: peak reserved by CUDA's allocator; 0 on a CPU.
    """

    device: str = "cpu"
    times: list[float] = field(default_factory=list)
    cpu_times: list[float] = field(default_factory=list)
    before_bytes: int = 0
    load_peak_bytes: int = 0
    peak_bytes: int = 0
    reserved_bytes: int = 0

    def begin(self) -> None:
        self.before_bytes, self.load_peak_bytes = memory_bytes(self.device), peak_memory_bytes(self.device)
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            return
        # 5 resets the kernel's peak, so that the peak of loading does not hide that of training.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def tick(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.cpu_times.append(time.process_time())

    def end(self) -> None:
        self.peak_bytes = peak_memory_bytes(self.device)
        if self.device == "cuda":
            import torch

            self.reserved_bytes = int(torch.cuda.max_memory_reserved())

    def step_seconds(self, warm_up: int = 1) -> list[float]:
        """Returns the seconds of each step after the first ``warm_up``, from the end of the previous step."""
        used = self.times[warm_up - 1 :]
        return [round(b - a, 6) for a, b in itertools.pairwise(used)]

    def memory(self) -> dict[str, Any]:
        return {
            "load_peak_bytes": self.load_peak_bytes,
            "before_bytes": self.before_bytes,
            "peak_bytes": self.peak_bytes,
            "increase_bytes": max(0, self.peak_bytes - self.before_bytes),
            "reserved_bytes": self.reserved_bytes,
        }
