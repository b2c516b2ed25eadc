"""A fused forward stores nothing, so it holds, copies and saves no weight. It reads its inputs cheaply."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from peftlab import ops
from tests.adapters.fused_examples import STORAGES, N, fused_layer, linear, rows, run


@pytest.mark.parametrize("storage", STORAGES)
def test_fused_forward_leaves_nothing_on_the_layer(storage: str) -> None:
    layer = fused_layer(storage)
    layer(rows())  # the first forward of an int8 layer moves its matrix
    attributes, state = {**vars(layer)}, layer.state_dict()
    layer(rows()).sum().backward()
    assert vars(layer).keys() == attributes.keys()
    assert all(vars(layer)[name] is value for name, value in attributes.items())
    assert layer.state_dict().keys() == state.keys()


def test_fused_layer_frees_what_is_replaced() -> None:
    layer = fused_layer()
    layer(rows())
    gone = [
        weakref.ref(part)
        for part in (layer.lora_A["default"], layer.lora_B["default"].weight, layer.base_layer, layer.base_layer.weight)
    ]
    layer.delete_adapter("default")
    layer.base_layer = linear("none")
    gc.collect()
    assert [part() for part in gone] == [None] * 4
    layer = fused_layer("nf4")
    layer(rows())
    absmax = weakref.ref(layer.base_layer.weight.quant_state.absmax)
    layer.base_layer.weight = linear("nf4").weight
    layer.base_layer.quant_state = None  # bitsandbytes' own second reference
    gc.collect()
    assert absmax() is None


def test_fused_layer_copy_is_independent() -> None:
    layer = fused_layer()
    before = run(layer, rows())
    other = copy.deepcopy(layer)
    other.lora_B["default"].weight.data.zero_()
    other.base_layer.weight.data.zero_()
    assert torch.equal(run(layer, rows()), before)
    assert torch.equal(run(other, rows()), other.base_layer.bias.expand(3, N))


@pytest.mark.parametrize("storage", STORAGES)
def test_fused_forward_reads_its_state_without_slow_python_lookups(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``nn.Module.__getattr__`` and ``Params4bit.__torch_function__`` took most of a fused forward's Python time."""
    layer, detours = fused_layer(storage), []
    x = rows()
    layer(x)
    right = nn.Module.__getattr__
    kind = type(layer.base_layer.weight)
    monkeypatch.setattr(nn.Module, "__getattr__", lambda self, name: (detours.append(name), right(self, name))[1])
    if storage == "nf4":
        function = kind.__torch_function__
        counted = staticmethod(lambda f, *rest: (detours.append(f), function(f, *rest))[1])
        monkeypatch.setattr(kind, "__torch_function__", counted)
    monkeypatch.setattr(ops, "lora_linear", lambda x, *_, **__: x)
    weight, expected = layer.base_layer.weight, ["base_layer", "weight"]
    assert detours == expected, "detours are not counted"
    assert layer.slow_reason(x) is None
    layer._fused(x)
    assert detours == expected
    assert weight.requires_grad is False
    assert len(detours) == len(expected) + (storage == "nf4"), "detours are not counted"
