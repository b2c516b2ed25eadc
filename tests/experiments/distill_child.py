"""A distillation in its own process that kills itself at a given moment, for ``test_arms``."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peftlab.api.distill import distill
from peftlab.distillation.cache import SplitWriter
from peftlab.experiments import arms as distilling
from peftlab.experiments import card_figures as comparing
from peftlab.experiments import student
from peftlab.training.progress import SilentProgress


def kill(*args: Any, **kwargs: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt(SilentProgress):
    """Kills the process after a step of the training with the given number."""

    def __init__(self, training: int, step: int) -> None:
        self._training, self._step, self._trainings = training, step, 0

    def stage(self, text: str) -> None:
        self._trainings += text.startswith("training for")

    def step(self, step: int, values: Any) -> None:
        if (self._trainings, step) == (self._training, self._step):
            kill()


def cutting() -> SilentProgress:
    """The student's weights are written, but its folder is not published yet."""

    def half(source: Any, cut: Any, folder: Path, **options: Any) -> None:
        partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"half")
        kill()

    student.make_student = half  # type: ignore[assignment]
    return SilentProgress()


def capturing() -> SilentProgress:
    right = SplitWriter.add

    def add(self: Any, key: int, target: Any) -> None:
        right(self, key, target)
        if self.done == 9:
            kill()

    SplitWriter.add = add  # type: ignore[method-assign]
    return SilentProgress()


def merging() -> SilentProgress:
    """The first training has the status finished, but its model is not merged yet."""
    distilling.merge_run = kill  # type: ignore[assignment]
    return SilentProgress()


def comparing_students() -> SilentProgress:
    distilling.compare_students = kill  # type: ignore[assignment]
    return SilentProgress()


def publishing() -> SilentProgress:
    distilling._publish_student = lambda arm, folder: ((folder / ".student.partial").mkdir(), kill())  # type: ignore[assignment, func-returns-value]
    return SilentProgress()


MOMENTS: dict[str, Callable[[], SilentProgress]] = {
    "cutting": cutting,
    "capturing": capturing,
    "first training": lambda: KillAt(1, 3),
    "merging": merging,
    "second training": lambda: KillAt(1, 1),  # the only training left
    "comparing": comparing_students,
    "publishing": publishing,
}


def run(folder: Path, recipe: Any, moment: str, *, resume: bool) -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.chdir(folder)
    comparing._TIMED_SECONDS = 0.05
    progress = MOMENTS[moment]()
    distill("run" if resume else recipe, resume=resume, progress=progress)
