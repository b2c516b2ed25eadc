"""Packed training: gradients equal to padded ones, no leak in any family on any attention, padding for models that
leak."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import peftlab
from peftlab.adapters import HeadLoss
from peftlab.assembly import fit as fit_module
from peftlab.data import Rows
from peftlab.data.chat import Formatter
from peftlab.errors import Interrupted, RecipeError, VerificationError
from peftlab.tasks import Batch, Example, collate_packed
from peftlab.tasks.causal_lm import CausalLM
from peftlab.training import loop, packing_check, parity
from peftlab.training.packing_check import check_packing
from peftlab.training.progress import SilentProgress

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
SLIDING = {"sliding_window": 5}  # shorter than a document, so that it has an effect
# Config class of transformers and values. Gemma 2 soft-caps its attention, GPT-2 has learned absolute positions.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "mistral": ("MistralConfig", {**GROUPED, **SLIDING}),
    "gemma2": ("Gemma2Config", {**GROUPED, **SLIDING, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, **SLIDING, "head_dim": 8}),
    "gpt2": ("GPT2Config", {**GPT2, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt-neox": ("GPTNeoXConfig", SIZES),
    "phi3": ("Phi3Config", {**GROUPED, "bos_token_id": 1, "eos_token_id": 2}),
}
# Models with a state over the whole row (mamba), and masks that transformers builds without the position ids.
LEAKING: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "opt": (
        "OPTConfig",
        {k: v for k, v in SIZES.items() if k != "intermediate_size"} | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "bloom": ("BloomConfig", {"vocab_size": 260, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconConfig", {k: v for k, v in SIZES.items() if k != "intermediate_size"}),
}
ATTENTIONS = ("eager", "sdpa", "flex_attention")
UNSUPPORTED = {("gemma2", "sdpa"), ("gpt2", "flex_attention")}  # transformers refuses these


def make_model(family: str, attention: str, dtype: torch.dtype = torch.float32) -> Any:
    import transformers

    name, values = (FAMILIES | LEAKING)[family]
    config = getattr(transformers, name)(**values)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to(dtype)


@pytest.fixture
def task(tokenizer_of: Callable[[str], Any]) -> CausalLM:
    tokenizer = tokenizer_of("tiny:llama")
    formatter = Formatter(tokenizer, columns={}, template=None, available=["prompt", "completion"])
    return CausalLM(tokenizer, formatter, head_loss=HeadLoss())


def documents(*lengths: int) -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example(rng.integers(4, 260, n).astype(np.int32), i, float(n - 1), trained=np.arange(n) > 0)
        for i, n in enumerate(lengths)
    ]


def check(model: Any, task: CausalLM, examples: list[Example] | None = None) -> str | None:
    return check_packing(model, task, examples or documents(20, 7, 1, 13, 30), device="cpu")


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_check_packing_finds_no_leak_in_any_family_and_attention(task: CausalLM, family: str, attention: str) -> None:
    if (family, attention) in UNSUPPORTED:
        with pytest.raises(ValueError, match="does not support"):
            make_model(family, attention)
        return
    # Flex attention runs uncompiled: compiling it takes half a minute and does not matter here.
    eager = torch.compiler.set_stance("force_eager") if attention == "flex_attention" else contextlib.nullcontext()
    with eager:
        assert check(make_model(family, attention), task) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_check_packing_finds_no_leak_in_other_types(task: CausalLM, dtype: torch.dtype) -> None:
    assert check(make_model("llama", "sdpa", dtype), task) is None
    assert check(make_model("opt", "sdpa", dtype), task) is not None


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_check_packing_finds_no_leak_in_a_quantized_model(tiny: Any, task: CausalLM, quantize: str) -> None:
    assert check(tiny("tiny:llama", quantize=quantize), task) is None


@pytest.mark.parametrize("family", LEAKING)
def test_check_packing_finds_models_that_leak(task: CausalLM, family: str) -> None:
    reason = check(make_model(family, "eager"), task)
    assert reason is not None and "mixes packed rows" in reason
    assert "with eager attention" in reason


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_check_packing_finds_missing_position_ids(task: CausalLM, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_positions(examples: Any, *, device: Any) -> Batch:
        batch = collate_packed(examples, device=device)
        return dataclasses.replace(batch, inputs={"input_ids": batch.input_ids})

    monkeypatch.setattr(packing_check, "collate_packed", without_positions)
    assert "mixes packed rows" in str(check(make_model(family, "sdpa"), task))


def test_check_packing_finds_positions_that_are_not_reset(task: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gap separates the documents, but the second starts at position 50."""

    def shifted(examples: Any, *, device: Any) -> Batch:
        batch = collate_packed(examples, device=device)
        positions = batch.inputs["position_ids"]
        document = (positions == 0).cumsum(-1) - 1
        return dataclasses.replace(batch, inputs={**batch.inputs, "position_ids": positions + 50 * (document > 0)})

    monkeypatch.setattr(packing_check, "collate_packed", shifted)
    assert "does not reset positions or state for each packed row" in str(
        check(make_model("gpt2", "sdpa"), task, documents(20, 7))
    )


