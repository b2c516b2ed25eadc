"""Sequence to sequence: loss and gradients against transformers' own, both sides' padding and limits, what is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peftlab.adapters import HeadLoss
from peftlab.data import BatchPlan, Rows, require
from peftlab.errors import DataError, RecipeError
from peftlab.models import decoder_start, reconcile
from peftlab.models.tiny import tiny_tokenizer
from peftlab.tasks import TaskParts
from peftlab.tasks.seq2seq import Seq2Seq
from tests.family_examples import TRANSLATORS, make_config, make_model
from tests.task_settings import default_settings

ROWS = Rows.from_dicts(
    [
        {"source": "Save and close", "target": "Sichern"},
        {"source": "No", "target": "Das ist eine lange Antwort"},
        {"source": "A longer source than the others", "target": "Nein"},
    ],
    name="rows.jsonl",
)
SHIFTED = ("T5Config", "BartConfig", "MBartConfig", "MarianConfig", "PegasusConfig", "M2M100Config", "LEDConfig")


def model_of(name: str = "T5Config", *, dtype: torch.dtype = torch.float64) -> Any:
    model = make_model(make_config(name, TRANSLATORS), "AutoModelForSeq2SeqLM").to(dtype)
    reconcile(model, tiny_tokenizer())
    bias = getattr(model, "final_logits_bias", None)
    if bias is not None:
        bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(2)))
    return model


def task_of(model: Any, *, max_target_length: int | None = None, start: int | None = None, **settings: Any) -> Seq2Seq:
    parts = TaskParts(
        tiny_tokenizer(),
        columns={},
        available=("source", "target"),
        head_loss=HeadLoss("auto"),
        decoder_start=decoder_start(model.config) if start is None else start,
        max_target_length=max_target_length,
        settings=default_settings(Seq2Seq.spec, **settings),
    )
    return Seq2Seq.make(parts)


def examples_of(task: Seq2Seq, **options: Any) -> list[Any]:
    return task.encode(ROWS, **{"max_length": 100, "too_long": "error", "training": True, **options}).examples


def own_loss(model: Any, examples: list[Any], task: Seq2Seq) -> torch.Tensor:
    """The sum of transformers' own loss, row by row, without padding."""
    total = torch.zeros(())
    for example in examples:
        source, target = example.ids[~example.trained], example.ids[example.trained]
        labels = torch.from_numpy(target.astype(np.int64))[None]
        out = model(input_ids=torch.from_numpy(source.astype(np.int64))[None], labels=labels)
        total = total + F.cross_entropy(out.logits[0], labels[0], reduction="sum")
        assert torch.allclose(out.loss * len(target), F.cross_entropy(out.logits[0], labels[0], reduction="sum"))
    return total


@pytest.mark.parametrize("name", SHIFTED)
def test_loss_and_gradients_are_those_of_transformers(name: str) -> None:
    # In float64 transformers' LED has nan in the gradients of padded windows.
    exact = name != "LEDConfig"
    model = model_of(name, dtype=torch.float64 if exact else torch.float32)
    task = task_of(model)
    examples = examples_of(task)
    loss = own_loss(model, examples, task)
    loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours = task.loss_sum(model, task.collate(examples, "cpu"))
    ours.backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert float(ours) == pytest.approx(float(loss), rel=1e-9 if exact else 1e-5)
    assert want.keys() == got.keys() and len(want) > 10
    for key, gradient in want.items():
        assert torch.allclose(got[key], gradient, rtol=1e-7 if exact else 1e-3, atol=1e-9 if exact else 1e-4), key


