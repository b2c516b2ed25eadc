"""The check of a merge, with PEFT's own merge and with wrong merges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

from peftlab.adapters.merge import DequantizedWeights, LayerError, Probes, fold
from tests.family_examples import AUTO_CLASSES, READERS_OF_IMAGES, WRITERS, make_config, make_model

OPTIONS = [
    pytest.param({}, id="lora"),
    pytest.param({"rslora": True}, id="rslora"),
    pytest.param({"dora": True}, id="dora"),
    pytest.param({"targets": ["q_proj", "lm_head"]}, id="head"),
    pytest.param({"targets": ["q_proj", "embed_tokens"]}, id="embedding"),
]


def merged(tiny: Callable[..., Any], **options: Any) -> tuple[Probes, Any]:
    model = tiny("tiny:llama", **options)
    probes = Probes(model)
    return probes, fold(model)


def error(probes: Probes, model: Any, dtype: torch.dtype = torch.float32) -> LayerError:
    result = probes.error(model.to(dtype), dtype)
    assert result is not None
    return result


@pytest.mark.parametrize("options", OPTIONS)
def test_probes_find_no_error_in_pefts_merge(tiny: Callable[..., Any], options: Any) -> None:
    result = error(*merged(tiny, **options))
    assert result.wrong == 0 and result.num_unchecked == 0
    assert result.relative < 1e-5
    assert result.num_modules == (4 if "targets" in options else 14) - ("targets" in options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probes_allow_the_rounding_of_16_bit_files(tiny: Callable[..., Any], dtype: torch.dtype) -> None:
    result = error(*merged(tiny), dtype=dtype)
    assert result.wrong == 0 and result.relative > 1e-4


def _lost(layer: Any, plain: Any) -> None:
    layer.weight.data.copy_(plain.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probes_name_the_layer_that_lost_its_update(tiny: Callable[..., Any], dtype: torch.dtype) -> None:
    probes, model = merged(tiny)
    plain = dict(tiny("tiny:llama", adapter=False).named_modules())
    name = "model.layers.1.mlp.up_proj"
    _lost(dict(model.named_modules())[name], plain[name])
    result = error(probes, model, dtype)
    assert result.wrong == 1 and result.worst == name
    assert result.worst_relative == pytest.approx(1.0, rel=0.05)


def test_probes_catch_a_wrong_scaling(tiny: Callable[..., Any]) -> None:
    model = tiny("tiny:llama")
    probes = Probes(model)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= 2
    result = error(probes, fold(model))
    assert result.wrong == result.num_modules and result.relative == pytest.approx(1.0, rel=1e-4)


def test_probes_catch_values_that_are_not_finite(tiny: Callable[..., Any]) -> None:
    probes, model = merged(tiny)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    assert error(probes, model).wrong == 1


def method(name: str) -> Any:
    attention, mlp = ["q_proj", "k_proj"], ["down_proj"]
    random = {"init_lora_weights": False}
    return {
        "ia3": lambda: peft.IA3Config(
            target_modules=[*attention, *mlp], feedforward_modules=mlp, init_ia3_weights=False
        ),
        "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4, init_weights=False),
        "loha": lambda: peft.LoHaConfig(target_modules=[*attention, *mlp], r=4, init_weights=False),
        "lora-bias": lambda: peft.LoraConfig(target_modules=["query"], lora_bias=True, **random),
        "pissa": lambda: peft.LoraConfig(target_modules=[*attention, *mlp], init_lora_weights="pissa"),
        "olora": lambda: peft.LoraConfig(target_modules=[*attention, *mlp], init_lora_weights="olora"),
        "dora-embedding": lambda: peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], use_dora=True, **random),
        "replicated": lambda: peft.LoraConfig(target_modules=attention, layer_replication=[[0, 2], [0, 2]], **random),
    }[name]()


@pytest.mark.parametrize("name", ["ia3", "vera", "loha", "lora-bias", "pissa", "olora", "dora-embedding", "replicated"])
def test_probes_know_every_method(tiny: Callable[..., Any], name: str) -> None:
    base = tiny("tiny:bert" if name == "lora-bias" else "tiny:llama", adapter=False)
    model = peft.get_peft_model(base, method(name))
    probes = Probes(model)
    result = error(probes, fold(model))
    assert result.num_modules > 0 and result.wrong == 0
    assert 0 < result.relative < 1e-4


def family(name: str, task: str) -> Any:
    return make_model(make_config(name, WRITERS if task == "causal_lm" else READERS_OF_IMAGES), AUTO_CLASSES[task])


@pytest.mark.parametrize(
    ("name", "task", "targets"),
    [
        ("GPT2Config", "causal_lm", ["c_attn", "c_proj"]),
        ("ResNetConfig", "image_cls", ["convolution"]),
        ("ConvNextConfig", "image_cls", ["downsampling_layer.1", "pwconv1"]),
        ("ViTConfig", "image_cls", ["projection"]),
    ],
)
def test_probes_know_every_kind_of_layer(name: str, task: str, targets: list[str]) -> None:
    config = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False)
    model = peft.get_peft_model(family(name, task), config)
    probes = Probes(model)
    result = error(probes, fold(model))
    assert result.num_modules > 0 and result.wrong == 0 and result.num_unchecked == 0


def test_probes_count_what_cannot_run_alone() -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "w1", "w2", "w3"], r=4)
    assert Probes(peft.get_peft_model(family("MixtralConfig", "causal_lm"), config)).num_unchecked == 2


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_dequantized_weights_are_those_the_forward_uses(tiny: Callable[..., Any], quantize: str) -> None:
    plain = dict(tiny("tiny:llama", adapter=False).named_modules())
    model = tiny("tiny:llama", adapter=False, quantize=quantize)
    dequantized = DequantizedWeights(model)
    assert len(dequantized) == 14 and "lm_head" not in dequantized
    for name, weight in dequantized.items():
        module = dict(model.named_modules())[name]
        original = plain[name].weight.detach()
        assert weight.shape == original.shape
        assert 0 < float((weight - original).norm() / original.norm()) < (0.2 if quantize == "nf4" else 0.02)
        columns = module(torch.eye(weight.shape[1]))
        tolerance = 1e-5 if quantize == "nf4" else 0.02 * float(weight.abs().max())
        torch.testing.assert_close(columns.T, weight, rtol=0, atol=tolerance)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_dequantized_weights_have_the_same_names_with_an_adapter(tiny: Callable[..., Any], quantize: str) -> None:
    adapted = DequantizedWeights(tiny("tiny:llama", quantize=quantize).get_base_model())
    bare = DequantizedWeights(tiny("tiny:llama", adapter=False, quantize=quantize))
    assert adapted.keys() == bare.keys()
    assert all(torch.equal(adapted[n], bare[n]) for n in bare)