def test_check_packing_finds_a_model_that_takes_no_position_ids(task: CausalLM) -> None:
    model = make_model("llama", "sdpa")
    right = model.model.forward
    model.model.forward = lambda input_ids, attention_mask=None, use_cache=False: right(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
    )
    task._head._is_direct[id(model)] = True  # otherwise it calls the whole model, which passes them on
    assert check(model, task) == "LlamaForCausalLM with sdpa attention takes no position ids"


def test_check_packing_of_one_document_finds_nothing(task: CausalLM) -> None:
    model = make_model("opt", "eager")
    assert check(model, task, documents(20)) is None
    assert check(model, task, documents(20, 1)) is None, "one token predicts nothing that is looked at"


def test_check_packing_restores_the_model(task: CausalLM) -> None:
    model = make_model("llama", "sdpa").train()
    model.model.layers[0].eval()
    before = {name: (module.training) for name, module in model.named_modules()}
    state = torch.get_rng_state()
    check(model, task)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_collate_packed_gives_the_expected_tensors() -> None:
    batch = collate_packed(documents(3, 1, 2), device="cpu")
    assert batch.input_ids.shape == (1, 6) and batch.attention_mask is None
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.trained.tolist() == [[False, True, True, False, False, True]]


def test_collate_packed_refuses_a_trained_first_token() -> None:
    bad = dataclasses.replace(documents(3)[0], trained=np.ones(3, dtype=bool))
    with pytest.raises(AssertionError):
        collate_packed([*documents(3), bad], device="cpu")


def test_first_token_is_never_trained(task: CausalLM) -> None:
    """This holds for any prompt: otherwise the last position of a packed row would predict the first token of the next."""
    rows = Rows.from_dicts([{"prompt": "", "completion": "a"}, {"prompt": "b", "completion": "c"}], name="rows")
    for example in task.encode(rows, max_length=64, too_long="error", training=True).examples:
        assert not example.trained[0]
    plain = Formatter(task.tokenizer, columns={"text": "text"}, template=None, available=["text"])
    texts = Rows.from_dicts([{"text": "all of this is trained"}], name="texts")
    (example,) = (
        CausalLM(task.tokenizer, plain, head_loss=HeadLoss())
        .encode(texts, max_length=64, too_long="error", training=True)
        .examples
    )
    assert example.trained.tolist() == [False] + [True] * (len(example) - 1)