@pytest.mark.parametrize("name", SHIFTED)
def test_reference_outputs_agree(name: str) -> None:
    model = model_of(name)
    task = task_of(model)
    examples = examples_of(task)
    ours = task.outputs(model, task.collate(examples, "cpu"))
    reference = task.reference_outputs(model, examples, "cpu")
    assert torch.equal(ours.targets, reference.targets) and list(ours.counts) == list(reference.counts)
    assert torch.allclose(ours.logits(), reference.logits(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SHIFTED)
def test_row_gets_the_same_outputs_in_a_batch_and_alone(name: str) -> None:
    model = model_of(name)
    task = task_of(model)
    examples = examples_of(task)
    together = task.outputs(model, task.collate(examples, "cpu")).logits()
    alone = torch.cat([task.outputs(model, task.collate([e], "cpu")).logits() for e in examples])
    assert torch.allclose(together, alone, rtol=1e-9, atol=1e-9)


def test_cut_into_micro_batches_gives_the_same_gradient() -> None:
    model = model_of("BartConfig")
    task = task_of(model)
    examples = examples_of(task)
    whole = torch.autograd.grad(task.loss_sum(model, task.collate(examples, "cpu")), model.model.shared.weight)[0]
    parts = [
        torch.autograd.grad(task.loss_sum(model, task.collate(part, "cpu")), model.model.shared.weight)[0]
        for part in ([examples[2]], examples[:2])
    ]
    assert torch.allclose(whole, parts[0] + parts[1], rtol=1e-9, atol=1e-12)


def test_another_start_of_the_decoder_is_refused() -> None:
    model = model_of("BartConfig")
    task = task_of(model, start=5)
    with pytest.raises(RecipeError, match="starts its targets with other tokens"):
        task.loss_sum(model, task.collate(examples_of(task), "cpu"))


def test_logits_that_are_not_the_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("T5Config")
    task = task_of(model)
    monkeypatch.setattr("peftlab.tasks.source_head._bias", lambda model: torch.full((260,), 3.0))
    with pytest.raises(RecipeError, match="differ from the model's own"):
        task.loss_sum(model, task.collate(examples_of(task), "cpu"))


def test_target_ends_and_source_is_not_trained() -> None:
    task = task_of(model_of())
    first = examples_of(task)[0]
    tokenizer = task.tokenizer
    assert tokenizer.decode(first.ids[~first.trained]) == "Save and close"
    assert tokenizer.decode(first.ids[first.trained]) == "Sichern<|im_end|>"
    assert first.weight == first.trained.sum() == first.num_scored


def test_prefix_stands_before_the_source() -> None:
    task = task_of(model_of(), prefix="translate: ")
    first = examples_of(task)[0]
    assert task.tokenizer.decode(first.ids[~first.trained]) == "translate: Save and close"


def test_batches_count_and_group_by_the_tokens_of_both_sides() -> None:
    """Long sources with short targets are as long as short sources with long targets."""
    rows = [{"source": "s" * n, "target": "t" * (40 - n)} for n in (5, 35, 20)] + [{"source": "s", "target": "t"}] * 3
    task = task_of(model_of())
    encoded = task.encode(Rows.from_dicts(rows, name="rows"), max_length=100, too_long="error", training=True)
    assert len(set(encoded.lengths[:3].tolist())) == 1
    assert encoded.lengths.tolist() == [len(e.ids) for e in encoded.examples]
    plan = BatchPlan(encoded.lengths, batch_size=3, grouping="epoch", epochs=1, seed=0)
    parts = {frozenset(map(int, part)) for i in range(plan.total_steps) for part in plan.step(i).micro_batches}
    assert parts == {frozenset({0, 1, 2}), frozenset({3, 4, 5})}


def test_both_sides_have_their_limit() -> None:
    task = task_of(model_of(), max_target_length=10)
    encoded = task.encode(ROWS, max_length=14, too_long="truncate", training=True)
    lengths = [(int((~e.trained).sum()), int(e.trained.sum())) for e in encoded.examples]
    assert lengths == [(14, 8), (2, 10), (14, 5)]
    report = encoded.ledger.report()
    assert {entry["reason"]: entry["rows"] for entry in report["left_out"]} == {
        "truncated: longer than data.max_length (14 tokens)": 1,
        "truncated: longer than data.max_target_length (10 tokens)": 1,
    }
    assert [(side["key"], side["max"]) for side in report["sides"]] == [
        ("data.max_length", 31),
        ("data.max_target_length", 27),
    ]
    assert report["answers"]["ended"] == 2  # a cut target does not teach to stop there
    dropped = task.encode(ROWS, max_length=14, too_long="drop", training=True)
    assert [e.row for e in dropped.examples] == [0]


def test_refused_target_names_its_key() -> None:
    task = task_of(model_of(), max_target_length=10)
    encoded = task.encode(ROWS, max_length=100, too_long="error", training=True)
    with pytest.raises(
        DataError, match=r"record 2: 1 row has more target tokens than the limit of 10 \(up to 27\)"
    ) as caught:
        require(encoded.ledger)
    assert "data.max_target_length" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"source": "a", "target": " "}, "record 2: the target is empty; fill it in, or set data.empty=drop"),
        ({"source": None, "target": "b"}, "record 2: the text is empty"),
        ({"source": ["a"], "target": "b"}, r"record 2: expected text, found \['a'\]"),
    ],
)
def test_bad_row_is_named(row: dict[str, Any], message: str) -> None:
    rows = Rows.from_dicts([{"source": "a", "target": "b"}, row], name="rows.jsonl")
    with pytest.raises(DataError, match=message):
        task_of(model_of()).encode(rows, max_length=100, too_long="error", training=True)


