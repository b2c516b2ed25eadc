"""seq_cls with pairs, several labels, ranks and numbers, from check to predict, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_examples import Stopper

import peftlab
from peftlab.assembly.target import find_target, open_target
from peftlab.errors import DataError, Interrupted, RecipeError
from peftlab.training.progress import SilentProgress

COLUMNS: dict[str, dict[str, Any]] = {
    "pair": {"columns": {"pair": "pair", "label": "label"}},
    "labels": {"columns": {"pair": "pair", "labels": "labels"}},
    "rank": {"columns": {"rank": "rank"}, "order": ["low", "mid", "high"]},
    "score": {"columns": {"score": "score"}},
}
KEYS = {"pair": "label", "labels": "labels", "rank": "label", "score": "score"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = []
    for i in range(40):
        good, size = i % 2, i % 3
        labels = ["good"] * good + ["long"] * (size == 2)
        text = f"{'good' if good else 'bad'} film {'so ' * size}{i}"
        row = {"text": text, "pair": f"yes {i}", "label": "pos" if good else "neg", "labels": labels}
        rows.append({**row, "rank": ["low", "mid", "high"][size], "score": 2000 + 5 * good + size})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(kind: str, **sections: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "task": "seq_cls",
        "model": {"name": "tiny:bert"},
        "adapter": {"rank": 4, "dropout": 0.1},
        "data": {"train": "rows.jsonl", "eval_rows": 10, **COLUMNS[kind]},
        "train": {"max_steps": 6, "batch_size": 8, "lr": 1e-2},
        "run": {"dir": "run", "save_every": 2},
    }
    if kind == "labels":
        document["eval"] = {"threshold": "tuned"}
    for name, values in sections.items():
        document[name] = {**document.get(name, {}), **values}
    return document


def train(document: Any, **options: Any) -> Any:
    return peftlab.train(document, **{"progress": SilentProgress(), **options})


@pytest.mark.parametrize("kind", list(COLUMNS))
def test_a_run_is_checked_trained_resumed_merged_and_used(here: Path, kind: str) -> None:
    document, silent = recipe(kind, run={"merge": "original"}), SilentProgress()
    assert peftlab.check(document, progress=silent)["ok"]
    run = train(document)
    assert run.summary["merge"]["verified"] and run.summary["reopened"]["kl_max"] < 1e-6
    metrics = peftlab.evaluate("run", progress=silent)["metrics"]
    assert metrics == pytest.approx(run.summary["after"], rel=1e-4, nan_ok=True)
    with pytest.raises(Interrupted):
        train({**document, "run": {**document["run"], "dir": "other"}}, progress=Stopper(at=3))
    train("other", resume=True)
    files = [here / name / "adapter/adapter_model.safetensors" for name in ("run", "other")]
    assert files[0].read_bytes() == files[1].read_bytes()
    inputs: Any = [{"text": "good film", "pair": "yes"}, {"text": "bad", "pair": "no"}]
    found = list(peftlab.predict("run", inputs, progress=silent))
    merged = list(peftlab.predict("run/merged", inputs, progress=silent))
    ours, theirs = ([r[KEYS[kind]] for r in results] for results in (found, merged))
    assert theirs == (pytest.approx(ours, rel=1e-5) if kind == "score" else ours)
    if "pair" in COLUMNS[kind]["columns"]:
        with pytest.raises(DataError, match="this model reads two texts, found one: 'good'"):
            list(peftlab.predict("run", "good", progress=silent))


@pytest.mark.parametrize("kind", ["labels", "rank", "score"])
def test_plain_transformers_and_peft_give_what_was_trained(here: Path, kind: str) -> None:
    """Also a number in the data's units."""
    import transformers
    from peft import PeftModel

    train(recipe(kind, run={"merge": "original"}))
    opened = open_target(find_target("run"), SilentProgress())
    texts = ["good film", "bad film so so"]
    own = opened.task.tokenizer(
        *([texts, ["yes", "no"]] if kind == "labels" else [texts]), padding=True, return_tensors="pt"
    )
    merged = transformers.AutoModelForSequenceClassification.from_pretrained("run/merged").eval()
    base = transformers.AutoModelForSequenceClassification.from_config(merged.config)
    base.load_state_dict(opened.assembly.model().state_dict())
    adapted = PeftModel.from_pretrained(base, "run/adapter").eval()
    inputs = {
        name: own[name] for name in ("input_ids", "attention_mask", *(["token_type_ids"] if kind == "labels" else []))
    }
    with torch.no_grad():
        first, second = merged(**inputs).logits, adapted(**inputs).logits
    assert torch.allclose(first, second, rtol=1e-5, atol=1e-5)
    rows: Any = [{"text": a, "pair": b} for a, b in zip(texts, ["yes", "no"], strict=True)]
    found = list(peftlab.predict("run", rows, progress=SilentProgress()))
    if kind == "score":
        assert first[:, 0].tolist() == pytest.approx([r["score"] for r in found], rel=1e-5)
        assert merged.config.problem_type == "regression" and 1990 < float(first[0, 0]) < 2020
        return
    assert merged.config.problem_type == "multi_label_classification"
    if kind == "labels":
        assert first.sigmoid().tolist()[0] == pytest.approx(list(found[0]["probabilities"].values()), abs=1e-5)


