"""Loading and quantizing backbones on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from peftlab.adapters.fused import set_kernels
from peftlab.errors import RecipeError
from peftlab.models import (
    find_pretrained,
    load_model,
    load_tokenizer,
    model_max_length,
    new_weights,
    resolve_dtype,
    tokenizer_fingerprint,
)
from peftlab.models import load as load_module
from peftlab.models.load_errors import load_errors
from tests.family_examples import wide_values, write_family
from tests.processes import Processes

IDS = torch.tensor([[5, 9, 33, 100, 7, 8]])
QUANTIZED = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
@pytest.mark.parametrize("name", ["tiny:llama", "tiny:bert"])
def test_backbone_is_frozen_and_close_to_the_original(tiny: Callable[..., Any], name: str, quantize: str) -> None:
    plain = tiny(name, adapter=False)
    model = tiny(name, adapter=False, quantize=quantize)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    quantized = {n for n, m in model.named_modules() if isinstance(m, tuple(QUANTIZED.values()))}
    if quantize == "none":
        assert not quantized
    else:
        assert all(isinstance(dict(model.named_modules())[n], QUANTIZED[quantize]) for n in quantized)
        linear = {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
        left = {n for n in linear if n.rsplit(".", 1)[-1] in ("lm_head", "classifier") or "pooler" in n}
        assert quantized == linear - left and left
    got, want = model(input_ids=IDS).logits, plain(input_ids=IDS).logits
    bound = {"none": 0.0, "nf4": 0.5, "int8": 0.1}[quantize]
    assert float((got - want).norm()) <= bound * float(want.norm())


def test_dtype_is_that_of_the_recipe_or_device(tiny: Callable[..., Any]) -> None:
    assert tiny("tiny:llama", adapter=False).dtype == torch.float32
    assert tiny("tiny:llama", adapter=False, dtype="bfloat16").dtype == torch.bfloat16
    assert resolve_dtype("auto", "cpu") == torch.float32
    assert resolve_dtype("float16", "cpu") == torch.float16


def test_tiny_model_does_not_depend_on_the_seed(tiny: Callable[..., Any]) -> None:
    logits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        logits.append(tiny("tiny:llama", adapter=False)(input_ids=IDS).logits)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*logits)


def test_class_names_reach_the_config(tiny: Callable[..., Any]) -> None:
    model = tiny("tiny:bert", adapter=False, num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model(input_ids=IDS).logits.shape == (1, 3)


def gradients(model: Any) -> dict[str, Any]:
    model.train()
    model.zero_grad()
    model(input_ids=IDS).logits.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_evaluating_first_does_not_change_the_gradients(tiny: Callable[..., Any], quantize: str, kernels: str) -> None:
    want = gradients(tiny("tiny:llama", quantize=quantize))
    model = tiny("tiny:llama", quantize=quantize).eval()
    set_kernels(model, kernels)
    with torch.no_grad():
        model(input_ids=IDS)
    got = gradients(model)
    assert got.keys() == want.keys() and want
    for name, gradient in want.items():
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()), msg=name)


@pytest.mark.skipif(
    not getattr(bnb.nn.Linear4bit(4, 4), "support_avx512bf16_for_cpu", False), reason="needs a CPU with AVX512-BF16"
)
def test_evaluating_first_breaks_training_without_the_guard(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "_keep_storage_layout", lambda model, compute: None)
    with pytest.raises((AssertionError, RuntimeError)):
        test_evaluating_first_does_not_change_the_gradients(tiny, "nf4", "reference")


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_gradients_through_quantized_weights_equal_those_of_dense_ones(tiny: Callable[..., Any], quantize: str) -> None:
    """The reference is an ordinary model with the dequantized weights and the same adapter."""
    from peftlab.adapters.merge import DequantizedWeights

    model = tiny("tiny:llama", quantize=quantize)
    dense = tiny("tiny:llama")
    modules = dict(dense.get_base_model().named_modules())
    for name, weight in DequantizedWeights(model.get_base_model()).items():
        modules[name].base_layer.weight.data.copy_(weight)
    want, got = gradients(dense), gradients(model)
    # int8 also rounds the activations; a wrong layout is off by the whole gradient.
    allowed = 1e-4 if quantize == "nf4" else 0.1
    for name, gradient in want.items():
        assert float((got[name] - gradient).norm()) <= allowed * float(gradient.norm()), name


def test_tokenizer_fingerprint_follows_its_chat_template(tokenizer_of: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_of("tiny:llama")
    text = "Hello, w\u00f6rld! \U0001f600\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.chat_template += " "
    assert tokenizer_fingerprint(tokenizer) != before
    assert model_max_length(find_pretrained("tiny:llama"), tokenizer) == 512


def test_tokenizer_fingerprint_does_not_change_with_use(tokenizer_of: Callable[[str], Any]) -> None:
    """The Rust tokenizer keeps padding and truncation, and its serialisation is hashed."""
    tokenizer = tokenizer_of("tiny:llama")
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2, return_tensors="pt")
    tokenizer("abc", truncation=False)
    assert tokenizer_fingerprint(tokenizer) == before


def test_tokenizer_fingerprint_is_stable_across_processes(process: Processes) -> None:
    code = (
        "from peftlab.models import *\n"
        "print(tokenizer_fingerprint(load_tokenizer(find_pretrained('tiny:llama'))))"
    )  # fmt: skip
    here = tokenizer_fingerprint(load_tokenizer(find_pretrained("tiny:llama")))
    assert process.run_with_other_hashes(code).strip() == here


def test_padding_adds_no_vocabulary(tmp_path: Path, tokenizer_of: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_of("tiny:llama")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    from peftlab.models import Pretrained
    from peftlab.models.source import ModelSource

    loaded = load_tokenizer(Pretrained(ModelSource("folder", "x", str(tmp_path)), str(tmp_path), None, False))
    assert loaded.pad_token == "<|pad|>"
    assert len(loaded) == len(tokenizer)


def test_config_of_timm_that_repeats_an_argument_is_named() -> None:
    message = "_create_timm_model_with_error_handling() got multiple values for keyword argument 'num_classes'"
    with (
        pytest.raises(RecipeError, match=r"model_args in its config\.json repeats 'num_classes'; remove it there"),
        load_errors(find_pretrained("tiny:vit"), "model"),
    ):
        raise TypeError(message)
    with pytest.raises(TypeError, match="other"), load_errors(find_pretrained("tiny:vit"), "model"):
        raise TypeError("other")


def test_new_head_in_a_body_stays_dense(tmp_path: Path) -> None:
    """RT-DETR keeps its head in its body; the head for other classes is new, and quantized weights cannot be trained in full."""
    values = wide_values("RTDetrConfig", "object_detection")
    write_family(tmp_path, "RTDetrConfig", "object_detection", **values)
    auto = "AutoModelForObjectDetection"
    model = load_model(find_pretrained(str(tmp_path)), auto_class=auto, device="cpu", quantize="nf4", num_labels=5)
    new = new_weights(model)
    assert any("class_embed" in name for name in new)
    assert all(
        model.get_parameter(name).is_floating_point() for name in new if not name.endswith("num_batches_tracked")
    )
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