def gradients(model: Any, loss: Any) -> dict[str, Any]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "attention", "tolerance"),
    [
        ("llama", "sdpa", 1e-9),
        ("llama", "eager", 1e-7),  # its softmax is computed in float32
        ("mistral", "sdpa", 1e-9),
        ("gpt2", "sdpa", 1e-9),
        ("gemma3", "sdpa", 1e-8),  # its norms are computed in float32
    ],
)
def test_packed_gradients_equal_padded_gradients(task: CausalLM, family: str, attention: str, tolerance: float) -> None:
    model = make_model(family, attention, torch.float64).eval()  # no dropout
    examples = documents(20, 7, 1, 13, 30)
    padded_loss = task.loss_sum(model, task.collate(examples, "cpu"))
    want = gradients(model, padded_loss)
    packed_loss = task.loss_sum(model, collate_packed(examples, device="cpu"))
    got = gradients(model, packed_loss)
    assert float(packed_loss.detach()) == pytest.approx(float(padded_loss.detach()), rel=1e-9)
    assert got.keys() == want.keys() and got
    size = max(float(g.abs().max()) for g in want.values())
    for name, gradient in want.items():
        assert float((got[name] - gradient).abs().max()) <= tolerance * size, name
    logits = model(**task.collate(examples, "cpu").inputs).logits  # the plain formula, row by row
    plain = sum(
        F.cross_entropy(logits[i, : len(e) - 1], torch.as_tensor(e.ids[1:], dtype=torch.int64), reduction="sum")
        for i, e in enumerate(examples)
    )
    assert float(plain) == pytest.approx(float(padded_loss.detach()), rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_packed_batch_equals_that_of_transformers_collator(task: CausalLM, family: str) -> None:
    """Loss and gradients of DataCollatorWithFlattening and the model's own loss: packing as transformers and TRL do it."""
    from transformers import DataCollatorWithFlattening

    model = make_model(family, "sdpa", torch.float64).eval()
    examples = documents(20, 7, 1, 13, 30)
    features = []
    for example in examples:
        assert example.trained is not None
        labels = np.where(example.trained, example.ids, -100)
        features.append({"input_ids": example.ids.tolist(), "labels": labels.tolist()})
    flat = DataCollatorWithFlattening()(features)
    packed = collate_packed(examples, device="cpu")
    for name in ("input_ids", "position_ids"):
        assert torch.equal(packed.inputs[name], flat[name])
    # With a cache, which is the default, transformers would ignore the position ids, and documents would see each
    # other.
    theirs = model(**flat, use_cache=False).loss
    want = gradients(model, theirs)
    assert packed.trained is not None
    ours = task.loss_sum(model, packed) / packed.trained.sum()
    got = gradients(model, ours)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)  # theirs is taken in float32
    size = max(float(g.abs().max()) for g in want.values())
    for name, gradient in want.items():
        assert float((got[name] - gradient).abs().max()) <= 1e-6 * size, name


class Notes(SilentProgress):
    def __init__(self, stop_after: int | None = None) -> None:
        self.notes: list[str] = []
        self._stop_after = stop_after

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, step: int, values: Any) -> None:
        if step == self._stop_after:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    lines = [f"{'why ' * int(rng.integers(0, 12))}{i},{'so ' * int(rng.integers(1, 9))}" for i in range(60)]
    (tmp_path / "data.csv").write_text("question,answer\n" + "\n".join(lines) + "\n")
    return tmp_path


def recipe(**sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "task": "causal_lm",
        "model": {"name": "tiny:llama"},
        "data": {
            "train": "data.csv",
            "eval_rows": 4,
            "max_length": 256,
            "packing": True,
            "template": {"prompt": "{question}", "completion": "{answer}"},
        },
        "adapter": {"rank": 4, "alpha": 8},
        "train": {"epochs": 2, "batch_size": 2},
        "eval": {"before": False},
        "run": {"dir": "run"},
    }
    for name, changes in sections.items():
        base[name] = base[name] | changes
    return base


def train(document: dict[str, Any], *overrides: str, progress: Any = None, **options: Any) -> Any:
    return peftlab.train(document, overrides, progress=progress or Notes(), **options)


