"""Embeddings from pairs, triplets and scores: whole runs, and what opens their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_examples import Stopper

import peftlab
from peftlab.errors import Interrupted
from peftlab.training.progress import SilentProgress

WORDS = [
    "sun",
    "moon",
    "star",
    "cloud",
    "rain",
    "snow",
    "wind",
    "fire",
    "stone",
    "tree",
    "river",
    "bird",
    "fish",
    "road",
    "lamp",
    "book",
]
COLUMNS = {
    "pairs": {"anchor": "question", "positive": "answer"},
    "triplets": {"anchor": "question", "positive": "answer", "negative": "wrong"},
    "scores": {"sentence1": "question", "sentence2": "answer", "score": "rating"},
}
METRICS = {"pairs": "mrr", "triplets": "triplet_accuracy", "scores": "spearman_cosine"}


def write_rows(folder: Path) -> None:
    rows = [
        {
            "question": f"what is {word} {i}",
            "answer": f"{word} is {i} {'so ' * (i % 5)}",
            "wrong": f"no {word}",
            "rating": i % 6,
        }
        for i, word in enumerate(WORDS * 3)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(kind: str, model: str = "tiny:bert", **sections: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "task": "embedding",
        "model": {"name": model},
        "data": {"train": "rows.jsonl", "eval_rows": 12, "columns": COLUMNS[kind]},
        "train": {"max_steps": 6, "batch_size": 6, "accumulate": 2, "lr": 5e-3},
        "run": {"dir": "run"},
    }
    if kind == "scores":
        document["data"]["score_range"] = [0, 5]
    return {**document, **{name: {**document.get(name, {}), **values} for name, values in sections.items()}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    return tmp_path


def quiet() -> dict[str, Any]:
    return {"progress": SilentProgress()}


@pytest.mark.parametrize("kind", COLUMNS)
def test_check_train_evaluate_again_predict_and_merge(kind: str, here: Path) -> None:
    report = peftlab.check(recipe(kind), **quiet())
    assert report["ok"] and report["train"]["kept"] == 36
    assert [s[0] for s in report["preview"][0]["segments"]][:1] == [f"{next(iter(COLUMNS[kind]))}: "]
    run = peftlab.train(recipe(kind, adapter={"dropout": 0.1}), **quiet())
    after = run.summary["after"]
    assert METRICS[kind] in after and run.summary["parity"]["loss_fast"] > 0
    assert peftlab.evaluate("run", **quiet())["metrics"] == pytest.approx(after, abs=1e-6)
    merged = peftlab.merge("run", **quiet())
    assert merged["verified"]
    assert peftlab.evaluate("run/merged", **quiet())["metrics"] == pytest.approx(after, abs=1e-4)
    (plain,) = peftlab.predict("run", ["what is sun"], **quiet())
    assert plain.keys() == {"vector"} and len(plain["vector"]) == 64
    given = [{"question": "what is sun", "answer": "sun is 3", "wrong": "no sun"}, {"question": "a", "answer": " "}]
    first, blank = peftlab.predict("run", given, **quiet())
    assert first["vector"] == pytest.approx(plain["vector"], abs=1e-5) and -1 <= first["cosine"] <= 1
    assert ("cosine_negative" in first) == (kind == "triplets")
    assert blank["vector"] is None and "empty" in blank["note"]


def test_merged_folder_opens_in_sentence_transformers(here: Path) -> None:
    """Vectors and cosines of the run, of PEFT alone, and of sentence-transformers are equal, for every pooling."""
    from peft import PeftModel
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    for pooling in ("mean", "cls", "last"):
        name = f"run-{pooling}"
        peftlab.train(
            recipe("pairs", model="tiny:bert", run={"dir": name})
            | {"model": {"name": "tiny:bert", "pooling": pooling}},
            **quiet(),
        )
        peftlab.merge(name, **quiet())
        texts = ["what is the sun", "a stone", "the wind and the rain are here"]
        ours = np.array([r["vector"] for r in peftlab.predict(name, texts, **quiet())])
        theirs = SentenceTransformer(f"{name}/merged", device="cpu").encode(texts)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert SentenceTransformer(f"{name}/merged", device="cpu", truncate_dim=16).encode(texts).shape == (3, 16)
    base = AutoModel.from_pretrained("run-last/merged")
    tokenizer = AutoTokenizer.from_pretrained("run-last/merged")
    peftlab.train(recipe("pairs", model="run-last/merged", run={"dir": "second"}), **quiet())
    model = PeftModel.from_pretrained(base, "second/adapter").eval()
    with torch.no_grad():
        hidden = model(**tokenizer(texts[0], return_tensors="pt")).last_hidden_state[0]
    (result,) = peftlab.predict("second", texts[:1], **quiet())
    np.testing.assert_allclose(result["vector"], hidden[-1].numpy(), rtol=1e-4, atol=1e-5)  # the files say: last


@pytest.mark.parametrize("kind", ["pairs", "scores"])
def test_stopped_and_resumed_run_has_the_same_bytes(kind: str, here: Path) -> None:
    settings = {"adapter": {"dropout": 0.2}, "train": {"objective": "cosent"} if kind == "scores" else {}}
    peftlab.train(recipe(kind, **settings), **quiet())
    stopped = recipe(kind, **settings, run={"dir": "other", "save_every": 2})
    with pytest.raises(Interrupted):
        peftlab.train(stopped, progress=Stopper(at=3))
    peftlab.train("other", resume=True, **quiet())
    names = [Path(name) / "adapter/adapter_model.safetensors" for name in ("run", "other")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_loss_of_a_step_does_not_depend_on_the_micro_batches(here: Path) -> None:
    losses = []
    for size, accumulate in ((12, 1), (3, 4), (1, 12)):
        run = peftlab.train(
            recipe("pairs", train={"batch_size": size, "accumulate": accumulate}, run={"dir": f"run-{size}"}), **quiet()
        )
        records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([record["loss"] for record in records if "loss" in record])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-4)


def test_pairs_train_on_quantized_weights_and_in_full(here: Path) -> None:
    run = peftlab.train(
        recipe("pairs", model="tiny:bert") | {"model": {"name": "tiny:bert", "quantize": "nf4"}}, **quiet()
    )
    assert run.summary["status"] == "finished" and peftlab.merge("run", **quiet())["verified"]
    full = recipe("triplets", run={"dir": "full"}, train={"matryoshka": [64, 16]}) | {"adapter": {"method": "none"}}
    assert peftlab.train(full, **quiet()).summary["status"] == "finished"


@pytest.mark.usefixtures("short_timing")
def test_student_learns_pairs_from_a_trained_teacher(here: Path) -> None:
    peftlab.train(recipe("pairs", run={"dir": "teacher"}), **quiet())
    student = recipe("pairs", run={"dir": "student"}) | {
        "distill": {"teacher": "teacher", "student_init": {"layers": [0]}},
    }
    run = peftlab.distill(student, **quiet())
    card = run.summary["card"]
    assert card["headline"] == "spearman" and run.summary["status"] == "finished"
    assert {row["name"] for row in card["metrics"]} >= {"spearman", "neighbour_recall", "cosine"}
