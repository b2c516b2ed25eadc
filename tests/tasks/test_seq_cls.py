"""Sequence classification: weighted loss over a whole step, labels, truncation, predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peftlab.data import BatchPlan, Rows
from peftlab.data.findings import find
from peftlab.data.rows import Origin
from peftlab.errors import DataError, RecipeError
from peftlab.tasks.classification import Labels
from peftlab.tasks.seq_cls import SequenceClassification

TEXTS = ["good", "awful thing", "so so", "very good indeed", "bad", "meh", "nice and long, long text"]
LABELS = ["pos", "neg", "mid", "pos", "neg", "mid", "pos"]
NAMES = ["mid", "neg", "pos"]


def rows_of(texts: list[Any], labels: list[Any]) -> Rows:
    return Rows(
        name="a.csv",
        columns={"text": texts, "label": labels},
        fingerprint="",
        origins=(Origin("a.csv", "line"),),
        origin_index=np.zeros(len(texts), dtype=np.int64),
        positions=np.arange(2, len(texts) + 2),
    )


@pytest.fixture
def tokenizer(tokenizer_of: Callable[[str], Any]) -> Any:
    """A tokenizer like BERT's: every text ends with a separator."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of("tiny:bert")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    return tokenizer


def encode(task: SequenceClassification, rows: Rows, **options: Any) -> Any:
    return task.encode(rows, **{"max_length": 512, "too_long": "error", "training": True, **options})


def step_loss(task: Any, model: Any, encoded: Any, grouping: str, batch_size: int) -> float:
    """The loss of one optimizer step over all rows, as the loop computes it: sums divided by the weight of the whole
    step."""
    plan = BatchPlan(
        encoded.lengths, batch_size=batch_size, accumulate=99, grouping=grouping, max_steps=1, split_cost=0
    )
    parts = [[encoded.examples[i] for i in part] for part in plan.step(0).micro_batches]
    weight = sum(e.weight for part in parts for e in part)
    with torch.no_grad():
        return float(sum(task.loss_sum(model, task.collate(part, "cpu")) for part in parts)) / weight


@pytest.mark.parametrize("weights", ["none", "balanced", {"pos": 0.2, "neg": 3.0, "mid": 1.0}], ids=str)
@pytest.mark.parametrize(("grouping", "batch_size"), [("none", 2), ("none", 99), ("step", 2), ("step", 3)])
def test_step_loss_equals_torchs_weighted_mean(
    tokenizer: Any, tiny: Callable[..., Any], weights: Any, grouping: str, batch_size: int
) -> None:
    rows = rows_of(TEXTS, LABELS)
    task = SequenceClassification(tokenizer, labels=Labels(NAMES, class_weights=weights))
    model = tiny("tiny:bert", **task.model_kwargs()).eval()
    encoded = encode(task, rows)
    logits = torch.cat([
        model(input_ids=torch.tensor(tokenizer(t)["input_ids"])[None]).logits.detach() for t in TEXTS
    ])  # fmt: skip
    if weights == "balanced":  # scikit-learn's formula
        weights = {name: len(LABELS) / (3 * LABELS.count(name)) for name in NAMES}
    tensor = None if weights == "none" else torch.tensor([weights[name] for name in NAMES])
    want = F.cross_entropy(logits, torch.tensor([NAMES.index(name) for name in LABELS]), weight=tensor)
    assert step_loss(task, model, encoded, grouping, batch_size) == pytest.approx(float(want), rel=1e-5)


