"""Masked language modelling: the loss and gradients of transformers, blocks, fresh masks, a row alone, predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from peftlab.adapters import HeadLoss
from peftlab.data import BatchPlan
from peftlab.errors import DataError, RecipeError
from peftlab.tasks import Example
from peftlab.tasks.masked_head import MaskedHead
from peftlab.tasks.masked_lm import MaskedLM
from tests.family_examples import FILLERS, make_config, make_model
from tests.masked_examples import make_bert, masked_tokenizer, rows_of

TEXTS = ["a red cat", "the cow sleeps in the green grass", "dog", "blue cat runs", "x" * 50, "a dog and a cow run"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return masked_tokenizer()


def make_task(tokenizer: Any, **options: Any) -> MaskedLM:
    return MaskedLM(tokenizer, num_embeddings=260, **{"head_loss": HeadLoss("auto"), **options})


def encode(task: MaskedLM, texts: list[Any], **options: Any) -> Any:
    return task.encode(rows_of(texts), **{"max_length": 64, "too_long": "error", "training": True, **options})


def labels_of(task: MaskedLM, examples: list[Example]) -> dict[str, torch.Tensor]:
    """The inputs of transformers' own loss, by its conventions."""
    longest = max(map(len, examples))
    inputs = {
        name: torch.full((len(examples), longest), fill) for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
    }  # fmt: skip
    for row, e in enumerate(examples):
        assert e.trained is not None and isinstance(e.label, np.ndarray)
        inputs["input_ids"][row, : len(e)] = torch.tensor(e.ids)
        inputs["attention_mask"][row, : len(e)] = 1
        inputs["labels"][row, : len(e)] = torch.tensor(np.where(e.trained, e.label, -100))
    return inputs


@pytest.mark.parametrize(
    ("family", "head_loss"), [("BertConfig", "auto"), ("BertConfig", "reference"), ("EsmConfig", "auto")]
)
def test_loss_and_gradients_equal_transformers_own(tokenizer: Any, family: str, head_loss: str) -> None:
    """ESM has a bias beside its output layer, which is 0 at first, so that only its gradient shows it."""
    model = (
        make_bert()
        if family == "BertConfig"
        else make_model(make_config(family, FILLERS), "AutoModelForMaskedLM").eval()
    )
    task, model = make_task(tokenizer, head_loss=HeadLoss(head_loss)), model.double()
    examples = encode(task, TEXTS).examples
    total = sum(e.weight for e in examples)
    (task.loss_sum(model, task.collate(examples, "cpu")) / total).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    want = model(**labels_of(task, examples)).loss
    want.backward()
    loss = float(task.loss_sum(model, task.collate(examples, "cpu"))) / total
    assert loss == pytest.approx(float(want), rel=1e-9)
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-7, atol=1e-12)


