"""Token classification: loss, alignment of labels, truncation, padding, and predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peftlab.data import Annotations, BatchPlan, Rows
from peftlab.data.findings import find
from peftlab.errors import DataError
from peftlab.tasks import TaskParts
from peftlab.tasks.token_cls import NamedEntities, WordTags

SPANS = [
    {"text": "Ann Lee went to Rome.", "spans": [[0, 7, "PER"], [16, 20, "LOC"]]},
    {"text": "nothing here", "spans": []},
    {"text": "Rome", "spans": [[0, 4, "LOC"]]},
    {"text": "Bob's  caf\u00e9 in New York, Bob", "spans": [[0, 3, "PER"], [15, 23, "LOC"], [25, 28, "PER"]]},
]
LISTS = [
    {"tokens": ["Ann", "Lee", "went"], "tags": ["B-PER", "I-PER", "O"]},
    {"tokens": ["Rome"], "tags": ["S-LOC"]},
    {"tokens": ["in", "Rome", ",", "Bob"], "tags": ["O", "B-LOC", "O", "U-PER"]},
]
NAMES = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


@pytest.fixture
def tokenizer(tokenizer_of: Callable[[str], Any]) -> Any:
    """A tokenizer like BERT's: every text ends with a separator."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of("tiny:bert")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    return tokenizer


def task_of(tokenizer: Any, **options: Any) -> NamedEntities:
    return NamedEntities(tokenizer, Annotations({}, {}, per_word=False), classes=NAMES, **options)


def encode(task: Any, rows: list[dict[str, Any]], **options: Any) -> Any:
    options = {"max_length": 512, "too_long": "error", "training": True, **options}
    return task.encode(Rows.from_dicts(rows, name="a.jsonl"), **options)


def model_of(tiny: Callable[..., Any], task: Any, name: str = "tiny:bert", **options: Any) -> Any:
    import transformers

    from peftlab.models.tiny import tiny_config

    torch.manual_seed(0)
    config = tiny_config(name, **task.model_kwargs(), **options)
    return transformers.AutoModelForTokenClassification.from_config(config).eval()


@pytest.mark.parametrize("rows", [SPANS, LISTS], ids=["spans", "lists"])
def test_loss_and_gradients_equal_those_of_transformers(tokenizer: Any, tiny: Any, rows: list[Any]) -> None:
    task = task_of(tokenizer)
    model = model_of(tiny, task).double()
    encoded = encode(task, rows)
    batch = task.collate(encoded.examples, "cpu")
    labels = torch.full_like(batch.input_ids, -100)
    for row, example in enumerate(encoded.examples):
        for at, label in zip(np.flatnonzero(example.trained), example.label, strict=True):
            labels[row, at] = int(label)
    count = sum(e.weight for e in encoded.examples)

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True))

    ours = task.loss_sum(model, batch) / count
    theirs = model(**batch.inputs, labels=labels).loss
    assert float(ours) == pytest.approx(float(theirs), rel=1e-12)
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-12)
    labels[0, int(np.flatnonzero(encoded.examples[0].trained)[0])] = -100  # a deliberate fault: one word is left out
    assert float(model(**batch.inputs, labels=labels).loss) != pytest.approx(float(ours), rel=1e-3)


@pytest.mark.parametrize("padding", ["right", "none"])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_loss_of_a_step_does_not_depend_on_its_cuts(
    tokenizer: Any, tiny: Any, padding: Any, batch_size: int
) -> None:
    task = task_of(tokenizer, padding=padding)
    model = model_of(tiny, task).double()
    encoded = encode(task, SPANS)

    def step(size: int) -> float:
        plan = BatchPlan(encoded.lengths, batch_size=size, accumulate=99, grouping="step", max_steps=1, split_cost=0)
        parts = [[encoded.examples[i] for i in part] for part in plan.step(0).micro_batches]
        return float(sum(task.loss_sum(model, task.collate(part, "cpu")) for part in parts))

    assert step(batch_size) == pytest.approx(step(99), rel=1e-9)


@pytest.mark.parametrize("padding", ["right", "none"])
def test_outputs_equal_the_reference_and_a_row_alone(tokenizer: Any, tiny: Any, padding: Any) -> None:
    task = task_of(tokenizer, padding=padding)
    model = model_of(tiny, task)
    examples = encode(task, SPANS).examples
    with torch.no_grad():
        ours = task.outputs(model, task.collate(examples, "cpu"))
        reference = task.reference_outputs(model, examples, "cpu")
        alone = torch.cat([task.outputs(model, task.collate([e], "cpu")).logits() for e in examples])
    assert list(ours.counts) == list(reference.counts) == [e.num_scored for e in examples]
    assert torch.equal(ours.targets, reference.targets)
    assert torch.allclose(ours.logits(), reference.logits(), atol=1e-5)
    assert torch.allclose(ours.logits(), alone, atol=1e-5)