def test_step_loss_that_averages_micro_batches_is_caught(
    tokenizer: Any, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = SequenceClassification.loss_sum

    def mean(self: Any, model: Any, batch: Any) -> Any:
        return right(self, model, batch) / batch.weights.sum() * len(batch.weights)

    monkeypatch.setattr(SequenceClassification, "loss_sum", mean)
    with pytest.raises(AssertionError):
        test_step_loss_equals_torchs_weighted_mean(tokenizer, tiny, {"pos": 0.2, "neg": 3.0, "mid": 1.0}, "step", 2)


def test_held_out_rows_are_not_weighted(tokenizer: Any) -> None:
    task = SequenceClassification(tokenizer, labels=Labels(NAMES, class_weights="balanced"))
    encoded = encode(task, rows_of(TEXTS, LABELS), training=False)
    assert {e.weight for e in encoded.examples} == {1.0}
    counts = {entry["label"]: entry["rows"] for entry in encoded.ledger.report()["labels"]}
    assert counts == {"mid": 2, "neg": 2, "pos": 3}


def test_class_weights_must_name_every_class(tokenizer: Any) -> None:
    with pytest.raises(RecipeError, match=r"expected a weight for each of the classes .*found 'neg', 'pos'"):
        SequenceClassification(tokenizer, labels=Labels(NAMES, class_weights={"pos": 1.0, "neg": 1.0}))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_class_weights_must_be_above_zero(tokenizer: Any, weight: float) -> None:
    with pytest.raises(RecipeError, match=r"expected a weight above 0 for the class 'mid', found .*data\.exclude") as e:
        SequenceClassification(tokenizer, labels=Labels(NAMES, class_weights={"pos": 1.0, "neg": 1.0, "mid": weight}))
    assert e.value.key == "train.class_weights"


def test_label_that_training_did_not_have_is_refused(tokenizer: Any) -> None:
    task = SequenceClassification(tokenizer, labels=Labels(["neg", "pos"]))
    with pytest.raises(
        DataError, match=r"a\.csv:4: label 'mid' does not occur in the training data.*'neg', 'pos'"
    ) as e:
        encode(task, rows_of(TEXTS, LABELS), training=False)
    assert e.value.key == "data.columns.label"


def test_held_out_rows_may_lack_a_named_class(tokenizer: Any) -> None:
    """data.label_names has 3 values. A small held-out part need not have all of them."""
    task = SequenceClassification(tokenizer, labels=Labels(NAMES, value_names={"0": "neg", "1": "pos", "2": "mid"}))
    encoded = encode(task, rows_of(["a", "b"], ["0", "1"]), training=False)
    assert [e.label for e in encoded.examples] == [NAMES.index("neg"), NAMES.index("pos")]


def test_text_that_is_none_is_refused(tokenizer: Any) -> None:
    task = SequenceClassification(tokenizer, labels=Labels(NAMES))
    with pytest.raises(DataError, match=r"a\.csv:3: the text is empty; .*data\.empty=drop"):
        encode(task, rows_of(["x", None], ["pos", "neg"]))


def test_truncation_keeps_the_last_token(tokenizer: Any) -> None:
    task = SequenceClassification(tokenizer, labels=Labels(NAMES))
    rows = rows_of(["abcdefgh", "ab"], ["pos", "neg"])
    long, short = encode(task, rows, max_length=5, too_long="truncate").examples
    assert tokenizer.decode(long.ids) == "<|im_start|>abc<|im_end|>"
    assert tokenizer.decode(short.ids) == "<|im_start|>ab<|im_end|>"


def test_score_and_predict_are_the_models_own_softmax(tokenizer: Any, tiny: Callable[..., Any]) -> None:
    task = SequenceClassification(tokenizer, labels=Labels(NAMES))
    model = tiny("tiny:bert", **task.model_kwargs()).eval()
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(t, return_tensors="pt")).logits for t in TEXTS]).double()
    probs = logits.softmax(-1)
    results = list(task.predict(model, rows_of(TEXTS, LABELS), batch_tokens=24, max_length=512, max_new_tokens=3))
    for result, row in zip(results, probs, strict=True):
        assert list(result["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-6)
        assert result["label"] == NAMES[int(row.argmax())]
        assert result["probability"] == max(result["probabilities"].values())
    targets = [NAMES.index(name) for name in LABELS]
    with torch.no_grad():
        scores = task.score(model, task.collate(encode(task, rows_of(TEXTS, LABELS)).examples, "cpu"))
    assert scores["references"] == targets
    assert scores["predictions"] == probs.argmax(-1).tolist()
    assert scores["nll_sum"] == pytest.approx(-float(probs.log()[torch.arange(len(TEXTS)), targets].sum()), rel=1e-5)
    assert scores["num_scored"] == len(TEXTS)


def test_predict_needs_no_label_column(tokenizer: Any, tiny: Callable[..., Any]) -> None:
    task = SequenceClassification(tokenizer, labels=Labels(NAMES))
    model = tiny("tiny:bert", **task.model_kwargs()).eval()
    rows = Rows.from_dicts([task.row_from_text("x" * 600)], name="input")
    assert len(list(task.predict(model, rows, batch_tokens=64, max_length=512))) == 1


@pytest.mark.parametrize("grouping", ["none", "step", "epoch"])
def test_empty_text_names_its_row_or_trains(
    tokenizer_of: Callable[[str], Any], tiny: Callable[..., Any], grouping: str
) -> None:
    """A tokenizer without special tokens makes no tokens of an empty text."""
    task = SequenceClassification(tokenizer_of("tiny:bert"), labels=Labels(NAMES))
    model = tiny("tiny:bert", **task.model_kwargs())
    try:
        encoded = encode(task, rows_of(["", "b", "c"], ["pos", "neg", "mid"]))
    except DataError as error:
        place = str(error)
    else:
        place = "a.csv:2" if np.isfinite(step_loss(task, model, encoded, grouping, 1)) else ""
    assert "a.csv:2" in place


def test_numbers_are_read_as_text_and_noted(tokenizer: Any) -> None:
    task = SequenceClassification(tokenizer, labels=Labels(["a", "b"]))
    numbers, texts = (encode(task, rows_of(values, ["a", "b"])) for values in ([5, 2.5], ["5", "2.5"]))
    assert [e.ids.tolist() for e in numbers.examples] == [e.ids.tolist() for e in texts.examples]
    assert [f.message for f in find(numbers.ledger) if f.kind == "numbers"] == ["numbers are read as text (2 rows)"]
    with pytest.raises(DataError, match=r"a\.csv:3: expected text, found \['x'\]"):
        encode(task, rows_of(["x", ["x"]], ["a", "b"]))