def test_thresholds_are_kept_with_the_run(here: Path) -> None:
    run = train(recipe("labels"))
    stored = (run.recipe().recipe.lock or {})["environment"]["found"]["thresholds"]
    assert set(stored) == {"good", "long"} and stored != {"good": 0.5, "long": 0.5}
    (row,) = peftlab.predict("run", [{"text": "good film", "pair": "yes"}], progress=SilentProgress())
    assert row["labels"] == [name for name, p in row["probabilities"].items() if p >= stored[name]]


def test_a_checkpoint_of_numbers_gives_the_datas_units(here: Path) -> None:
    train(recipe("score"))
    (checkpoint, *_) = sorted((here / "run/checkpoints").iterdir())
    (row,) = peftlab.predict(checkpoint, "good film", progress=SilentProgress())
    assert 1990 < row["score"] < 2020


@pytest.mark.parametrize("kind", ["labels", "rank", "score"])
def test_a_student_learns_from_a_teacher(here: Path, kind: str) -> None:
    train(recipe(kind, run={"dir": "teacher"}))
    document = recipe(
        kind,
        adapter={"method": "none", "rank": None, "dropout": 0.0},
        distill={"teacher": "teacher", "hard_weight": 0.3},
    )
    document["adapter"], document["run"] = {"method": "none"}, {"dir": "student"}
    document.pop("eval", None)
    summary = peftlab.distill(document, progress=SilentProgress()).summary
    assert summary["card"]["verdict"]["outcome"]
    (row,) = peftlab.predict("student/student", [{"text": "good film", "pair": "yes"}], progress=SilentProgress())
    assert row[KEYS[kind]] is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": {"labels": "labels"}, "balance": True}, "with data.columns.labels"),
        ({"columns": {"score": "score"}, "label_names": {"1": "a"}}, "with data.columns.score"),
        ({"columns": {"score": "score", "label": "label"}}, "data.columns.label"),
        ({"columns": {"label": "label"}, "order": ["a", "b"]}, "data.order"),
        ({"columns": {"rank": "rank"}, "separator": ";"}, "data.separator"),
    ],
)
def test_keys_of_other_variants_are_refused(here: Path, changes: dict[str, Any], message: str) -> None:
    document = recipe("score")
    document["data"] = {"train": "rows.jsonl", "eval_rows": 10, **changes}
    with pytest.raises(RecipeError, match="has no effect for task: seq_cls") as caught:
        peftlab.check(document, progress=SilentProgress())
    assert message in str(caught.value)


@pytest.mark.parametrize("threshold", [0.0, 1.0, 1.5])
def test_a_threshold_out_of_range_is_refused(here: Path, threshold: float) -> None:
    with pytest.raises(RecipeError, match="threshold: expected a number between 0 and 1, or tuned"):
        peftlab.check(recipe("labels", eval={"threshold": threshold}), progress=SilentProgress())


def test_rows_are_drawn_per_class_after_rows_are_held_out(here: Path) -> None:
    report = peftlab.check(recipe("pair", data={"train": "rows.jsonl#5-per-class"}), progress=SilentProgress())
    assert [entry["rows"] for entry in report["train"]["labels"]] == [5, 5] and report["held_out"]["kept"] == 10
    report = peftlab.check(recipe("rank", data={"train": "rows.jsonl#5-per-class"}), progress=SilentProgress())
    assert [entry["rows"] for entry in report["train"]["labels"]] == [5, 5, 5]
    with pytest.raises(DataError, match=r"expected 30 training rows of each class, found 15 of 'neg', 15 of 'pos'"):
        peftlab.check(recipe("pair", data={"train": "rows.jsonl#30-per-class"}), progress=SilentProgress())
    with pytest.raises(RecipeError, match="draws rows by their class"):
        peftlab.check(recipe("score", data={"train": "rows.jsonl#5-per-class"}), progress=SilentProgress())
