"""Tokens that a recipe adds: ids, rows of embeddings and heads, and a run that trains, saves and merges them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import peftlab
from peftlab.errors import RecipeError
from peftlab.models import add_tokens, start_rows, token_rows
from peftlab.training.progress import SilentProgress
from tests.run_examples import recipe, write_data

TOKENS = {"<kind?>": "red cat", "<ok>": ""}


def llama(*, tied: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=260,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False])
def test_start_rows_are_means_of_the_description_or_of_all_rows(tokenizer_of: Callable[..., Any], tied: bool) -> None:
    model, tokenizer = llama(tied=tied), tokenizer_of("tiny:llama")
    first = len(tokenizer)
    before = {name: end.weight.detach().clone() for name, end in _ends(model).items()}
    add_tokens(tokenizer, TOKENS)
    start_rows(model, tokenizer, TOKENS)
    described = tokenizer("red cat", add_special_tokens=False)["input_ids"]
    for name, end in _ends(model).items():
        old = before[name]
        torch.testing.assert_close(end.weight[first], old[described].mean(0))
        torch.testing.assert_close(end.weight[first + 1], old[:first].mean(0))
        assert torch.equal(end.weight[:first], old[:first])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    rows = {"model.embed_tokens": [first, first + 1]}
    assert token_rows(model, tokenizer, list(TOKENS)) == (rows if tied else rows | {"lm_head": [first, first + 1]})


def _ends(model: Any) -> dict[str, Any]:
    return {"in": model.get_input_embeddings(), "out": model.get_output_embeddings()}


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["a"], "the tokenizer has 'a' already, with the id 68"),
        (["<x>", "<x>"], "'<x>' is listed twice"),
        (["<x>", " "], "expected a token of visible characters, found ' '"),
    ],
)
def test_add_tokens_refuses_what_is_no_new_token(
    tokenizer_of: Callable[..., Any], tokens: list[str], message: str
) -> None:
    with pytest.raises(RecipeError) as error:
        add_tokens(tokenizer_of("tiny:llama"), tokens)
    assert message in str(error.value)
    assert error.value.key == "adapter.tokens"


@pytest.mark.parametrize("tied", [True, False])
def test_run_trains_saves_and_merges_the_rows_of_new_tokens_only(
    tokenizer_of: Callable[..., Any], tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    base, tokenizer = llama(tied=tied), tokenizer_of("tiny:llama")
    base.save_pretrained("model")
    tokenizer.save_pretrained("model")
    template = {"prompt": "<kind?> {word} ", "completion": "{kind}<ok>"}
    document = recipe(
        model={"name": "model"},
        data={"template": template},
        adapter={"tokens": TOKENS, "targets": ["q_proj"]},
        train={"max_steps": 4},
        eval={"choices": None},
    )
    run = peftlab.train(document, progress=SilentProgress())
    loss = run.summary["after"]["loss"]
    assert loss < run.summary["before"]["loss"]
    assert peftlab.evaluate("run", progress=SilentProgress())["metrics"]["loss"] == pytest.approx(loss, rel=1e-5)

    # PEFT alone, with the tokenizer next to the adapter.
    own = transformers.AutoTokenizer.from_pretrained("run/adapter")
    plain = transformers.AutoModelForCausalLM.from_pretrained("model")
    plain.resize_token_embeddings(len(own))
    opened = peft.PeftModel.from_pretrained(plain, "run/adapter").eval()
    report = peftlab.merge("run", progress=SilentProgress())
    assert report["verified"]
    merged = transformers.AutoModelForCausalLM.from_pretrained("run/merged").eval()
    ids = own("<kind?> red 1 colour<ok>", return_tensors="pt")["input_ids"]
    assert len(tokenizer) in ids and len(tokenizer) + 1 in ids
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is tied
    old = base.get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight[: len(tokenizer)], old[: len(tokenizer)])
    assert transformers.AutoTokenizer.from_pretrained("run/merged").get_vocab() == own.get_vocab()
    assert peftlab.evaluate("run/merged", progress=SilentProgress())["metrics"]["loss"] == pytest.approx(loss, rel=1e-4)
