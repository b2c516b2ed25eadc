"""The check of a merge, with PEFT's own merge and with wrong merges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

from peftlab.adapters.merge import DequantizedWeights, fold
from peftlab.adapters.merge_check import LayerError, MergeCheck
from tests.family_examples import AUTO_CLASSES, READERS_OF_IMAGES, WRITERS, make_config, make_model

OPTIONS = [
    pytest.param({}, id="lora"),
    pytest.param({"rslora": True}, id="rslora"),
    pytest.param({"dora": True}, id="dora"),
    pytest.param({"targets": ["q_proj", "lm_head"]}, id="head"),
    pytest.param({"targets": ["q_proj", "embed_tokens"]}, id="embedding"),
]


def checked(result: LayerError) -> int:
    return result.by_formula + result.by_probes


def merged(tiny: Callable[..., Any], **options: Any) -> tuple[MergeCheck, Any]:
    model = tiny("tiny:llama", **options)
    check = MergeCheck(model)
    return check, fold(model)


def error(check: MergeCheck, model: Any, dtype: torch.dtype = torch.float32) -> LayerError:
    result = check.error(model.to(dtype), dtype)
    assert result is not None
    return result


@pytest.mark.parametrize("options", OPTIONS)
def test_check_finds_no_error_in_pefts_merge(tiny: Callable[..., Any], options: Any) -> None:
    result = error(*merged(tiny, **options))
    assert result.wrong == 0 and result.unchecked == 0
    assert result.relative < 1e-5
    assert checked(result) == (4 if "targets" in options else 14) - ("targets" in options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_check_allows_the_rounding_of_16_bit_files(tiny: Callable[..., Any], dtype: torch.dtype) -> None:
    result = error(*merged(tiny), dtype=dtype)
    assert result.wrong == 0 and result.relative > 1e-4


def _lost(layer: Any, plain: Any) -> None:
    layer.weight.data.copy_(plain.weight)


def test_fold_computes_in_full_float32(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32's error, 2^-11, is as large as what the check allows."""
    model = tiny("tiny:llama")
    seen: list[Any] = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(
        model, "merge_and_unload",
        lambda **_: seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())),
    )  # fmt: skip
    fold(model)
    assert seen == [(False, "highest")] and torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_names_the_layer_that_lost_its_update(tiny: Callable[..., Any], dtype: torch.dtype) -> None:
    check, model = merged(tiny)
    plain = dict(tiny("tiny:llama", adapter=False).named_modules())
    name = "model.layers.1.mlp.up_proj"
    _lost(dict(model.named_modules())[name], plain[name])
    result = error(check, model, dtype)
    assert result.wrong == 1 and result.worst == name
    assert result.worst_relative == pytest.approx(1.0, rel=0.05)


def test_check_catches_a_wrong_scaling(tiny: Callable[..., Any]) -> None:
    model = tiny("tiny:llama")
    check = MergeCheck(model)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= 2
    result = error(check, fold(model))
    assert result.wrong == checked(result) and result.relative == pytest.approx(1.0, rel=1e-4)


def test_check_catches_values_that_are_not_finite(tiny: Callable[..., Any]) -> None:
    check, model = merged(tiny)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    assert error(check, model).wrong == 1


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
def test_check_knows_every_method(tiny: Callable[..., Any], name: str) -> None:
    base = tiny("tiny:bert" if name == "lora-bias" else "tiny:llama", adapter=False)
    model = peft.get_peft_model(base, method(name))
    check = MergeCheck(model)
    result = error(check, fold(model))
    assert checked(result) > 0 and result.wrong == 0
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
def test_check_knows_every_kind_of_layer(name: str, task: str, targets: list[str]) -> None:
    config = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False)
    model = peft.get_peft_model(family(name, task), config)
    check = MergeCheck(model)
    result = error(check, fold(model))
    assert checked(result) > 0 and result.wrong == 0 and result.unchecked == 0


