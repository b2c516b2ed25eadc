"""Reranking: loss and metrics against PyTorch and scikit-learn, whole runs, and what opens their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_examples import Stopper
from sklearn.metrics import ndcg_score
from torch.nn import functional as F

import peftlab
from peftlab.data import Rows
from peftlab.errors import DataError, Interrupted
from peftlab.evaluation.scorer import Scorer
from peftlab.models import find_pretrained, load_model, load_tokenizer
from peftlab.tasks.reranking import Reranking
from peftlab.tasks.retrieval import ranked_groups
from peftlab.training.progress import SilentProgress

WORDS = ["sun", "moon", "star", "cloud", "rain", "snow", "wind", "fire", "stone", "tree", "river", "bird"]
OPTIONS: dict[str, Any] = {"max_length": 64, "too_long": "error", "training": True}


def rows() -> list[dict[str, Any]]:
    found = []
    for i, word in enumerate(WORDS * 2):
        others = [WORDS[(i + k) % len(WORDS)] for k in (1, 4, 7)]
        documents = [(f"{word} is {i}", 1), *((f"{other} is {'so ' * k}", 0) for k, other in enumerate(others))]
        found += [{"question": f"what is {word} {i}", "answer": d, "right": s} for d, s in sorted(documents)]
    return found


def recipe(model: str = "tiny:bert", **sections: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "task": "reranking",
        "model": {"name": model},
        "data": {
            "train": "rows.jsonl",
            "eval_rows": 18,
            "columns": {"query": "question", "document": "answer", "score": "right"},
        },
        "train": {"max_steps": 6, "batch_size": 16, "lr": 5e-3},
        "run": {"dir": "run"},
    }
    return {**document, **{name: {**document.get(name, {}), **values} for name, values in sections.items()}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return tmp_path


def quiet() -> dict[str, Any]:
    return {"progress": SilentProgress()}


def bert() -> tuple[Any, Reranking]:
    pretrained = find_pretrained("tiny:bert")
    task = Reranking(load_tokenizer(pretrained), token_types=True)
    torch.manual_seed(0)
    model = load_model(pretrained, auto_class=task.spec.auto_class, device="cpu", **task.model_kwargs()).double()
    return model.requires_grad_(), task


def made(scores: list[float]) -> Rows:
    pairs = [{"query": f"a {i // 2}", "document": "b " * (i + 1), "score": s} for i, s in enumerate(scores)]
    return Rows.from_dicts(pairs, name="made")


@pytest.mark.parametrize("scores", [[0, 1, 1, 0, 1, 0], [0.2, 1, 0.7, 0, 0.5, 0.9]], ids=["binary", "graded"])
def test_loss_and_gradient_equal_binary_cross_entropy(scores: list[float]) -> None:
    model, task = bert()
    examples = task.encode(made(scores), **OPTIONS).examples
    loss = task.loss_sum(model, task.collate(examples, "cpu"))
    wanted = torch.zeros((), dtype=torch.float64)
    for row, score in zip(made(scores).columns["document"], scores, strict=True):
        query = made(scores).columns["query"][made(scores).columns["document"].index(row)]
        inputs = task.tokenizer(f"{query}\n", row, return_tensors="pt")  # its tokenizer has no separator
        inputs["token_type_ids"] = torch.tensor([[int(i == 1) for i in inputs.sequence_ids()]])
        logit = model(**inputs).logits[0, 0]
        wanted = wanted + F.binary_cross_entropy_with_logits(logit, torch.tensor(score, dtype=torch.float64))
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=0)
    weight = model.classifier.weight
    slopes = [torch.autograd.grad(value, weight)[0] for value in (loss, wanted)]
    torch.testing.assert_close(*slopes, rtol=1e-7, atol=1e-12)
    reference = task.reference_outputs(model, examples, "cpu")
    torch.testing.assert_close(task.losses(reference).sum(), wanted, rtol=1e-9, atol=0)


def test_metrics_equal_scikit_learn_and_a_count_by_hand() -> None:
    rng = np.random.default_rng(0)
    sizes = [3, 12, 5, 1, 4]
    queries = [q for q, size in enumerate(sizes) for _ in range(size)]
    logits, scores = rng.normal(size=25).tolist(), rng.integers(0, 5, size=25) / 4
    scores[21:] = 0.0  # the last query has no right answer
    columns = ranked_groups(queries, logits, scores.tolist(), relevant=0.5)
    ranks, gains = [], []
    for q, size in enumerate(sizes):
        own = [i for i, query in enumerate(queries) if query == q]
        order = sorted(own, key=lambda i: -logits[i])
        if size == 1 or len({scores[i] for i in own}) == 1:
            continue
        gains.append(ndcg_score([scores[own]], [np.array(logits)[own]], k=10))
        ranks += [next((1 + n for n, i in enumerate(order) if scores[i] >= 0.5), None)]
    assert columns["first_relevant"] == [*ranks, None, None]
    scorer = Scorer(["mrr", "ndcg_at_10"])
    scorer.add(columns)
    values = scorer.compute()
    assert values["mrr"] == pytest.approx(np.mean([1 / r for r in ranks if r]))
    assert values["ndcg_at_10"] == pytest.approx(np.mean(gains))


def test_equal_logits_earn_nothing() -> None:
    columns = ranked_groups([0, 0, 0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0], relevant=0.5)
    assert columns["first_relevant"] == [3] and columns["gains"] == [[0.0, 0.0, 1.0]]


def test_queries_that_cannot_be_ranked_have_no_value() -> None:
    scorer = Scorer(["mrr", "ndcg_at_10"])
    scorer.add(ranked_groups([0, 1], [1.0, 1.0], [1.0, 0.0], relevant=0.5))
    assert scorer.compute() == {"mrr": None, "ndcg_at_10": None}


def test_long_pairs_lose_the_end_of_the_longer_text() -> None:
    _, task = bert()
    long = Rows.from_dicts([{"query": "ab", "document": "c" * 60, "score": 1}], name="made")
    (example,) = task.encode(long, max_length=20, too_long="truncate", training=True).examples
    assert len(example) == 20 and len(example.extra["token_type_ids"]) == 20
    assert task.tokenizer.decode(
        example.ids[example.extra["token_type_ids"] == 0], skip_special_tokens=True
    ).startswith("ab")


def test_check_train_evaluate_again_predict_merge_and_resume(here: Path) -> None:
    assert peftlab.check(recipe(), **quiet())["ok"]
    run = peftlab.train(recipe(adapter={"dropout": 0.1}), **quiet())
    after = run.summary["after"]
    assert {"loss", "accuracy", "f1_relevant", "mrr", "ndcg_at_10"} <= after.keys()
    assert run.summary["eval_rows"] == 16, "whole queries are held out"
    assert peftlab.evaluate("run", **quiet())["metrics"] == pytest.approx(after, abs=1e-5)
    assert peftlab.merge("run", **quiet())["verified"]
    results = list(peftlab.predict("run", Path("rows.jsonl"), **quiet()))
    assert len(results) == 96 and sorted(r["rank"] for r in results[:4]) == [1, 2, 3, 4]
    best = max(results[:4], key=lambda r: r["score"])
    assert best["rank"] == 1 and 0 < best["score"] < 1
    with pytest.raises(DataError, match="reads two texts"):
        list(peftlab.predict("run", ["alone"], **quiet()))
    stopped = recipe(adapter={"dropout": 0.1}, run={"dir": "other", "save_every": 2})
    with pytest.raises(Interrupted):
        peftlab.train(stopped, progress=Stopper(at=3))
    peftlab.train("other", resume=True, **quiet())
    names = [Path(name) / "adapter/adapter_model.safetensors" for name in ("run", "other")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_documents_of_a_query_are_ranked_together_across_windows(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    peftlab.train(recipe(train={"max_steps": 1}), **quiet())
    monkeypatch.setattr(import_module("peftlab.api.predict"), "_WINDOW", 6)
    results = list(peftlab.predict("run", Path("rows.jsonl"), **quiet()))
    assert all(sorted(r["rank"] for r in results[i : i + 4]) == [1, 2, 3, 4] for i in range(0, 96, 4))


def test_merged_folder_opens_in_the_cross_encoder_of_sentence_transformers(here: Path) -> None:
    """With the tokenizer of BERT, which separates the two texts and numbers them."""
    from sentence_transformers import CrossEncoder
    from transformers import BertTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    Path("vocab.txt").write_text("\n".join(names))
    BertTokenizerFast("vocab.txt").save_pretrained("model")
    load_model(find_pretrained("tiny:bert"), auto_class="AutoModel", device="cpu").save_pretrained("model")
    peftlab.train(recipe("model"), **quiet())
    peftlab.merge("run", **quiet())
    pairs = [(row["question"], row["answer"]) for row in rows()[:6]]
    theirs = CrossEncoder("run/merged", device="cpu").predict(pairs)
    ours = [r["score"] for r in peftlab.predict("run", Path("rows.jsonl"), **quiet())][:6]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.usefixtures("short_timing")
def test_student_learns_from_a_trained_teacher_and_on_quantized_weights(here: Path) -> None:
    peftlab.train(recipe(run={"dir": "teacher"}), **quiet())
    student = recipe(run={"dir": "student"}) | {"distill": {"teacher": "teacher", "student_init": {"layers": [0]}}}
    run = peftlab.distill(student, **quiet())
    assert run.summary["card"]["headline"] == "accuracy" and run.summary["status"] == "finished"
    quantized = recipe(run={"dir": "nf4"}) | {"model": {"name": "tiny:bert", "quantize": "nf4"}}
    assert peftlab.train(quantized, **quiet()).summary["status"] == "finished"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "answer": "b", "right": 3}, r"the score 3 is outside 0\.\.1"),
        (
            {"question": "a", "answer": "b", "right": "yes"},
            "expected a finite number in the column 'right', found 'yes'",
        ),
        ({"question": "a", "answer": " ", "right": 1}, "the document is empty"),
        ({"question": None, "answer": "b", "right": 1}, "the query is empty"),
        ({"question": "a", "answer": "b"}, "no number in the column"),
    ],
)
def test_bad_rows_name_their_place(here: Path, row: dict[str, Any], message: str) -> None:
    with Path("rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl:97: {message}"):
        peftlab.check(recipe(), **quiet())


def test_one_query_cannot_be_held_out(here: Path) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps({**row, "question": "same"}) + "\n" for row in rows()))
    with pytest.raises(DataError, match="belong together"):
        peftlab.check(recipe(), **quiet())
