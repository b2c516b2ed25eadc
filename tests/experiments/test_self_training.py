"""Self-training: rounds, counts, held-out rows that stay out, and a resume in every round."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from run_examples import Notes

import peftlab
from peftlab.assembly import Assembly
from peftlab.errors import DataError, Interrupted, RecipeError
from peftlab.experiments.self_training import balanced
from peftlab.experiments.unlabelled import find_unlabelled
from peftlab.recipe import load_recipe
from peftlab.training.progress import SilentProgress

WORDS = {"good": "pos", "bad": "neg"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = [{"text": f"{word} {i}", "label": label} for i in range(30) for word, label in WORDS.items()]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(folder: str = "run", **self_training: Any) -> dict[str, Any]:
    return {
        "task": "seq_cls",
        "model": {"name": "tiny:bert"},
        "adapter": {"rank": 4, "dropout": 0.1},
        "data": {"train": "all.jsonl#4-per-class", "eval_rows": 12},
        "train": {
            "max_steps": 4,
            "batch_size": 4,
            "lr": 1e-2,
            "self_training": {"unlabelled": "all.jsonl", "confidence": 0.51, **self_training},
        },
        "run": {"dir": folder, "save_every": 2, "merge": "original"},
    }


class StopAfter(SilentProgress):
    """Presses Ctrl-C after this many steps of all rounds together."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def step(self, step: int, values: Any) -> None:
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGINT)


def weights(folder: str) -> bytes:
    return Path(folder, "adapter/adapter_model.safetensors").read_bytes()


def test_rounds_are_counted_and_resume_to_the_same_bytes(here: Path) -> None:
    notes = Notes()
    run = peftlab.train(recipe(), progress=notes)
    report = run.summary["self_training"]
    # 60 rows: 12 are held out and 8 are labelled; all the others have a label in the file.
    assert report["unlabelled"] == {"rows": 60, "held_out": 12, "labelled": 8, "unusable": 0, "kept": 40}
    assert [r["round"] for r in report["rounds"]] == [0, 1, 2]
    for one in report["rounds"][1:]:
        labels = json.loads((here / f"run/rounds/{one['round']}/labels.json").read_text())
        assert one["rows"] == len(labels) == sum(one["per_class"].values()) == one["known"]
        assert one["training_rows"] == 8 + one["rows"]
        assert min(probability for _, _, probability in labels) >= 0.51
    assert report["rounds"][-1]["metrics"] == run.summary["after"]
    assert any("60 rows (12 are held-out rows, 8 are training rows; left out)" in line for line in notes.lines)
    assert run.summary["merge"]["verified"] and (here / "run/merged/model.safetensors").is_file()
    again = peftlab.evaluate("run", progress=SilentProgress())["metrics"]
    assert again["loss"] == pytest.approx(run.summary["after"]["loss"], rel=1e-5)
    for steps in (3, 6, 11):  # in each round, after a checkpoint
        with pytest.raises(Interrupted, match="peftlab train stopped --resume"):
            peftlab.train(recipe("stopped"), progress=StopAfter(steps), replace=True)
        peftlab.train("stopped", resume=True, progress=SilentProgress())
        assert weights("stopped") == weights("run")
    with pytest.raises(RecipeError, match="the run is finished"):
        peftlab.train("stopped", resume=True, progress=SilentProgress())


def assembly() -> Assembly:
    return Assembly(load_recipe(recipe(rounds=1)))


def test_the_rows_that_join_are_no_held_out_and_no_labelled_rows(here: Path) -> None:
    found, data = find_unlabelled(assembly()), assembly().data
    texts = set(found.rows.columns["text"])
    assert len(texts) == 40
    assert not texts & {*data.eval.columns["text"], *data.train.columns["text"]}
    assert [WORDS[text.split()[0]] for text in found.rows.columns["text"]] == found.known


def test_balanced_takes_the_surest_of_each_class() -> None:
    sure = [[0, "a", 0.9], [1, "b", 0.99], [2, "a", 0.95], [3, "a", 0.97]]
    assert balanced(sure, ["a", "b"]) == [[1, "b", 0.99], [3, "a", 0.97]]
    assert balanced(sure, ["a", "b", "c"]) == []


def test_no_sure_row_keeps_the_model_of_the_round_before(here: Path) -> None:
    run = peftlab.train(recipe(confidence=0.9999), progress=SilentProgress())
    assert [r["round"] for r in run.summary["self_training"]["rounds"]] == [0]
    assert run.summary["status"] == "finished" and run.summary["merge"]["verified"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"unlabelled": "missing.jsonl"}, DataError, "no such file"),
        ({"unlabelled": "held.jsonl"}, DataError, "no row is left that is no held-out and no training row"),
        ({"unlabelled": "other.jsonl"}, DataError, "no column 'text'"),
        ({"confidence": 1.5}, RecipeError, "confidence"),
        ({"rounds": 0}, RecipeError, "rounds"),
    ],
)
def test_wrong_settings_are_named(here: Path, changes: dict[str, Any], error: Any, message: str) -> None:
    (here / "other.jsonl").write_text('{"body": "x"}\n')
    held_out = assembly().data.eval
    (here / "held.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in held_out.columns["text"]))
    with pytest.raises(error, match=message):
        peftlab.train(recipe(**changes), progress=SilentProgress())
    assert not (here / "run").exists()


def test_other_tasks_refuse_it(here: Path) -> None:
    document = recipe()
    document["data"]["columns"] = {"score": "label"}
    with pytest.raises(
        RecipeError, match=r"train\.self_training.* has no effect for task: seq_cls with data\.columns\.score"
    ):
        peftlab.check(document, progress=SilentProgress())