def adapter(run: Any) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_train_with_packing(here: Path, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Batch] = []
    right = CausalLM.loss_sum

    def watched(self: Any, model: Any, batch: Batch) -> Any:
        seen.append(batch)
        return right(self, model, batch)

    monkeypatch.setattr(CausalLM, "loss_sum", watched)
    notes = Notes()
    document = recipe(adapter={"dropout": dropout})
    run = train(document, progress=notes)
    packing = run.summary["packing"]
    assert packing["off"] is None and packing["capacity"] == 256 and 0 <= packing["empty"] < 0.1
    assert any(
        n.startswith(f"packing: 56 rows in {packing['packs']} sequences of up to 256 tokens") for n in notes.notes
    )
    assert run.summary["parity"]["rows"] > 1 or dropout, "with dropout one row, where both paths draw the same masks"
    assert run.summary["parity"]["worst_cosine"] > 0.9999
    assert run.summary["training"]["steps"] == 2 * -(-packing["packs"] // 2)
    trained = seen[-2 * packing["packs"] :]
    assert all(b.packed and b.attention_mask is None and len(b.input_ids) == 1 for b in trained)
    assert sum(b.input_ids.numel() for b in trained) == run.summary["training"]["tokens"], "nothing is padded"
    assert max(b.input_ids.numel() for b in trained) <= 256
    if dropout:
        assert adapter(train(document, "run.dir=again")) == adapter(run)


def test_train_with_packing_resumes_with_the_same_bytes(here: Path) -> None:
    document = recipe(train={"epochs": None, "max_steps": 4})
    whole = train(document, "run.dir=whole")
    with pytest.raises(Interrupted):
        train(document, progress=Notes(stop_after=2))
    resumed = peftlab.train("run", resume=True, progress=Notes())
    assert adapter(resumed) == adapter(whole)


def test_train_pads_a_model_that_leaks_and_says_so(here: Path, tokenizer_of: Callable[[str], Any]) -> None:
    make_model("opt", "eager").save_pretrained(here / "opt")
    tokenizer_of("tiny:llama").save_pretrained(here / "opt")
    notes = Notes()
    run = train(recipe(model={"name": "./opt"}, data={"max_length": 96}), progress=notes)
    (line,) = [n for n in notes.notes if n.startswith("packing is off: ")]
    assert "mixes packed rows" in line and line.endswith("; rows are padded instead")
    assert line == f"packing is off: {run.summary['packing']['off']}; rows are padded instead"
    assert json.loads((here / "run" / "run.json").read_text())["packing"] == run.summary["packing"]
    records = [r for r in run.metrics() if "loss" in r]
    assert sum(r["rows"] for r in records) == 2 * 56
    assert max(r["tokens"] for r in records) <= 2 * 96, "steps of as many tokens as packs would have had"


def test_parity_gate_stops_a_leak_during_the_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the leak check were wrong, packed rows without position ids would not match padded ones."""
    monkeypatch.setattr(fit_module, "check_packing", lambda *_, **__: None)

    def without_positions(examples: Any, *, device: Any) -> Batch:
        batch = collate_packed(examples, device=device)
        return dataclasses.replace(batch, inputs={"input_ids": batch.input_ids})

    for module in (loop, parity):
        monkeypatch.setattr(module, "collate_packed", without_positions)
    with pytest.raises(VerificationError, match=r"differs between the training path|loss of the first micro-batch"):
        train(recipe())


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"train": {"grouping": "epoch"}}, "grouping: has no effect with data.packing"),
        ({"task": "seq_cls"}, "packing.*: has no effect for task: seq_cls"),
    ],
)
def test_packing_refuses_keys_without_effect(here: Path, sections: dict[str, Any], match: str) -> None:
    document = recipe()
    if task := sections.pop("task", None):
        document |= {"task": task}
        del document["data"]["template"]
    for name, changes in sections.items():
        document[name] |= changes
    with pytest.raises(RecipeError, match=match):
        train(document)
