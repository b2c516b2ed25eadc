"""Shared runs: one training per recipe and files, and a message if a test changes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import trained_runs
from tests.trained_runs import TrainedRuns


def test_trained_run_is_made_once_for_the_same_recipe_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings: list[Any] = []

    def train(document: Any, **_: Any) -> None:
        trainings.append(document)
        Path(document["run"]["dir"]).mkdir()
        Path("run/weights").write_text("1")

    monkeypatch.setattr(trained_runs.peftlab, "train", train)
    document = {"train": {"lr": 1}, "run": {"device": "cpu"}}
    first, second = TrainedRuns(tmp_path), TrainedRuns(tmp_path)  # like two workers
    folder = first(document, lambda at: (at / "data.csv").write_text("a"))
    assert (
        second({**document, "run": {"device": "cpu", "dir": "teacher"}}, lambda at: (at / "data.csv").write_text("a"))
        == folder
    )
    assert trainings == [{"train": {"lr": 1}, "run": {"device": "cpu", "dir": "run"}}]
    assert (folder / "data.csv").read_text() == "a" and (folder / "run/weights").exists()
    assert first(document, lambda at: (at / "data.csv").write_text("b")) != folder
    assert second({**document, "train": {"lr": 2}}, lambda at: (at / "data.csv").write_text("a")) != folder
    assert len(trainings) == 3 and not list(tmp_path.glob("draft*"))
    first.check()
    (folder / "run/weights").write_text("2")
    for runs in (first, second):
        with pytest.raises(AssertionError, match=r"changed a shared run instead of a copy: .*'run/weights'"):
            runs.check()