def test_words_are_labelled_at_their_first_token_or_their_last(tokenizer: Any) -> None:
    for last in (False, True):
        task = task_of(tokenizer, last=last)
        (example,) = encode(task, SPANS[:1]).examples
        text = SPANS[0]["text"]
        at = np.flatnonzero(example.trained) - 1  # a token per character, after the start
        assert [text[i] for i in at] == list("netoe." if last else "ALwtR.")
        assert [NAMES[i] for i in example.label] == ["B-PER", "I-PER", "O", "O", "B-LOC", "O"]


def test_classes_are_found_in_the_rows(tokenizer: Any) -> None:
    parts = TaskParts(tokenizer, columns={}, available=())
    assert NamedEntities.find_classes(parts, Rows.from_dicts(SPANS, name="a")) == NAMES
    assert NamedEntities.find_classes(parts, Rows.from_dicts(LISTS, name="a")) == NAMES
    with pytest.raises(DataError, match="no row has an entity"):
        NamedEntities.find_classes(parts, Rows.from_dicts(SPANS[1:2], name="a"))
    parts = TaskParts(tokenizer, columns={"word_tags": "tags"}, available=())
    assert WordTags.find_classes(parts, Rows.from_dicts(LISTS, name="a"))[0] == "B-LOC"
    with pytest.raises(DataError, match="two tags or more, found 'O'"):
        WordTags.find_classes(parts, Rows.from_dicts([{"tokens": ["a"], "tags": ["O"]}], name="a"))


def test_a_label_that_training_never_saw_is_named(tokenizer: Any) -> None:
    task = task_of(tokenizer)
    with pytest.raises(DataError, match=r"record 1: 'per' does not occur in the training data.*did you mean 'PER'"):
        encode(task, [{"text": "Ann", "spans": [[0, 3, "per"]]}], training=False)
    with pytest.raises(DataError, match="'ORG' does not occur") as caught:
        encode(task, [{"tokens": ["Ann"], "tags": ["B-ORG"]}], training=False)
    assert caught.value.key == "data.columns.tags"


def test_truncation_keeps_the_end_and_counts_entities_that_are_cut(tokenizer: Any) -> None:
    task = task_of(tokenizer)
    encoded = encode(task, SPANS[:1], max_length=7, too_long="truncate")  # the start, "Ann L" and the end
    (example,) = encoded.examples
    assert example.ids[-1] == 2 and len(example.ids) == 7
    assert [NAMES[i] for i in example.label] == ["B-PER", "I-PER"]
    counts = {entry["label"]: (entry["spans"], entry["cut"]) for entry in encoded.ledger.label_counts()}
    assert counts == {"LOC": (1, 1), "PER": (1, 0)}
    found = {f.kind: f.message for f in find(encoded.ledger)}
    assert found["spans_cut"] == "truncation cuts 1 of 2 entities"
    encoded = encode(task, SPANS[:1], max_length=4, too_long="truncate")
    assert {e["label"]: e["cut"] for e in encoded.ledger.label_counts()} == {"LOC": 1, "PER": 1}


def test_entities_inside_a_word_are_widened_and_said_so(tokenizer: Any) -> None:
    task = task_of(tokenizer)
    encoded = encode(task, [{"text": "proRome antiBob", "spans": [[3, 7, "LOC"], [8, 12, "PER"], [12, 15, "LOC"]]}])
    assert [NAMES[i] for i in encoded.examples[0].label] == ["B-LOC", "B-PER"]
    kinds = {f.kind for f in find(encoded.ledger)}
    assert {"widened", "shared_word"} <= kinds


def test_the_ledger_counts_scored_tokens_and_entities(tokenizer: Any) -> None:
    ledger = encode(task_of(tokenizer), SPANS).ledger
    report = ledger.report()
    assert report["trained"] == sum(len(e) for e in ([1] * 6, [1] * 2, [1], [1] * 9))
    assert [(e["label"], e["rows"], e["spans"]) for e in report["labels"]] == [("LOC", 3, 3), ("PER", 2, 3)]
    assert encode(task_of(tokenizer), SPANS, labelled=False).ledger.report()["labels"] is None