class Attention(torch.nn.Module):
    """Torch's own attention, whose output projection is a layer inside the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.attention(x, x, x)


@pytest.mark.parametrize("damaged", ["", "in_proj_weight", "out_proj.weight"])
def test_check_knows_torchs_attention(damaged: str) -> None:
    config = peft.LoraConfig(target_modules=["attention"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(Attention(), config)
    check = MergeCheck(model)
    plain = fold(model)
    if damaged:
        plain.attention.get_parameter(damaged).data[0, 0] += 0.1
    result = error(check, plain)
    assert (result.by_formula, result.by_probes, result.unchecked) == (1, 1, 0)
    assert bool(result.wrong) == bool(damaged)


def experts() -> Any:
    config = peft.LoraConfig(target_modules=["q_proj", "w1", "w2", "w3"], r=4, init_lora_weights=False)
    return peft.get_peft_model(family("MixtralConfig", "causal_lm"), config)


def test_check_compares_each_expert() -> None:
    model = experts()
    check = MergeCheck(model)
    result = error(check, fold(model))
    assert (result.by_formula, result.by_probes, result.unchecked) == (6, 0, 0)
    assert result.wrong == 0 and result.relative < 1e-4
    model = experts()
    check = MergeCheck(model)
    plain = fold(model)
    parameter = plain.model.layers[1].mlp.experts.down_proj
    parameter.data = parameter.data[[1, 0]]
    result = error(check, plain)
    assert result.wrong == 1 and result.worst == "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_check_sees_one_wrong_value(tiny: Callable[..., Any], dtype: torch.dtype) -> None:
    """Of one weight in some thousand, by a hundredth of its update; in 16 bits by one step to the next value."""
    check, model = merged(tiny)
    plain = dict(tiny("tiny:llama", adapter=False).named_modules())
    name = "model.layers.1.mlp.up_proj"
    model = model.to(dtype)
    weight = model.get_submodule(name).weight
    update = float((weight - plain[name].weight)[3, 5].abs())
    assert error(check, model, dtype).wrong == 0
    step = update / 100 if dtype == torch.float32 else 2 * float(weight[3, 5].abs()) * torch.finfo(dtype).eps
    weight.data[3, 5] += step
    result = error(check, model, dtype)
    assert result.wrong == 1 and result.worst == name


SMALL: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=4),
    "dora": lambda: peft.LoraConfig(target_modules=["q_proj"], r=4, use_dora=True),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=4, total_step=9),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj"], r=4),
    "lokr": lambda: peft.LoKrConfig(target_modules=["q_proj"], r=4),
    "oft": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    "parameters": lambda: peft.LoraConfig(target_modules=[], target_parameters=["q_proj.weight"], r=4),
}


def slightly(tiny: Callable[..., Any], name: str, size: float) -> Any:
    """An adapter that changes the weights a little, and those of the first block more."""
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny("tiny:llama", adapter=False), SMALL[name]())
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += (0.1 if ".layers.0." in path else size) * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("name", SMALL)
def test_check_counts_layers_that_lose_their_update(tiny: Callable[..., Any], name: str) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = slightly(tiny, name, 1e-5)
        check = MergeCheck(model)
        result = error(check, fold(model), dtype)
        assert result.by_formula > 1 and result.wrong == 0
        lost = 0 if dtype == torch.float32 else result.by_formula // 2
        assert result.num_lost == lost and ("layers.1." in result.most_lost) == bool(lost)
        assert result.most_lost_relative > 0.5 or not lost


def test_check_sees_that_pefts_rotation_of_patches_is_no_rotation_of_weights() -> None:
    """PEFT 0.21's OFT adds up overlapping patches in the forward of a convolution, and merges something else."""

    class Convolution(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 8, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return self.conv(x)

    model = peft.get_peft_model(
        Convolution(), peft.OFTConfig(target_modules=["conv"], oft_block_size=4, init_weights=False)
    )
    check = MergeCheck(model)
    result = error(check, fold(model))
    assert (result.by_formula, result.wrong) == (1, 1)
    assert result.relative < 1e-4  # of the weights; the outputs are others


def test_check_copies_no_weight_that_is_in_memory_anyway(tiny: Callable[..., Any]) -> None:
    """Nor does it keep one in more than 16 bits, if these are enough."""
    quantized = DequantizedWeights(tiny("tiny:llama", quantize="nf4", adapter=False))
    model = tiny("tiny:llama")
    for name, layer in model.get_base_model().named_modules():
        if name in quantized:
            layer.get_base_layer().weight.data.copy_(quantized[name])
    read: list[str] = []

    class Counted(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            read.append(name)
            return quantized[name]

    check = MergeCheck(model, Counted({name: quantized[name] for name in quantized}))
    assert read == []
    assert error(check, fold(model)).wrong == 0
    assert sorted(read) == sorted(quantized)
    model = tiny("tiny:llama").bfloat16().float()
    check = MergeCheck(model)
    kept = [weight() for weight, _ in check._formulas._before]
    assert len(kept) == 14 and {w.dtype for w in kept} == {torch.bfloat16}
    assert error(check, fold(model)).wrong == 0


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
