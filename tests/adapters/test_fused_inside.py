"""A fused layer calls everything that PEFT's forward calls inside a layer, such as hooks."""

from __future__ import annotations

import pytest
from torch import nn
from torch.testing import assert_close

from tests.adapters.fused_examples import assert_as_peft, fused_layer, linear, rows

PARTS = ("base_layer", "lora_A", "lora_B", "lora_dropout")
HOOKS = {
    "before the forward": lambda part, seen: part.register_forward_pre_hook(lambda *_: seen.append(1)),
    "after the forward": lambda part, seen: part.register_forward_hook(lambda *_: seen.append(1)),
    "before the backward": lambda part, seen: part.register_full_backward_pre_hook(lambda *_: seen.append(1)),
    "after the backward": lambda part, seen: part.register_full_backward_hook(lambda *_: seen.append(1)),
}


@pytest.mark.parametrize("when", HOOKS)
@pytest.mark.parametrize("part", PARTS)
def test_fused_layer_runs_a_hook_inside_it(part: str, when: str) -> None:
    layer, seen = fused_layer(), []
    assert_as_peft(layer)
    module = layer.base_layer if part == "base_layer" else getattr(layer, part)["default"]
    hook = HOOKS[when](module, seen)
    layer(rows()).sum().backward()
    assert seen and layer.kept_slow == "a hook is registered inside it"
    hook.remove()
    assert_as_peft(layer)
    assert layer.kept_slow is None


@pytest.mark.parametrize("part", PARTS)
def test_fused_layer_calls_a_replaced_forward(part: str) -> None:
    """accelerate's offloading replaces ``forward`` on the instance."""
    layer, calls = fused_layer(), []
    assert_as_peft(layer)
    module = layer.base_layer if part == "base_layer" else getattr(layer, part)["default"]
    right = module.forward
    module.forward = lambda x: (calls.append(1), right(x))[1]
    layer(rows())
    assert calls and layer.kept_slow == "a hook is registered inside it"
    del module.forward
    layer(rows())
    assert layer.kept_slow is None


def test_fused_layer_calls_an_adapter_below_it() -> None:
    """PEFT can stack adapters of two kinds. The base layer of one is then the other."""
    from peft import IA3Config, get_peft_model
    from peft.tuners.ia3 import IA3Layer

    layer = fused_layer()
    below = nn.Sequential()
    below.add_module("linear", linear("none"))
    config = IA3Config(target_modules=["linear"], feedforward_modules=[], init_ia3_weights=False)
    below = get_peft_model(below, config).base_model.model.linear
    assert isinstance(below, IA3Layer)
    layer.base_layer = below
    x = rows()
    low_rank = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    assert_close(layer(x), below(x) + low_rank)
    assert layer.kept_slow == "its base layer is adapted itself"


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_fused_layer_keeps_the_forward_of_a_quantized_subclass(storage: str) -> None:
    layer = fused_layer(storage)
    kind = type(layer.base_layer)
    layer.base_layer.__class__ = type("Own", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    assert_as_peft(layer)
    assert layer.kept_slow == "its base layer is a Own"