def test_scores_are_those_of_the_logits(tokenizer: Any, tiny: Any) -> None:
    task = task_of(tokenizer)
    model = model_of(tiny, task)
    batch = task.collate(encode(task, SPANS).examples, "cpu")
    outputs, columns = task.outputs(model, batch), task.score(model, batch)
    want = F.cross_entropy(outputs.logits(), outputs.targets, reduction="sum")
    assert columns["nll_sum"] == pytest.approx(float(want)) and columns["num_scored"] == len(outputs)
    assert columns["predictions"] == outputs.logits().argmax(-1).tolist()
    assert columns["references"] == outputs.targets.tolist()
    assert np.flatnonzero(columns["row_starts"]).tolist() == [0, 6, 8, 9]


class Fixed(torch.nn.Module):
    """A model that gives the class of each token id, with the same probability."""

    def __init__(self, classes: dict[int, int], num: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self._classes, self._num = classes, num

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, self._num)
        for (row, at), token in np.ndenumerate(input_ids.numpy()):
            logits[row, at, self._classes.get(int(token), 0)] = 3.0
        return type("Output", (), {"logits": logits})


def test_predictions_are_spans_of_the_given_text(tokenizer: Any) -> None:
    task = task_of(tokenizer)
    ids = {c: int(tokenizer(c)["input_ids"][1]) for c in "ALRY"}
    model = Fixed({ids["A"]: 3, ids["L"]: 4, ids["R"]: 2, ids["Y"]: 2}, len(NAMES))
    texts = ["\u00e9 Ann  Lee, Rome", "none", "Ann"]
    rows = Rows.from_dicts([task.row_from_text(text) for text in texts], name="input")
    found = list(task.predict(model, rows, batch_tokens=64, max_length=512))
    assert [[(s["start"], s["end"], s["label"], s["text"]) for s in r["spans"]] for r in found] == [
        [(2, 10, "PER", "Ann  Lee"), (12, 16, "LOC", "Rome")],
        [],
        [(0, 3, "PER", "Ann")],
    ]
    p = torch.tensor([3.0, 0, 0, 0, 0]).softmax(0)
    assert found[0]["spans"][0]["score"] == pytest.approx(float(p[0] + p[1]), rel=1e-5)
    lists = Rows.from_dicts([{"tokens": ["x", "Ann", "Lee"]}], name="input")
    (result,) = task.predict(model, lists, batch_tokens=64, max_length=512)
    assert [(s["tokens"], s["start"], s["end"]) for s in result["spans"]] == [([1, 3], 2, 9)]
    (result,) = task.predict(model, rows.select([0]), batch_tokens=64, max_length=6)
    assert result["note"] == "cut to 6 of 19 tokens" and result["spans"][0]["text"] == "Ann"


def test_word_tags_give_a_label_for_each_word(tokenizer: Any) -> None:
    task = WordTags(tokenizer, Annotations({"word_tags": "tags"}, {}, per_word=True), classes=["DET", "NOUN"])
    ids = {int(tokenizer("c")["input_ids"][1]): 1}
    rows = Rows.from_dicts([{"text": "the cat"}], name="input")
    (result,) = task.predict(Fixed(ids, 2), rows, batch_tokens=64, max_length=512)
    assert [(w["text"], w["label"]) for w in result["words"]] == [("the", "DET"), ("cat", "NOUN")]
    with pytest.raises(DataError, match=r"word 2: 'VERB' does not occur"):
        encode(task, [{"tokens": ["the", "runs"], "tags": ["DET", "VERB"]}])


def test_inputs_without_a_word_have_no_result(tokenizer: Any) -> None:
    task = task_of(tokenizer)
    rows = Rows.from_dicts(
        [{"text": "a"}, {"text": " "}, {"text": "\u200b"}, {"text": None}, {"text": 7}], name="input"
    )
    assert list(task.unusable(rows)) == [1, 2, 3]
    with pytest.raises(DataError, match="no column 'text'"):
        task.unusable(Rows.from_dicts([{"x": 1}], name="input"))


def test_causal_models_score_the_last_token() -> None:
    from peftlab.models import is_causal
    from tests.family_examples import make_config

    names = {"LlamaConfig": True, "GPT2Config": True, "BertConfig": False, "T5Config": False, "ModernBertConfig": False}
    assert {name: is_causal(make_config(name)) for name in names} == names
