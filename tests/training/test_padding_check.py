"""The padding check: a row gets the same outputs in a batch as alone, in every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from peftlab.adapters import HeadLoss
from peftlab.data.chat import Formatter
from peftlab.errors import RecipeError
from peftlab.models import padding_of, reconcile
from peftlab.tasks import Example
from peftlab.tasks.causal_lm import CausalLM
from peftlab.tasks.classification import Labels
from peftlab.tasks.embedding import POOLINGS, Embedding
from peftlab.tasks.generation import Generator
from peftlab.tasks.seq_cls import SequenceClassification
from peftlab.training.padding_check import check_padding
from tests.family_examples import CLASSIFIERS, WRITERS, end_every_text, make_config, make_model

END = 2
NAMES = ["a", "b", "c"]
# Families whose padded rows differ from rows alone, and XLNet, whose head reads the last position.
OWN_WAY = {
    "XLNetConfig": "left",
    "CanineConfig": "none",
    "ConvBertConfig": "none",
    "FNetConfig": "none",
    "NystromformerConfig": "none",
    "ReformerConfig": "none",
    "YosoConfig": "none",
}


@pytest.fixture
def tokenizer(tokenizer_of: Callable[[str], Any]) -> Any:
    """A tokenizer that ends every text with its end of text, as those of T5 and BART do."""
    tokenizer = tokenizer_of("tiny:llama")
    end_every_text(tokenizer)
    return tokenizer


def classifier(tokenizer: Any, name: str, **values: Any) -> tuple[Any, SequenceClassification]:
    config = make_config(name, num_labels=3, **values)
    model = make_model(config, "AutoModelForSequenceClassification")
    reconcile(model, tokenizer)
    padding = padding_of(config, whole_rows=True)
    return model, SequenceClassification(tokenizer, labels=Labels(NAMES), padding=padding)


def examples(*lengths: int) -> list[Example]:
    rng = np.random.default_rng(0)
    rows = [np.append(rng.integers(4, 260, n - 1), END).astype(np.int32) for n in lengths]
    return [Example(ids, i, 1.0, label=i % 3) for i, ids in enumerate(rows)]


def furthest(task: Any, model: Any, rows: list[Example], read: Callable[[Any], torch.Tensor]) -> float:
    """The largest difference between the outputs of rows in one batch and alone, relative to the largest output."""
    with torch.no_grad():
        torch.manual_seed(0)
        together = read(task.outputs(model, task.collate(rows, "cpu")))
        alone = []
        for row in rows:
            torch.manual_seed(0)
            alone.append(read(task.outputs(model, task.collate([row], "cpu"))))
    wanted = torch.cat(alone)
    return float((together - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_give_a_row_the_same_outputs_in_a_batch_as_alone(tokenizer: Any, name: str) -> None:
    model, task = classifier(tokenizer, name)
    assert task.padding == OWN_WAY.get(name, "right")
    assert check_padding(model, task, max_length=128, device="cpu") is None
    assert furthest(task, model, examples(30, 7, 12, 30, 7), lambda o: o.logits()) < 1e-4


@pytest.mark.parametrize("name", ["XLNetConfig", "ConvBertConfig", "FNetConfig"])
def test_padding_check_finds_families_that_read_padding(tokenizer: Any, name: str) -> None:
    model, task = classifier(tokenizer, name)
    task.padding = "right"
    problem = check_padding(model, task, max_length=128, device="cpu")
    assert problem is not None and f"({model.config.model_type})" in problem
    assert task.padding == "none"
    assert furthest(task, model, examples(30, 7, 12), lambda o: o.logits()) < 1e-5


@pytest.mark.parametrize("name", ["LlamaConfig", "GPT2Config"])
@pytest.mark.parametrize("pad_id", [None, 3])
def test_padding_check_finds_a_head_with_another_padding_id(tokenizer: Any, name: str, pad_id: int | None) -> None:
    model, task = classifier(tokenizer, name)
    model.config.pad_token_id = pad_id
    if pad_id is None:
        with pytest.raises(RecipeError, match="Cannot handle batch sizes > 1 if no padding token is defined"):
            check_padding(model, task, max_length=128, device="cpu")
        return
    assert "differ by" in str(check_padding(model, task, max_length=128, device="cpu"))


def test_padding_check_restores_modes_and_random_state(tokenizer: Any) -> None:
    model, task = classifier(tokenizer, "YosoConfig")
    model.train()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    check_padding(model, task, max_length=128, device="cpu")
    assert torch.equal(torch.rand(3), wanted)
    assert all(module.training for module in model.modules())


def test_padding_check_reports_a_family_that_cannot_run_on_short_rows(tokenizer: Any) -> None:
    import transformers

    config = transformers.NystromformerConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3,
        num_landmarks=4, segment_means_seq_len=8,
    )  # fmt: skip
    model = make_model(config, "AutoModelForSequenceClassification")
    task = SequenceClassification(tokenizer, labels=Labels(NAMES))
    with pytest.raises(RecipeError, match=r"NystromformerForSequenceClassification \(nystromformer\) cannot run"):
        check_padding(model, task, max_length=128, device="cpu")


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", ["BertConfig", "XLNetConfig", "ConvBertConfig", "LlamaConfig"])
def test_embeddings_are_the_same_in_a_batch_as_alone(tokenizer: Any, name: str, pooling: str) -> None:
    config = make_config(name)
    model = make_model(config, "AutoModel")
    task = Embedding(tokenizer, pooling=pooling, normalize=True, padding=padding_of(config, whole_rows=False))
    assert check_padding(model, task, max_length=128, device="cpu") is None
    assert furthest(task, model, examples(30, 7, 12), lambda o: o.values) < 1e-4


def writer(tokenizer: Any, name: str, **values: Any) -> tuple[Any, CausalLM]:
    config = make_config(name, WRITERS, **values)
    formatter = Formatter(tokenizer, columns={}, template=None, available=["prompt", "completion"])
    return make_model(config, "AutoModelForCausalLM"), CausalLM(tokenizer, formatter, head_loss=HeadLoss())


@pytest.mark.parametrize("name", WRITERS)
def test_writers_give_a_row_the_same_outputs_and_answers_in_a_batch_as_alone(tokenizer: Any, name: str) -> None:
    from peftlab.data import Rows

    model, task = writer(tokenizer, name)
    assert check_padding(model, task, max_length=128, device="cpu") is None
    rows = [Example(e.ids, e.row, len(e) - 1.0, trained=np.arange(len(e)) > 0) for e in examples(30, 7, 12)]
    assert furthest(task, model, rows, lambda o: o.logits()) < 1e-4
    prompts = [{"prompt": text, "completion": ""} for text in ("a much longer prompt than the other", "Hi", "Why?")]
    options: dict[str, Any] = {"batch_tokens": 999, "max_length": 128, "max_new_tokens": 6}
    together = list(task.generate(model, Rows.from_dicts(prompts, name="a"), **options))
    alone = [next(iter(task.generate(model, Rows.from_dicts([p], name="a"), **options))) for p in prompts]
    assert together == alone


def test_padding_check_refuses_a_writer_that_reads_later_tokens(tokenizer: Any) -> None:
    task = writer(tokenizer, "LlamaConfig")[1]
    model = make_model(make_config("XLNetConfig"), "AutoModelForCausalLM")
    with pytest.raises(RecipeError, match="reads the tokens after the one that it predicts"):
        check_padding(model, task, max_length=128, device="cpu")


def test_prompts_are_padded_unless_the_model_reads_padding(tokenizer: Any) -> None:
    ids = [np.arange(5, 35), np.arange(40, 47)]
    for name, padded in [("LlamaConfig", True), ("BloomConfig", True), ("MambaConfig", True), ("RwkvConfig", False)]:
        model, task = writer(tokenizer, name)
        generator = Generator(pad_id=task.tokenizer.pad_token_id, stop_ids=[0])
        assert generator.ignores_padding(model, ids) is padded, name
