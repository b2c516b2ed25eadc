"""Recipes, data and progress of runs on tiny models, shared by several test folders."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from typing import Any

from peftlab.training.progress import SilentProgress

COLOURS = {"red": "colour", "green": "colour", "blue": "colour", "cat": "animal", "dog": "animal", "cow": "animal"}


def write_data(folder: Path) -> None:
    with (folder / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["word", "kind", "text"])
        for i in range(8):
            for word, kind in COLOURS.items():
                writer.writerow([f"{word} {i}", kind, f"{word} {i}"])


def recipe(task: str = "causal_lm", **sections: Any) -> dict[str, Any]:
    data = {"train": "data.csv", "eval_rows": 12}
    base: dict[str, Any] = {
        "causal_lm": {
            "model": {"name": "tiny:llama"},
            "data": {**data, "template": {"user": "{word}", "assistant": "{kind}"}},
            "eval": {"choices": ["animal", "colour"]},
        },
        "seq_cls": {
            "model": {"name": "tiny:bert"},
            "data": {**data, "columns": {"text": "text", "label": "kind"}},
        },
    }[task]
    base |= {
        "task": task,
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "train": {"max_steps": 6, "batch_size": 8, "lr": 1e-2},
        "run": {"dir": "run"},
    }
    for name, changes in sections.items():
        base[name] = {**base.get(name, {}), **changes}
    return base


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Notes(SilentProgress):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


class Stopper(SilentProgress):
    """Presses Ctrl-C after a step."""

    def __init__(self, at: int) -> None:
        self._at = at

    def step(self, step: int, values: Any) -> None:
        if step == self._at:
            os.kill(os.getpid(), signal.SIGINT)
