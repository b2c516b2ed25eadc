"""Extractive question answering: the loss against transformers', steps in micro-batches, padding, spans, predictions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peftlab.data import BatchPlan, Rows
from peftlab.data.findings import find, require
from peftlab.errors import DataError
from peftlab.tasks.example import Example
from peftlab.tasks.extractive_qa import ExtractiveQA
from peftlab.tasks.spans import Source, Span, best_of_row, best_spans

CONTEXTS = ["The cat lives in Paris, the dog in Rome. " + "So it is. " * i for i in range(5)]
ROWS = [
    {"question": f"Where is the {pet}?", "context": context, "answers": [city] if city else []}
    for context in CONTEXTS
    for pet, city in (("cat", "Paris"), ("dog", "Rome"), ("fox", ""))
]
WINDOW = 64


def rows_of(rows: list[dict[str, Any]] = ROWS) -> Rows:
    return Rows.from_dicts(rows, name="a")


@pytest.fixture
def tokenizer(tokenizer_of: Callable[[str], Any]) -> Any:
    """A tokenizer like BERT's, with types."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of("tiny:bert")
    tokenizer.cls_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    )
    return tokenizer


def task_of(tokenizer: Any, **options: Any) -> ExtractiveQA:
    return ExtractiveQA(tokenizer, **{"columns": {}, "window": WINDOW, "stride": 8, "token_types": 2, **options})


def encode(task: ExtractiveQA, rows: list[dict[str, Any]] = ROWS, **options: Any) -> Any:
    return task.encode(rows_of(rows), **{"max_length": WINDOW, "too_long": "error", "training": True, **options})


@pytest.fixture
def model() -> Any:
    """A BERT whose outputs depend on every token, its type and its place, in float64."""
    from tests.family_examples import make_config, make_model

    return make_model(make_config("BertConfig"), "AutoModelForQuestionAnswering").double()