def test_missing_target_column_is_named() -> None:
    rows = Rows.from_dicts([{"source": "a", "taget": "b"}], name="rows.jsonl")
    with pytest.raises(DataError, match=r"no column 'target'.*did you mean 'taget'"):
        task_of(model_of()).encode(rows, max_length=100, too_long="error", training=True)


@pytest.mark.parametrize("name", ["T5Config", "BartConfig", "MBartConfig", "MarianConfig"])
def test_written_target_is_the_greedy_one(name: str) -> None:
    """Greedy by hand, one token at a time without a cache, against batches of ``generate``."""
    model = model_of(name, dtype=torch.float32)
    model.generation_config.forced_eos_token_id = None
    model.config.forced_eos_token_id = None
    task = task_of(model)
    start = model.config.decoder_start_token_id
    if start is None:
        model.generation_config.decoder_start_token_id = start = 7
    answers = dict(task.write_answers(model, ROWS, batch_tokens=999, max_new_tokens=6, temperature=0.0, top_p=1.0))
    for index, example in enumerate(examples_of(task)):
        source = torch.from_numpy(example.ids[~example.trained].astype(np.int64))[None]
        written = [start]
        while (len(written) < 7 and written[-1] not in task._stop_ids) or len(written) == 1:
            with torch.no_grad():
                logits = model(input_ids=source, decoder_input_ids=torch.tensor([written])).logits[0, -1]
            if name == "MarianConfig":
                logits[task.tokenizer.pad_token_id] = -torch.inf  # its generation config says so
            written.append(int(logits.argmax()))
        assert answers[index].tolist() == written[1:]


def test_scores_count_tokens_and_rows() -> None:
    model = model_of()
    task = task_of(model)
    examples = task.encode(ROWS, max_length=100, too_long="error", training=False).examples
    batch = task.collate(examples, "cpu")
    scores, logits = task.score(model, batch), task.outputs(model, batch).logits()
    targets = torch.cat([torch.from_numpy(e.ids[e.trained].astype(np.int64)) for e in examples])
    assert scores["nll_sum"] == pytest.approx(float(F.cross_entropy(logits, targets, reduction="sum")))
    assert scores["num_correct"] == int((logits.argmax(-1) == targets).sum())
    written = task.score_answers(model.float(), task.collate(examples, "cpu"))
    assert written["reference_texts"] == ["Sichern", "Das ist eine lange Antwort", "Nein"]
    assert len(written["answers"]) == 3


def test_answers_replace_the_targets() -> None:
    task = task_of(model_of())
    stop = task.tokenizer.eos_token_id
    answers = [np.array([20, 21, stop]), np.array([stop]), np.array([30])]
    encoded = task.encode_answers(ROWS, answers, max_length=8)
    assert [e.row for e in encoded.examples] == [0, 2]
    assert [e.ids[e.trained].tolist() for e in encoded.examples] == [[20, 21, stop], [30]]
    assert [(~e.trained).sum() for e in encoded.examples] == [8, 8]
