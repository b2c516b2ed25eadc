"""Padding, limit, ends of text and ids: what a model's config and its tokenizer say about each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftlab.models import (
    UNLIMITED,
    end_ids,
    find_pretrained,
    length_limit,
    load_tokenizer,
    model_max_length,
    padding_of,
    reads_later_tokens,
    reconcile,
    reconciled_ids,
)
from tests.family_examples import CLASSIFIERS, WRITERS, make_config, make_model

EOS, UNK = 2, 3


@pytest.fixture
def folder(tmp_path: Path, tokenizer_of: Callable[[str], Any]) -> Callable[..., Any]:
    """A folder with a config and a tokenizer, whose files are changed by ``changes``; without weights."""

    def write(config: Any, *, added: tuple[str, ...] = (), **changes: Any) -> Any:
        tokenizer = tokenizer_of("tiny:llama")
        if added:
            tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *added]})
        tokenizer.save_pretrained(tmp_path)
        config.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").touch()  # never read
        file = tmp_path / "tokenizer_config.json"
        settings = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
        return find_pretrained(str(tmp_path))

    return write


def rename_pad(folder: Path) -> None:
    """Leaves no special token whose name contains pad."""
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<|pad|>", "<|nil|>"))


@pytest.mark.parametrize(
    ("pad_id", "renamed", "changes", "chosen", "says"),
    [
        (None, False, {}, 0, None),
        (7, False, {}, 0, None),
        (UNK, False, {"pad_token": None}, UNK, "'<|unk|>' (id 3), the padding token of the model's config"),
        (None, False, {"pad_token": None}, 0, "'<|pad|>' (id 0), a special token for padding"),
        (None, True, {"pad_token": None}, EOS, "'<|im_end|>' (id 2), the end of text"),
        (-1, True, {"pad_token": None}, EOS, "'<|im_end|>' (id 2), the end of text"),
        (None, True, {"pad_token": None, "eos_token": None}, UNK, "'<|unk|>' (id 3), the unknown token"),
        (None, True, {"pad_token": None, "eos_token": None, "unk_token": None}, 0, "the first token of the vocabulary"),
    ],
    ids=["own", "own before config", "config", "named pad", "eos", "no id in config", "unk", "first"],
)
def test_padding_token_is_chosen_by_the_rule(
    folder: Callable[..., Any],
    tmp_path: Path,
    pad_id: int | None,
    renamed: bool,
    changes: dict[str, Any],
    chosen: int,
    says: str | None,
) -> None:
    pretrained = folder(make_config("LlamaConfig", pad_token_id=pad_id), **changes)
    if renamed:
        rename_pad(tmp_path)
    tokenizer = load_tokenizer(pretrained)
    assert tokenizer.pad_token_id == chosen
    assert len(tokenizer) == 260
    if says is None:
        assert tokenizer.padding_note is None
    else:
        assert tokenizer.padding_note.startswith("the tokenizer has no padding token: batches are padded with ")
        assert says in tokenizer.padding_note


def test_padding_token_without_an_embedding_row_is_replaced(folder: Callable[..., Any]) -> None:
    tokenizer = load_tokenizer(folder(make_config("LlamaConfig"), added=("[FILL]",), pad_token="[FILL]"))
    assert tokenizer.pad_token_id == 0
    assert tokenizer.padding_note == (
        "the padding token '[FILL]' has the id 260, but the model has 260 embedding rows: batches are padded with "
        "'<|pad|>' (id 0), a special token for padding"
    )


@pytest.mark.parametrize(
    ("name", "values", "changes"),
    [
        ("LlamaConfig", {}, {"pad_token_id": (None, 0)}),
        ("LlamaConfig", {"pad_token_id": 0}, {}),
        ("LlamaConfig", {"pad_token_id": 9}, {"pad_token_id": (9, 0)}),
        ("RobertaConfig", {"pad_token_id": 1}, {}),
        ("BartConfig", {"pad_token_id": 1, "eos_token_id": 7}, {"pad_token_id": (1, 0), "eos_token_id": (7, EOS)}),
        ("T5Config", {}, {"eos_token_id": (1, EOS), "decoder_start_token_id": (None, 0)}),
    ],
)
def test_reconcile_sets_the_ids_of_the_tokenizer(
    tokenizer_of: Callable[[str], Any], name: str, values: dict[str, Any], changes: dict[str, Any]
) -> None:
    tokenizer, config = tokenizer_of("tiny:llama"), make_config(name, **values)
    assert reconciled_ids(config, tokenizer) == changes
    model = make_model(config, "AutoModelForSequenceClassification")
    reconcile(model, tokenizer)
    assert {n: getattr(model.config, n) for n in changes} == {n: new for n, (_, new) in changes.items()}
    assert reconciled_ids(model.config, tokenizer) == {}


@pytest.mark.parametrize(("summary", "padding"), [("last", "left"), ("first", "right"), ("mean", "none")])
def test_xlnet_is_padded_by_what_its_head_reads(summary: str, padding: str) -> None:
    config = make_config("XLNetConfig", summary_type=summary)
    assert padding_of(config, whole_rows=True) == padding
    assert padding_of(config, whole_rows=False) == "right"


# Families whose positions end: a text of one token more fails, one of the limit runs.
BOUNDED = ["BertConfig", "RobertaConfig", "CamembertConfig", "MPNetConfig", "GPT2Config", "OPTConfig", "BartConfig",
           "AlbertConfig", "ElectraConfig", "DistilBertConfig", "XLMConfig", "MptConfig", "EsmConfig", "RoFormerConfig",
           "YosoConfig", "ConvBertConfig"]  # fmt: skip


@pytest.mark.parametrize("name", BOUNDED)
def test_limit_is_the_longest_text_that_runs(folder: Callable[..., Any], name: str) -> None:
    pretrained = folder(make_config(name), model_max_length=10**30)
    limit = model_max_length(pretrained, load_tokenizer(pretrained))
    model = make_model(make_config(name), "AutoModel")

    def run(length: int) -> None:
        ids = torch.arange(length)[None] % 200 + 5
        with torch.no_grad():
            model(input_ids=ids)

    run(limit)
    with pytest.raises((IndexError, RuntimeError)):
        run(limit + 1)


@pytest.mark.parametrize(
    "name", ["T5Config", "MT5Config", "XLNetConfig", "BloomConfig", "MambaConfig", "FunnelConfig", "RwkvConfig"]
)
def test_limit_of_relative_positions_is_that_of_the_tokenizer(folder: Callable[..., Any], name: str) -> None:
    families = CLASSIFIERS | WRITERS
    for stated, tokens in [(10**30, UNLIMITED), (-1, UNLIMITED), (0, UNLIMITED), (77, 77)]:
        pretrained = folder(make_config(name, families), model_max_length=stated)
        assert length_limit(pretrained, load_tokenizer(pretrained)).tokens == tokens


def test_limit_of_alibi_is_not_the_number_in_the_config(folder: Callable[..., Any]) -> None:
    for alibi, tokens in [(True, UNLIMITED), (False, 128)]:
        pretrained = folder(make_config("FalconConfig", alibi=alibi), model_max_length=-1)
        assert model_max_length(pretrained, load_tokenizer(pretrained)) == tokens


@pytest.mark.parametrize(
    ("name", "stated", "tokens", "note"),
    [
        ("BertConfig", 512, 128, None),
        ("BertConfig", -1, 128, None),
        ("BertConfig", 64, 64, "its tokenizer says so (model_max_length); the model's positions hold 128"),
        ("RobertaConfig", 128, 126, "its 128 positions start at 2, after the padding id"),
        ("RobertaConfig", 126, 126, None),
        ("XLNetConfig", 64, 64, "its tokenizer says so (model_max_length); the model's positions have no limit"),
        ("T5Config", -1, UNLIMITED, "neither the model's positions nor its tokenizer set a limit"),
    ],
)
def test_limit_names_an_unusual_source(
    folder: Callable[..., Any], name: str, stated: int, tokens: int, note: str | None
) -> None:
    pretrained = folder(make_config(name), model_max_length=stated)
    limit = length_limit(pretrained, load_tokenizer(pretrained))
    assert (limit.tokens, limit.note) == (tokens, note)


def test_end_ids_are_those_of_the_generation_config(folder: Callable[..., Any], tmp_path: Path) -> None:
    pretrained = folder(make_config("LlamaConfig", eos_token_id=EOS))
    tokenizer = load_tokenizer(pretrained)
    assert end_ids(pretrained, tokenizer) == ([EOS], [])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 1, 99, 5000]}))
    assert end_ids(pretrained, tokenizer) == ([EOS, 1], [99, 5000])


@pytest.mark.parametrize(
    ("name", "values", "reads"),
    [
        ("BertConfig", {}, True),
        ("BertConfig", {"is_decoder": True}, False),
        ("XLNetConfig", {}, True),
        ("XLMConfig", {}, True),
        ("XLMConfig", {"causal": True}, False),
        ("BartConfig", {}, False),
        ("GPT2Config", {}, False),
        ("LlamaConfig", {}, False),
    ],
)
def test_encoders_are_no_causal_language_models(name: str, values: dict[str, Any], reads: bool) -> None:
    assert reads_later_tokens(make_config(name, **values)) is reads


def test_funnel_pairs_positions_with_padding_where_it_predicts_tokens() -> None:
    config = make_config("FunnelConfig")
    assert padding_of(config, whole_rows=False) == "none"
    assert padding_of(config, whole_rows=True) == "right"
