"""Settings that never take effect, because the run is too short."""

from __future__ import annotations

from typing import Any

import pytest

from peftlab.assembly.plan import plan_notes
from peftlab.recipe import load_recipe


def notes(total_steps: int, **sections: Any) -> list[str]:
    base = {"task": "seq_cls", "model": {"name": "tiny:bert"}, "data": {"train": "a.csv"}}
    return [f"{key}: {text}" for key, text in plan_notes(load_recipe({**base, **sections}).recipe, total_steps)]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"train": {"warmup": 100, "lr": 0.1}},
            "train.warmup: a warm-up of 100 steps, but the run has 10 steps: the learning rate ends at 0.0099 and never reaches 0.1",
        ),
        (
            {"eval": {"every": 11}},
            "eval.every: every 11 steps, but the run has 10 steps: it is evaluated at its end only",
        ),
        (
            {"eval": {"every": 11, "best": "loss"}},
            "eval.every: every 11 steps, but the run has 10 steps: it is evaluated at its end only; eval.best compares nothing "
            "but the last step (loss)",
        ),
        (
            {"eval": {"every": 2, "best": "loss", "patience": 4}},
            "eval.patience: 4 evaluations every 2 steps, but the run has 10 steps: it never stops early",
        ),
        (
            {"run": {"save_every": 10}},
            "run.save_every: every 10 steps, but the run has 10 steps: no checkpoint is saved, so a killed run starts over",
        ),
    ],
)
def test_plan_notes_name_what_never_happens(sections: dict[str, Any], message: str) -> None:
    assert notes(10, **sections) == [message]


def test_plan_notes_are_empty_for_settings_that_fit() -> None:
    fitting = {"train": {"warmup": 9}, "eval": {"every": 2, "best": "loss", "patience": 3}, "run": {"save_every": 9}}
    assert notes(10, **fitting) == []
    assert notes(10, train={"warmup": 0.5}, eval={"every": 10}) == []
    assert "the run has 1 step:" in notes(1, train={"warmup": 1})[0]
