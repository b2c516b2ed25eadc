"""Several labels, ranks and numbers: losses, gradients and answers against transformers, torch and numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peftlab.data import BatchPlan, Rows
from peftlab.errors import DataError, RecipeError
from peftlab.tasks.base import TaskParts
from peftlab.tasks.classification import Labels
from peftlab.tasks.label_sets import LabelSets
from peftlab.tasks.numbers import Numbers
from peftlab.tasks.ranks import Ranks
from peftlab.tasks.seq_cls import MultiLabelClassification, OrdinalClassification, Regression

TEXTS = ["good", "awful thing", "so so", "very good indeed", "bad", "meh", "nice and long, long text"]
SETS = [["a", "c"], [], ["b"], ["a", "b", "c"], ["c"], [], ["a"]]
RANKS = ["low", "mid", "high", "high", "low", "mid", "mid"]
SCORES = [1990.0, 2001.5, 2020.0, 2003.0, 1999.0, 2010.0, 2005.0]
ROWS = Rows.from_dicts(
    [{"text": t, "labels": s, "rank": r, "score": n} for t, s, r, n in zip(TEXTS, SETS, RANKS, SCORES, strict=True)],
    name="a.jsonl",
)
MEAN, STD = float(np.mean(SCORES)), float(np.std(SCORES))


def make(kind: str, tokenizer: Any, **options: Any) -> Any:
    if kind == "labels":
        return MultiLabelClassification(
            tokenizer,
            labels=LabelSets(["a", "b", "c"], "labels", ["labels"], thresholds=dict.fromkeys("abc", 0.5), **options),
        )
    if kind == "rank":
        return OrdinalClassification(tokenizer, labels=Ranks(Labels(["low", "mid", "high"], "rank", **options)))
    return Regression(tokenizer, labels=Numbers(MEAN, STD))


def target(kind: str) -> torch.Tensor:
    if kind == "labels":
        return torch.tensor([[float(n in s) for n in "abc"] for s in SETS], dtype=torch.float64)
    if kind == "rank":
        order = ["low", "mid", "high"]
        return torch.tensor([[float(order.index(r) > k) for k in range(2)] for r in RANKS], dtype=torch.float64)
    return torch.tensor(SCORES, dtype=torch.float64)


def encode(task: Any) -> Any:
    return task.encode(ROWS, max_length=512, too_long="error", training=True)


@pytest.fixture
def tokenizer(tokenizer_of: Callable[[str], Any]) -> Any:
    return tokenizer_of("tiny:bert")


@pytest.mark.parametrize("kind", ["labels", "rank", "score"])
def test_loss_and_gradients_are_those_of_transformers(kind: str, tokenizer: Any, tiny: Callable[..., Any]) -> None:
    """transformers computes the loss of the problem type in the config: BCEWithLogits or MSE, here in float64."""
    task = make(kind, tokenizer)
    model = tiny("tiny:bert", **task.model_kwargs()).double().eval()
    examples = encode(task).examples
    batch = task.collate(examples, "cpu")
    loss = task.loss_sum(model, batch) / sum(e.weight for e in examples)
    (loss).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    own = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    scale = STD**2 if kind == "score" else 1.0
    want = model(**own, labels=target(kind)).loss / scale
    want.backward()
    assert float(loss) == pytest.approx(float(want), rel=1e-9)
    for name, gradient in ours.items():
        assert torch.allclose(gradient, dict(model.named_parameters())[name].grad, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("kind", ["labels", "rank", "score"])
@pytest.mark.parametrize(("grouping", "batch_size"), [("none", 2), ("step", 3)])
def test_the_loss_of_a_step_does_not_depend_on_its_micro_batches(
    kind: str, grouping: str, batch_size: int, tokenizer: Any, tiny: Callable[..., Any]
) -> None:
    task = make(kind, tokenizer)
    model = tiny("tiny:bert", **task.model_kwargs()).double().eval()
    encoded = encode(task)

    def step(size: int, how: str) -> float:
        plan = BatchPlan(encoded.lengths, batch_size=size, accumulate=99, grouping=how, max_steps=1, split_cost=0)
        parts = [[encoded.examples[i] for i in part] for part in plan.step(0).micro_batches]
        weight = sum(e.weight for part in parts for e in part)
        with torch.no_grad():
            return sum(float(task.loss_sum(model, task.collate(part, "cpu"))) for part in parts) / weight

    assert step(batch_size, grouping) == pytest.approx(step(99, "none"), rel=1e-9)


@pytest.mark.parametrize("kind", ["labels", "rank", "score"])
def test_the_reference_path_agrees_and_rows_alone_too(kind: str, tokenizer: Any, tiny: Callable[..., Any]) -> None:
    task = make(kind, tokenizer)
    model = tiny("tiny:bert", **task.model_kwargs()).double().eval()
    examples = encode(task).examples
    with torch.no_grad():
        fast = task.outputs(model, task.collate(examples, "cpu"))
        slow = task.reference_outputs(model, examples, "cpu")
        alone = torch.cat([task.outputs(model, task.collate([e], "cpu")).values for e in examples])
    for other in (slow.values, alone):
        assert torch.allclose(fast.values, other, atol=1e-9)
    assert torch.allclose(fast.targets.double(), slow.targets.double()) and torch.allclose(fast.weights, slow.weights)
    assert len(fast) == sum(e.num_scored for e in examples)


def test_class_weights_weigh_the_decisions_of_a_rank(tokenizer: Any, tiny: Callable[..., Any]) -> None:
    weights = {"low": 0.5, "mid": 1.0, "high": 3.0}
    task = make("rank", tokenizer, class_weights=weights)
    model = tiny("tiny:bert", **task.model_kwargs()).double().eval()
    examples = encode(task).examples
    own = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    factor = torch.tensor([weights[r] for r in RANKS], dtype=torch.float64)[:, None].expand(-1, 2)
    with torch.no_grad():
        loss = task.loss_sum(model, task.collate(examples, "cpu")) / sum(e.weight for e in examples)
        losses = F.binary_cross_entropy_with_logits(model(**own).logits, target("rank"), reduction="none")
    assert float(loss) == pytest.approx(float((losses * factor).sum() / factor.sum()), rel=1e-9)


def test_results_are_the_models_own_sigmoids(tokenizer: Any, tiny: Callable[..., Any]) -> None:
    task = make("labels", tokenizer)
    model = tiny("tiny:bert", **task.model_kwargs()).eval()
    results = list(task.predict(model, ROWS, batch_tokens=64, max_length=512))
    own = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        want = model(**own).logits.sigmoid()
    for row, result in zip(want, results, strict=True):
        assert list(result["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert result["labels"] == [n for n, p in zip("abc", row, strict=True) if p >= 0.5]


def test_ranks_are_read_from_falling_probabilities() -> None:
    ranks = Ranks(Labels(["a", "b", "c", "d"], "rank"))
    logits = torch.tensor([[2.0, 1.0, -1.0], [-1.0, 3.0, -2.0]], dtype=torch.float64)
    first, second = ranks.results(ranks.outputs(logits, None, torch.ones(2, dtype=torch.float64) * 3))
    above = 1 / (1 + np.exp(-np.array([2.0, 1.0, -1.0])))
    assert list(first["probabilities"].values()) == pytest.approx([1 - above[0], *-np.diff(above), above[-1]])
    assert (first["label"], second["label"]) == ("c", "a")  # the second row is not above a, whatever the others say
    assert sum(second["probabilities"].values()) == pytest.approx(1.0)
    assert second["probabilities"]["b"] == pytest.approx(0.0)


def test_thresholds_have_the_best_f1_of_all() -> None:
    """Against every threshold, by scikit-learn."""
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    right = (rng.random((200, 3)) < [0.1, 0.5, 0.9]).astype(int)
    scores = np.clip(0.3 * right + 0.7 * rng.random((200, 3)), 0, 1).round(2)
    sets = LabelSets(["a", "b", "c"], "labels", ["labels"])
    found = sets.tune(scores, right)
    for i, name in enumerate("abc"):
        tried = [f1_score(right[:, i], scores[:, i] >= t) for t in np.unique(scores)]
        assert f1_score(right[:, i], scores[:, i] >= found[name]) == pytest.approx(max(tried))
    assert sets.tune(scores, np.zeros_like(right)) == {"a": 0.5, "b": 0.5, "c": 0.5}


@pytest.mark.parametrize("bias", [True, False])
def test_the_scale_goes_into_the_head_and_comes_back(bias: bool, tokenizer: Any, tiny: Callable[..., Any]) -> None:
    task = make("score", tokenizer)
    model = tiny("tiny:bert", **task.model_kwargs()).double().eval()
    if not bias:
        model.classifier.bias = None
    batch = task.collate(encode(task).examples, "cpu")
    task.before_training(model, trained_before=False)
    with torch.no_grad():
        learned = task.outputs(model, batch)
        assert torch.allclose(learned.targets.double(), (torch.tensor(SCORES, dtype=torch.float64) - MEAN) / STD)
        task.after_training(model, [], batch_tokens=64)
        finished = task.outputs(model, batch).values
        plain = model(**batch.inputs).logits[:, 0]
        assert torch.allclose(learned.values, finished, atol=1e-9)
        assert task.score(model, batch)["predicted_numbers"] == pytest.approx(plain.tolist(), rel=1e-9)
        task.before_training(model, trained_before=True)
        assert torch.allclose(task.outputs(model, batch).values, finished, atol=1e-9)


def test_a_model_without_one_head_is_refused() -> None:
    with pytest.raises(RecipeError, match="expected one trained linear layer that gives the number, found 0"):
        Numbers(0.0, 1.0).begin(torch.nn.Linear(3, 2), trained_before=False)


def parts(**options: Any) -> TaskParts:
    return TaskParts(None, **{"columns": {}, "available": (), **options})


def test_ranks_have_an_order_of_their_own() -> None:
    def rows(*values: Any) -> Rows:
        return Rows.from_dicts([{"rank": value} for value in values], name="a.jsonl")

    assert Ranks.find(parts(), rows(10, 2, 3)) == ["2", "3", "10"]
    assert Ranks.find(parts(order=["low", "mid", "high"]), rows("high", "low")) == ["low", "mid", "high"]
    assert Ranks.find(parts(label_names={"b": "bad", "g": "good"}), rows("g", "b")) == ["bad", "good"]
    assert Ranks.find(parts(bins=([1.0], ["low", "high"])), rows(0.5, 7)) == ["low", "high"]
    with pytest.raises(RecipeError, match=r"are no numbers \('high', 'low'\); say their order") as caught:
        Ranks.find(parts(), rows("low", "high"))
    assert caught.value.key == "data.order"
    with pytest.raises(DataError, match="expected the ranks 'low', 'mid', found 'high'"):
        Ranks.find(parts(order=["low", "mid"]), rows("low", "high"))
    with pytest.raises(DataError, match="expected at least two ranks, found '1'"):
        Ranks.find(parts(), rows(1, 1))


def test_a_label_that_training_did_not_have_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"record 1: label 'x' does not occur .*'a', 'b', 'c'") as caught:
        LabelSets(["a", "b", "c"], "labels", ["labels"]).values(Rows.from_dicts([{"labels": ["x"]}], name="e.jsonl"))
    assert caught.value.key == "data.columns.labels"
    with pytest.raises(DataError, match="all 2 rows have the score 3"):
        Numbers.find(parts(), Rows.from_dicts([{"score": 3}, {"score": "3.0"}], name="e.jsonl"))