def own_logits(model: Any, example: Example) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] logits of start and end of a window alone, by transformers."""
    found = model(
        input_ids=torch.from_numpy(example.ids.astype(np.int64))[None],
        token_type_ids=torch.from_numpy(example.extra["token_type_ids"].astype(np.int64))[None],
    )
    return found.start_logits[0], found.end_logits[0]


def by_hand(model: Any, examples: list[Example]) -> torch.Tensor:
    """Mean over windows of the mean of two cross-entropies, each over the positions where an answer may be."""
    losses = []
    for example in examples:
        allowed = torch.from_numpy(example.extra["can_answer"]).bool()
        for logits, target in zip(own_logits(model, example), np.asarray(example.label).tolist(), strict=True):
            losses.append(-logits.masked_fill(~allowed, -math.inf).log_softmax(-1)[target])
    return torch.stack(losses).mean()


def step_loss(task: Any, model: Any, examples: list[Example], grouping: str, batch_size: int) -> torch.Tensor:
    """The loss of one optimizer step over all windows, as the loop computes it."""
    lengths = [len(e) for e in examples]
    plan = BatchPlan(lengths, batch_size=batch_size, accumulate=99, grouping=grouping, max_steps=1, split_cost=0)
    parts = [[examples[i] for i in part] for part in plan.step(0).micro_batches]
    weight = sum(e.weight for part in parts for e in part)
    return sum(task.loss_sum(model, task.collate(part, "cpu")) for part in parts) / weight


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros(1, dtype=torch.float64) if g is None else g for g in found]


@pytest.mark.parametrize(("grouping", "batch_size"), [("none", 1), ("none", 4), ("step", 99), ("step", 3)])
def test_the_loss_of_a_step_does_not_depend_on_its_micro_batches(
    tokenizer: Any, model: Any, grouping: str, batch_size: int
) -> None:
    task = task_of(tokenizer)
    examples = encode(task).examples
    assert len(examples) > len(ROWS)
    wanted, loss = by_hand(model, examples), step_loss(task, model, examples, grouping, batch_size)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-9)
    for one, other in zip(gradients(model, wanted), gradients(model, loss), strict=True):
        assert (one - other).abs().max() <= 1e-9 * max(1.0, float(one.abs().max()))


def test_a_loss_that_reads_padding_is_caught(tokenizer: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(tokenizer)
    examples = encode(task).examples
    monkeypatch.setattr(
        "peftlab.tasks.extractive_qa.at_least_float32", lambda logits: logits + 0.1 * logits.abs().mean()
    )
    monkeypatch.setattr(torch.Tensor, "masked_fill", lambda self, mask, value: self)
    with pytest.raises(AssertionError):
        assert float(step_loss(task, model, examples, "none", 4)) == pytest.approx(float(by_hand(model, examples[:1])))


def test_the_loss_of_a_window_without_a_mask_is_that_of_transformers(tokenizer: Any, model: Any) -> None:
    """transformers lets answers start in the question too: with all positions allowed both are equal."""
    task = task_of(tokenizer)
    for example in encode(task).examples[:4]:
        everywhere = {**example.extra, "can_answer": np.ones(len(example), dtype=np.int8)}
        open_example = Example(example.ids, 0, 2.0, label=example.label, extra=everywhere, scored=2)
        ours = task.loss_sum(model, task.collate([open_example], "cpu")) / open_example.weight
        start, end = torch.from_numpy(np.asarray(example.label)).split(1)
        theirs = model(
            input_ids=torch.from_numpy(example.ids.astype(np.int64))[None],
            token_type_ids=torch.from_numpy(example.extra["token_type_ids"].astype(np.int64))[None],
            start_positions=start,
            end_positions=end,
        ).loss
        assert float(ours) == pytest.approx(float(theirs), rel=1e-12)


@pytest.mark.parametrize("padding", ["right", "none"])
def test_outputs_are_those_of_a_window_alone_and_of_the_reference(tokenizer: Any, model: Any, padding: Any) -> None:
    task = task_of(tokenizer, padding=padding)
    examples = encode(task).examples
    outputs = task.outputs(model, task.collate(examples, "cpu"))
    reference = task.reference_outputs(model, examples, "cpu")
    assert outputs.values.shape == (2 * len(examples), WINDOW) and outputs.counts == [2] * len(examples)
    assert torch.equal(outputs.targets, reference.targets)
    for i, example in enumerate(examples):
        allowed = torch.from_numpy(example.extra["can_answer"]).bool()
        for side, logits in enumerate(own_logits(model, example)):
            for found in (outputs.values[2 * i + side], reference.values[2 * i + side]):
                assert torch.allclose(found[: len(example)][allowed], logits[allowed], rtol=1e-9, atol=1e-9)
                assert (found > -math.inf).sum() == allowed.sum()


def test_types_are_read_where_the_model_has_them(tokenizer: Any, model: Any) -> None:
    with_types, without = task_of(tokenizer), task_of(tokenizer, token_types=0)
    examples = encode(with_types).examples[:3]
    batch, plain = with_types.collate(examples, "cpu"), without.collate(examples, "cpu")
    assert "token_type_ids" in batch.inputs and "token_type_ids" not in plain.inputs
    assert int(batch.inputs["token_type_ids"].max()) == 1
    typed = with_types.outputs(model, batch).values
    # A teacher and a student share the batch of one of them.
    assert torch.equal(with_types.outputs(model, plain).values, typed)
    assert torch.equal(without.outputs(model, batch).values, without.outputs(model, plain).values)
    assert not torch.equal(without.outputs(model, plain).values, typed)


def test_ledger_counts_rows_windows_and_answers(tokenizer: Any) -> None:
    rows = [*ROWS, {"question": "Where?", "context": "in Paris or in Paris", "answers": ["Paris"]}]
    encoded = encode(task_of(tokenizer), rows)
    report, examples = encoded.ledger.report(), encoded.examples
    found = report["questions"]
    assert (report["rows"], report["kept"], found["windows"]) == (16, 16, len(examples))
    assert found["rows_without_answer"] == 5 and found["rows_labelled"] == 16
    nulls = [e for e in examples if np.asarray(e.label).tolist() == [0, 0]]
    assert found["windows_with_answer"] == len(examples) - len(nulls) > 10
    assert encoded.ledger.lengths.tolist() == encoded.lengths.tolist()
    assert report["tokens"] == int(encoded.lengths.sum())
    (ambiguous,) = [f for f in find(encoded.ledger) if f.kind == "ambiguous_answer"]
    assert ambiguous.rows is not None and ambiguous.rows.tolist() == [15]
    assert len({e.key for e in examples}) == len(examples)
    assert encode(task_of(tokenizer), rows, keep=False).ledger.report() == report


def test_data_without_any_answer_is_refused_for_training(tokenizer: Any) -> None:
    none = [row for row in ROWS if not row["answers"]]
    ledger = encode(task_of(tokenizer), none).ledger
    require(ledger, training=False)
    with pytest.raises(DataError, match="none of the 5 rows has an answer"):
        require(ledger)
    all_of_them = [row for row in ROWS if row["answers"]]
    assert "always_answered" in {f.kind for f in find(encode(task_of(tokenizer), all_of_them).ledger)}
    always = task_of(tokenizer, null_threshold=None)
    assert "always_answered" not in {f.kind for f in find(encode(always, all_of_them).ledger)}
    assert "never_withheld" in {f.kind for f in find(encode(always).ledger)}


def _source(length: int, null: int = 0) -> Source:
    places = np.arange(length, dtype=np.int32)
    return Source("abcdefghijklmnopqrstuvwxyz"[:length], places, places + 1, 1, null)


@pytest.mark.parametrize("longest", [1, 3, 99])
def test_best_spans_are_those_of_a_search(longest: int) -> None:
    generator = torch.Generator().manual_seed(longest)
    lengths = [3, 7, 12]
    examples = [Example(np.zeros(n + 1, np.int32), 0, 2.0, reference=_source(n)) for n in lengths for _ in range(20)]
    logits = torch.full((len(examples), 2, 16), -math.inf)
    for i, example in enumerate(examples):
        logits[i, :, : len(example)] = 3 * torch.randn(2, len(example), generator=generator)
    for i, span in enumerate(best_spans(logits, examples, max_tokens=longest)):
        count = len(examples[i])
        pairs = [(s, e) for s in range(1, count) for e in range(s, min(count, s + longest))]
        start, end = max(pairs, key=lambda pair: float(logits[i, 0, pair[0]] + logits[i, 1, pair[1]]))
        assert span.text == examples[i].reference.context[start - 1 : end] and span.start == start - 1
        assert span.score == pytest.approx(float(logits[i, 0, start] + logits[i, 1, end]))
        assert span.null_score == pytest.approx(float(logits[i, :, 0].sum()))
        p = logits[i].softmax(-1)
        assert span.probability == pytest.approx(float(p[0, start] * p[1, end]), rel=1e-4)
        assert span.null_probability == pytest.approx(float(p[0, 0] * p[1, 0]), rel=1e-4)


def test_a_window_without_context_has_no_span() -> None:
    example = Example(np.zeros(1, np.int32), 0, 2.0, reference=_source(0))
    logits = torch.full((1, 2, 4), -math.inf)
    logits[:, :, 0] = 1.0
    (span,) = best_spans(logits, [example], max_tokens=5)
    assert span.text == "" and span.score == -math.inf and span.null_probability == 1.0
    assert best_of_row([span], None)["answer"] == ""


def test_no_answer_needs_every_window() -> None:
    spans = [Span("cat", 3, 5.0, 7.0, 0.1, 0.8), Span("dog", 9, 6.0, 6.5, 0.3, 0.5)]
    none = {"answer": "", "start": None, "end": None, "probability": 0.3, "no_answer_probability": 0.5}
    found = none | {"answer": "dog", "start": 9, "end": 12}
    assert best_of_row(spans, 0.0) == none
    assert best_of_row(spans, 0.5) == best_of_row(spans, None) == found


def test_predictions_are_places_in_the_context(tokenizer: Any, model: Any) -> None:
    task = task_of(tokenizer, null_threshold=None, max_answer_tokens=6)
    rows = rows_of([{k: row[k] for k in ("question", "context")} for row in ROWS])
    together = list(task.predict(model, rows, batch_tokens=1000, max_length=WINDOW))
    alone = [next(task.predict(model, rows.select([i]), batch_tokens=1, max_length=WINDOW)) for i in range(len(rows))]
    for row, result, again in zip(ROWS, together, alone, strict=True):
        assert result["answer"] and row["context"][result["start"] : result["end"]] == result["answer"]
        assert result["answer"] == again["answer"] and result["probability"] == pytest.approx(again["probability"])
    always_none = task_of(tokenizer, null_threshold=-math.inf)
    assert {r["answer"] for r in always_none.predict(model, rows, batch_tokens=1000, max_length=WINDOW)} == {""}


def test_score_gives_one_answer_per_window(tokenizer: Any, model: Any) -> None:
    task = task_of(tokenizer)
    examples = encode(task).examples
    columns = task.score(model, task.collate(examples, "cpu"))
    logits, targets = (
        task.outputs(model, task.collate(examples, "cpu")).values,
        np.concatenate([e.label for e in examples]),
    )
    assert columns["nll_sum"] == pytest.approx(
        float(F.cross_entropy(logits, torch.from_numpy(targets), reduction="sum"))
    )
    assert columns["num_scored"] == 2 * len(examples)
    assert [a["row"] for a in columns["found_answers"]] == [e.row for e in examples]
    assert columns["right_answers"] == [list(ROWS[e.row]["answers"]) for e in examples]


def test_inputs_of_predict(tokenizer: Any) -> None:
    task = task_of(tokenizer, columns={"question": "q", "context": "c"})
    row = {"q": "Who?", "c": "Ann."}
    assert task.row_from_text(json.dumps(row)) == row
    for text in ("Who?", '{"q": "Who?"}', "[1]"):
        with pytest.raises(DataError, match="expected a question and its context as one JSON object"):
            task.row_from_text(text)
    rows = Rows.from_dicts([row, {"q": "", "c": "a"}, {"q": "Who?", "c": None}, {"q": "why " * 40, "c": "a"}], name="a")
    problems = task.unusable(rows)
    assert problems[1] == "the question is empty" and problems[2] == "the context is empty"
    assert problems[3].startswith("the question has 160 tokens") and list(problems) == [1, 2, 3]
    with pytest.raises(DataError, match="no column 'c'"):
        task.unusable(Rows.from_dicts([{"q": "a"}], name="a"))
