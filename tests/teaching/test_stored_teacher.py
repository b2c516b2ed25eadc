"""A student of cached targets trains without its teacher in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftlab import load_recipe
from peftlab.assembly import Assembly
from peftlab.teaching.capture import capture_all, taught_examples
from peftlab.teaching.teacher import NamedTeacher
from peftlab.teaching.teachers import Teachers
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


def test_stored_teacher_takes_its_columns_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distill = {"teacher": "tiny:llama", "cache": str(tmp_path / "cache"), "baseline": False}
    assembly = Assembly(load_recipe({**SETTINGS, "distill": distill}), transfer=True)
    taught = taught_examples(assembly)
    capture_all(taught, SilentProgress())
    online = Teachers(assembly, SilentProgress()).columns()

    def loaded(*args: Any) -> Any:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(NamedTeacher, "open", loaded)
    stored = Teachers(assembly, SilentProgress())
    student = assembly.model()
    loss = stored.loss(assembly, student, taught.rows, taught.train)
    batch = assembly.task.collate(taught.train.examples[:3], "cpu")
    assert abs(float(loss(student, batch))) < 1e-2  # the student is its own teacher
    assert stored.columns() == online