def test_targets_that_the_model_sees_are_caught(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault: the loss compares with the masked input instead of the original tokens."""
    right = MaskedLM.collate

    def wrong(self: MaskedLM, examples: list[Example], device: Any) -> Any:
        batch = right(self, examples, device)
        return type(batch)(**{**batch.__dict__, "labels": batch.input_ids})

    monkeypatch.setattr(MaskedLM, "collate", wrong)
    with pytest.raises(AssertionError):
        test_loss_and_gradients_equal_transformers_own(tokenizer, "BertConfig", "auto")


@pytest.mark.parametrize(("grouping", "batch_size"), [("none", 1), ("none", 3), ("step", 2), ("step", 4)])
def test_any_cut_of_a_step_has_the_same_gradient(tokenizer: Any, grouping: str, batch_size: int) -> None:
    task, model = make_task(tokenizer), make_bert().double()
    encoded = encode(task, TEXTS)

    def gradient(parts: list[list[Example]]) -> torch.Tensor:
        model.zero_grad()
        weight = sum(e.weight for part in parts for e in part)
        for part in parts:
            (task.loss_sum(model, task.collate(part, "cpu")) / weight).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plan = BatchPlan(
        encoded.lengths, batch_size=batch_size, accumulate=99, grouping=grouping, max_steps=1, split_cost=0
    )
    cut = gradient([[encoded.examples[i] for i in part] for part in plan.step(0).micro_batches])
    whole = gradient([encoded.examples])
    assert float((cut - whole).abs().max() / whole.abs().max()) < 1e-9


@pytest.mark.parametrize("padding", ["right", "none"])
def test_row_in_a_batch_equals_the_row_alone(tokenizer: Any, padding: Any) -> None:
    task, model = make_task(tokenizer, padding=padding), make_bert()
    examples = encode(task, TEXTS).examples
    with torch.no_grad():
        together = task.outputs(model, task.collate(examples, "cpu"))
        alone = torch.cat([task.outputs(model, task.collate([e], "cpu")).logits() for e in examples])
        reference = task.reference_outputs(model, examples, "cpu")
    torch.testing.assert_close(together.logits(), alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.logits(), reference.logits(), rtol=1e-4, atol=1e-5)
    assert together.targets is not None and reference.targets is not None
    assert together.targets.tolist() == reference.targets.tolist()
    assert list(together.counts) == list(reference.counts) == [e.num_scored for e in examples]


def test_output_layer_runs_at_the_masked_positions_only(tokenizer: Any) -> None:
    task, model = make_task(tokenizer, head_loss=HeadLoss("reference")), make_bert()
    examples = encode(task, TEXTS).examples
    task.outputs(model, task.collate(examples, "cpu"))  # the first call compares with the full logits
    seen: list[int] = []
    hook = model.cls.predictions.decoder.register_forward_hook(lambda m, a, out: seen.append(out.numel() // 260))
    task.loss_sum(model, task.collate(examples, "cpu"))
    hook.remove()
    assert seen == [1, sum(e.num_scored for e in examples)]


def test_head_without_an_output_layer_of_its_own_gives_logits(tokenizer: Any) -> None:
    """MobileBERT multiplies with a joined matrix, so its output layer never runs."""
    from transformers import MobileBertConfig, MobileBertForMaskedLM

    torch.manual_seed(0)
    config = MobileBertConfig(
        vocab_size=260, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, embedding_size=16,
        intra_bottleneck_size=32,
    )  # fmt: skip
    task, model = make_task(tokenizer), MobileBertForMaskedLM(config).eval()
    examples = encode(task, TEXTS).examples
    with torch.no_grad():
        outputs = task.outputs(model, task.collate(examples, "cpu"))
        want = task.reference_outputs(model, examples, "cpu")
    assert outputs.head is None and outputs.values.shape == (len(want), 260)
    torch.testing.assert_close(outputs.logits(), want.logits(), rtol=1e-4, atol=1e-4)


def test_output_layer_whose_result_is_changed_is_not_used(tokenizer: Any) -> None:
    """Something that only the logits show, such as the bias of a trained ESM."""
    model = make_bert()
    model.cls.predictions.register_forward_hook(lambda m, a, out: out + torch.linspace(-3, 3, 260))
    task = make_task(tokenizer)
    examples = encode(task, TEXTS).examples
    outputs = task.outputs(model, task.collate(examples, "cpu"))
    assert outputs.head is None
    want = task.reference_outputs(model, examples, "cpu")
    torch.testing.assert_close(outputs.logits(), want.logits(), rtol=1e-4, atol=1e-4)


def test_redrawn_example_keeps_its_weight_and_its_text(tokenizer: Any) -> None:
    task = make_task(tokenizer)
    example = encode(task, TEXTS).examples[1]
    drawn = [task.redraw(example, np.random.default_rng([0, step, 1])) for step in range(8)]
    again = task.redraw(drawn[0], np.random.default_rng([0, 3, 1]))
    assert (again.ids == drawn[3].ids).all()
    assert len({tuple(np.flatnonzero(e.trained).tolist()) for e in drawn}) > 4
    for e in drawn:
        assert e.weight == example.weight and len(e) == len(example)
        assert isinstance(e.label, np.ndarray) and isinstance(example.label, np.ndarray)
        assert (e.label == example.label).all()


def test_fixed_masks_do_not_depend_on_the_other_rows(tokenizer: Any) -> None:
    task = make_task(tokenizer)
    whole, part = encode(task, TEXTS).examples, encode(task, TEXTS[3:]).examples
    assert all((a.ids == b.ids).all() for a, b in zip(whole[3:], part, strict=True))


def test_long_text_is_split_without_loss(tokenizer: Any) -> None:
    task = make_task(tokenizer)
    text = "".join(chr(97 + i % 26) for i in range(100))
    encoded = encode(task, [text, "short"], max_length=20, too_long="split")
    blocks = [e for e in encoded.examples if e.row == 0]
    assert [e.part for e in blocks] == list(range(6)) and [len(e) for e in blocks] == [20] * 5 + [12]
    originals = [np.asarray(e.label).tolist() for e in blocks]
    assert all(ids[0] == 3 and ids[-1] == 2 for ids in originals)
    whole = tokenizer(text)["input_ids"]
    assert [i for ids in originals for i in ids[1:-1]] == whole[1:-1]
    report = encoded.ledger.report()
    assert (report["kept"], report["blocks"]) == (2, 7)
    assert report["trained"] == sum(e.weight for e in encoded.examples)
    assert report["left_out"][0]["reason"].startswith("split into blocks")
    assert encoded.ledger.lengths.tolist() == encoded.lengths.tolist()
    assert encoded.ledger.trained.tolist() == [e.weight for e in encoded.examples]


def test_blocks_without_room_for_text_are_refused(tokenizer: Any) -> None:
    with pytest.raises(RecipeError, match="no room for text"):
        encode(make_task(tokenizer), ["a long text"], max_length=2, too_long="split")


@pytest.mark.parametrize(("too_long", "kept"), [("truncate", 1), ("drop", 0)])
def test_long_text_is_truncated_or_dropped(tokenizer: Any, too_long: str, kept: int) -> None:
    encoded = encode(make_task(tokenizer), ["x" * 30], max_length=12, too_long=too_long)
    assert len(encoded.examples) == kept
    for e in encoded.examples:
        assert len(e) == 12 and e.ids[-1] == 2


def test_preview_marks_the_masked_tokens(tokenizer: Any) -> None:
    task = make_task(tokenizer)
    example = encode(task, TEXTS).examples[1]
    shown = task.preview(rows_of(TEXTS), 1, max_length=64)
    assert "".join(text for text, _, _ in shown.segments) == f"<|unk|>{TEXTS[1]}<|im_end|>"
    assert sum(len(text) for text, _, trained in shown.segments if trained) == example.weight


def test_empty_text_is_refused_with_its_place(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"a\.txt:2: the text is empty"):
        encode(make_task(tokenizer), ["a", "  "])


def test_score_equals_transformers_loss(tokenizer: Any) -> None:
    task, model = make_task(tokenizer), make_bert()
    examples = encode(task, TEXTS).examples
    with torch.no_grad():
        scores = task.score(model, task.collate(examples, "cpu"))
        own = model(**labels_of(task, examples))
    labels = labels_of(task, examples)["labels"]
    assert scores["nll_sum"] / scores["num_tokens"] == pytest.approx(float(own.loss), rel=1e-5)
    assert scores["num_correct"] == int((own.logits.argmax(-1) == labels).sum())


def test_prediction_fills_every_mask(tokenizer: Any) -> None:
    task, model = make_task(tokenizer), make_bert()
    rows = rows_of(["a [MASK] cat <mask>", "no mask", "x <|im_start|>"])
    unusable = task.unusable(rows)
    assert list(unusable) == [1] and "no <|im_start|> or [MASK]" in unusable[1]
    results = list(task.predict(model, rows.select([0, 2]), batch_tokens=64, max_length=64))
    assert [len(r["masks"]) for r in results] == [2, 1]
    ids = torch.tensor([tokenizer("a <|im_start|> cat <|im_start|>")["input_ids"]])
    with torch.no_grad():
        probs = model(ids).logits.softmax(-1)[0][ids[0] == 1]
    for tokens, own in zip(results[0]["masks"], probs, strict=True):
        assert [t["probability"] for t in tokens] == pytest.approx(own.topk(5).values.tolist(), rel=1e-4)
        assert tokens[0]["token"] == tokenizer.decode([int(own.argmax())]).strip()
    first, second = (tokens[0]["token"] for tokens in results[0]["masks"])
    assert results[0]["text"] == f"a {first} cat {second}"


def test_adapter_in_the_head_is_part_of_the_values(tokenizer: Any) -> None:
    import peft

    task, model = make_task(tokenizer), make_bert()
    config = peft.LoraConfig(target_modules=["query", "transform.dense"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    examples = encode(task, TEXTS).examples
    with torch.no_grad():
        ours, own = (
            task.outputs(adapted, task.collate(examples, "cpu")),
            task.reference_outputs(adapted, examples, "cpu"),
        )
    torch.testing.assert_close(ours.logits(), own.logits(), rtol=1e-4, atol=1e-4)


def test_probe_scores_every_position(tokenizer: Any) -> None:
    task, model = make_task(tokenizer), make_bert()
    outputs = task.outputs(model, task.collate([task.probe(np.array([3, 9, 8, 2], dtype=np.int32))], "cpu"))
    assert len(outputs) == 4 and isinstance(task._head, MaskedHead)
