"""Unmerging a fused layer restores its dense weight to the bit, which PEFT's own layers do not."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

from peftlab.adapters.fused import FusedLora, register

ROWS = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def model_of(dtype: torch.dtype, *, fused: bool = True, **second: Any) -> Any:
    """Two biased linears with the adapters ``default``, plain LoRA, and ``other``, both active."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 16)).to(dtype)
    options = {"r": 4, "target_modules": ["0", "1"], "init_lora_weights": False}
    config = peft.LoraConfig(**options)
    model = peft.get_peft_model(base, register(config) if fused else config)
    other = peft.LoraConfig(**options, **second)
    model.add_adapter("other", register(other) if fused else other)
    model.base_model.set_adapter(["default", "other"])
    assert all(isinstance(layer, FusedLora) is fused for layer in layers(model))
    return model.to(dtype).eval()


def layers(model: Any) -> list[Any]:
    return [model.base_model.model.get_submodule(name) for name in ("0", "1")]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def differing(before: dict[str, torch.Tensor], model: Any) -> list[str]:
    after = model.state_dict()
    assert before.keys() == after.keys()
    return [name for name, value in before.items() if not torch.equal(value, after[name])]


def outputs(model: Any, dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.base_model.model(ROWS.to(dtype))
    return result


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("second", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["lora", "dora", "bias"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerge_restores_weights_and_outputs_to_the_bit(dtype: torch.dtype, second: Any, safe: bool) -> None:
    model = model_of(dtype, **second)
    before, wanted = weights(model), outputs(model, dtype)
    for _ in range(3):
        model.merge_adapter(safe_merge=safe)
        assert len(differing(before, model)) >= 2
        close = 1e-5 if dtype == torch.float32 else 0.05
        assert float((outputs(model, dtype) - wanted).norm() / wanted.norm()) < close
        model.unmerge_adapter()
        assert differing(before, model) == []
    assert torch.equal(outputs(model, dtype), wanted)
    assert all(layer._unmerged is None for layer in layers(model))


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_merged_one_after_the_other_come_out_together(dtype: torch.dtype) -> None:
    for second in ({}, {"use_dora": True}):
        model = model_of(dtype, **second)
        before = weights(model)
        model.merge_adapter(adapter_names=["default"])
        model.merge_adapter(adapter_names=["other"])
        assert layers(model)[0].merged_adapters == ["default", "other"]
        model.unmerge_adapter()
        assert differing(before, model) == []


def test_pefts_own_unmerge_rounds() -> None:
    """If this fails, PEFT restores weights itself, and ours is not needed."""
    model = model_of(torch.bfloat16, fused=False)
    before = weights(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert differing(before, model)


def test_what_happens_while_an_adapter_is_merged_does_not_stay() -> None:
    """Disabling adapters unmerges them; so does unmerging after an adapter was changed."""
    model = model_of(torch.float32)
    before = weights(model)
    model.merge_adapter()
    with model.disable_adapter():
        outputs(model, torch.float32)
    assert differing(before, model) == []
    model.merge_adapter()
    layers(model)[0].lora_B["default"].weight.data += 1
    model.unmerge_adapter()
    assert differing(before, model) == ["base_model.model.0.lora_B.default.weight"]


def test_weights_follow_a_move_of_the_model_and_copies_are_whole() -> None:
    model = model_of(torch.float32)
    before = weights(model)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert differing(before, twin) == []
    model.to(torch.bfloat16).unmerge_adapter()
    assert differing({name: value.bfloat16() for name, value in before.items()}, model) == []


def test_a_merge_that_fails_keeps_nothing() -> None:
    model = model_of(torch.float32)
    layer = layers(model)[0]
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert layer._unmerged is None and not layer.merged and torch.equal(layer.base_layer.weight, before)
    layer.merge(adapter_names=["absent"])
    assert layer._unmerged is None
