"""A student of stored targets trains without its teacher in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftlab import load_recipe
from peftlab.api import build, teachers
from peftlab.api.teachers import Teachers
from peftlab.api.teaching import capture_all, read_lesson
from peftlab.training.progress import SilentProgress

SETTINGS: dict[str, Any] = {
    "task": "causal_lm",
    "model": {"name": "tiny:llama"},
    "data": {
        "train": "package:peftlab.recipes/smoke.jsonl#20",
        "eval_rows": 4,
        "template": {"prompt": "{question}\n", "completion": "{answer}"},
    },
    "train": {"max_steps": 1},
    "run": {"device": "cpu"},
}


def test_its_columns_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distill = {"teacher": "tiny:llama", "cache": str(tmp_path / "cache"), "baseline": False}
    recipe = load_recipe({**SETTINGS, "distill": distill}).recipe
    lesson = read_lesson(recipe, SilentProgress())
    capture_all(lesson, SilentProgress())
    online = Teachers(recipe, SilentProgress()).columns(lesson.task)

    def loaded(*args: Any) -> Any:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(teachers, "open_teacher", loaded)
    stored = Teachers(recipe, SilentProgress())
    pretrained = build.pretrained_of(recipe)
    student = build.model_of(recipe, pretrained, lesson.task, "cpu")
    limit = build.limit_of(recipe, pretrained, lesson.task.tokenizer)
    loss = stored.loss(lesson.task, student, lesson.data, lesson.train, limit=limit)
    batch = lesson.task.collate(lesson.train.examples[:3], "cpu")
    assert abs(float(loss(student, batch))) < 1e-2  # it is its own teacher
    assert stored.columns(lesson.task) == online
