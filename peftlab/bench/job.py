"""The job of a benchmark process, and the figures it records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftlab.assembly import Assembly
from peftlab.data import BatchPlan
from peftlab.measuring.energy import find_meter
from peftlab.measuring.stopwatch import Stopwatch
from peftlab.recipe import Recipe
from peftlab.tasks import Example, Task
from peftlab.training.progress import SilentProgress


@dataclass
class Job:
    """A cell ready to run. ``rows``: examples of equal length, ``batch`` per step; plan: None for generation."""

    spec: Mapping[str, Any]
    assembly: Assembly
    accelerator: Any
    task: Task
    model: Any
    planned: list[str]
    rows: list[Example]
    plan: BatchPlan

    @property
    def recipe(self) -> Recipe:
        return self.assembly.recipe

    @property
    def device(self) -> str:
        return str(self.accelerator.device.type)


class Timing(SilentProgress):
    """Records times, losses and energy of the loop."""

    def __init__(self, device: str) -> None:
        self.watch, self.losses, self.micro_batches = Stopwatch(device), list[float](), 0
        self.joules: list[float | None] = []
        self._meter, _ = find_meter(device)

    def start(self, total_steps: int, first_step: int = 0) -> None:
        self.watch.begin()

    def step(self, step: int, values: Mapping[str, float | None]) -> None:
        self.watch.tick()
        self.joules.append(self._meter.read() if self._meter else None)
        self.losses.append(float(values["loss"] or 0.0))
        self.micro_batches = int(values["micro_batches"] or 0)
        self.watch.end()  # do not count what follows the last step
