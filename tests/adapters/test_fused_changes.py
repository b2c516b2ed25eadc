"""The second forward of a fused layer sees every change since the first, in its path and its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from peftlab import ops
from tests.adapters.fused_examples import K, N, assert_as_peft, fused_layer, linear, replace, rows


class OwnLinear(nn.Linear):
    pass


class OwnParameter(nn.Parameter):
    pass


def bare(features: tuple[int, int], kind: type = nn.Linear, *, bias: bool = False) -> nn.Module:
    torch.manual_seed(3)
    return kind(*features, bias=bias)


# Change: (storage of the weight, the change, why the next forward is PEFT's own, or None).
Change = tuple[str, Callable[[Any], Any], str | None]
CHANGES: dict[str, Change] = {
    "set_adapter": ("none", lambda m: m.set_adapter("other"), None),
    "two adapters": ("none", lambda m: m.set_adapter(["default", "other"]), "2 adapters are active at once"),
    "the list of active adapters is written to": (
        "none",
        lambda m: (m.set_adapter(["default"]), m(rows()), m.active_adapters.append("other")),
        "2 adapters are active at once",
    ),
    "no adapter": ("none", lambda m: m.set_adapter([]), "0 adapters are active at once"),
    "delete_adapter": ("none", lambda m: m.delete_adapter("default"), None),
    "merge": ("none", lambda m: m.merge(), "no adapter is active"),
    "adapters off": ("none", lambda m: m.enable_adapters(False), "no adapter is active"),
    "lora_A replaced": ("none", lambda m: replace(m, "lora_A", bare((K, 4))), None),
    "lora_B replaced": ("none", lambda m: replace(m, "lora_B", bare((4, N))), None),
    "lora_A of another class": (
        "none", lambda m: replace(m, "lora_A", bare((K, 4), OwnLinear)), "its factors are not plain matrices",
    ),
    "lora_B of another class": (
        "none", lambda m: replace(m, "lora_B", bare((4, N), OwnLinear)), "its factors are not plain matrices",
    ),
    "lora_A with a bias": (
        "none", lambda m: replace(m, "lora_A", bare((K, 4), bias=True)), "its factors are not plain matrices",
    ),
    "lora_B gets a bias": (
        "none",
        lambda m: setattr(m.lora_B["default"], "bias", nn.Parameter(torch.ones(N))),
        "its factors are not plain matrices",
    ),
    "lora_A.weight replaced": (
        "none", lambda m: setattr(m.lora_A["default"], "weight", nn.Parameter(torch.ones(4, K))), None,
    ),
    "lora_B.weight.data replaced": (
        "none", lambda m: setattr(m.lora_B["default"].weight, "data", torch.ones(N, 4)), None,
    ),
    "a step of the optimizer": ("none", lambda m: m.lora_B["default"].weight.data.add_(1), None),
    "scaling": ("none", lambda m: m.scaling.update(default=-3.0), None),
    "set_scale": ("none", lambda m: m.set_scale("default", 5), None),
    "scaling is a tensor": (
        "none", lambda m: m.scaling.update(default=torch.tensor(2.0)), "its scaling is a tensor",
    ),
    "kernels": ("none", lambda m: setattr(m, "kernels", "reference"), "run.kernels=reference"),
    "another base layer": ("none", lambda m: setattr(m, "base_layer", linear("none", seed=5)), None),
    "a base layer of another class": (
        "none",
        lambda m: setattr(m, "base_layer", bare((K, N), OwnLinear).requires_grad_(False)),
        "its base layer is a OwnLinear",
    ),
    "the class of the base layer": (  # as FSDP2's fully_shard does
        "none", lambda m: setattr(m.base_layer, "__class__", OwnLinear), "its base layer is a OwnLinear",
    ),
    "the base weight replaced": (
        "none", lambda m: setattr(m.base_layer, "weight", nn.Parameter(torch.ones(N, K), requires_grad=False)), None,
    ),
    "the base weight of another class": (
        "none",
        lambda m: setattr(m.base_layer, "weight", OwnParameter(torch.ones(N, K), requires_grad=False)),
        "its base weight is a OwnParameter",
    ),
    "the base weight's data replaced": ("none", lambda m: setattr(m.base_layer.weight, "data", torch.ones(N, K)), None),
    "the base weight is a plain attribute": (  # as in a replica of DataParallel
        "none",
        lambda m: vars(m.base_layer).update(weight=m.base_layer._parameters.pop("weight").detach()),
        "its base weight is a Tensor",
    ),
    "the base bias replaced": (
        "none", lambda m: setattr(m.base_layer, "bias", nn.Parameter(torch.ones(N), requires_grad=False)), None,
    ),
    "the base bias removed": ("none", lambda m: setattr(m.base_layer, "bias", None), None),
    "the base weight is trained": (
        "none", lambda m: m.base_layer.weight.requires_grad_(True), "its base weight is trained",
    ),
    "a nf4 weight replaced": ("nf4", lambda m: setattr(m.base_layer, "weight", linear("nf4", seed=5).weight), None),
    "a nf4 weight's data replaced": (
        "nf4", lambda m: setattr(m.base_layer.weight, "data", linear("nf4", seed=5).weight.data), None,
    ),
    "a nf4 weight's state replaced": (
        "nf4", lambda m: setattr(m.base_layer.weight, "quant_state", linear("nf4", seed=5).weight.quant_state), None,
    ),
    "a nf4 weight's absmax replaced": (
        "nf4", lambda m: setattr(m.base_layer.weight.quant_state, "absmax", linear("nf4", 5).weight.quant_state.absmax),
        None,
    ),
    "a nf4 weight's offset replaced": (
        "nf4", lambda m: setattr(m.base_layer.weight.quant_state, "offset", torch.tensor(0.5)), None,
    ),
    "a nf4 weight of another type": (
        "nf4", lambda m: setattr(m.base_layer.weight.quant_state, "quant_type", "fp4"), "its weight is fp4, not nf4",
    ),
    "a nf4 layer's compute type": (
        "nf4",
        lambda m: setattr(m.base_layer, "compute_dtype", torch.bfloat16),
        "its compute type is torch.bfloat16, that of its input torch.float32",
    ),
    "a int8 weight replaced": ("int8", lambda m: setattr(m.base_layer, "weight", linear("int8", seed=5).weight), None),
    "a int8 weight's CB replaced": (
        "int8", lambda m: setattr(m.base_layer.state, "CB", m.base_layer.state.CB.flip(0)), None,
    ),
    "a int8 weight's SCB replaced": (
        "int8", lambda m: setattr(m.base_layer.state, "SCB", 2 * m.base_layer.state.SCB), None,
    ),
    "a int8 layer leaves training": (
        "int8", lambda m: m.eval(), "bitsandbytes multiplies int8 by int8 on a CPU outside training",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_fused_forward_sees_the_change(change: str) -> None:
    storage, apply, reason = CHANGES[change]
    layer = fused_layer(storage)
    before = assert_as_peft(layer)
    assert layer.kept_slow is None
    apply(layer)
    after = assert_as_peft(layer)
    assert layer.kept_slow == reason
    if reason is None:
        assert not torch.allclose(after, before, atol=1e-3), "nothing changed, so nothing is shown"


UNDONE: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], str]] = {
    "merge": (lambda m: m.merge(), lambda m: m.unmerge(), "no adapter is active"),
    "adapters off": (lambda m: m.enable_adapters(False), lambda m: m.enable_adapters(True), "no adapter is active"),
    "kernels": (
        lambda m: setattr(m, "kernels", "reference"), lambda m: setattr(m, "kernels", "auto"), "run.kernels=reference",
    ),
    "two adapters": (
        lambda m: m.set_adapter(["default", "other"]), lambda m: m.set_adapter("default"),
        "2 adapters are active at once",
    ),
    "a variant": (
        lambda m: m.lora_variant.update(default=Doubled()), lambda m: m.lora_variant.clear(),
        "it is a variant of LoRA (Doubled)",
    ),
    "a trained weight": (
        lambda m: m.base_layer.weight.requires_grad_(True), lambda m: m.base_layer.weight.requires_grad_(False),
        "its base weight is trained",
    ),
    "another dropout": (
        lambda m: replace(m, "lora_dropout", nn.Hardtanh()), lambda m: replace(m, "lora_dropout", nn.Identity()),
        "its dropout is a Hardtanh",
    ),
}  # fmt: skip


class Doubled:
    """A variant of LoRA as PEFT calls it."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        delta = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        return result + 2 * module.scaling[active_adapter] * delta


@pytest.mark.parametrize("change", UNDONE)
def test_fused_layer_is_fused_again_after_undo(change: str) -> None:
    apply, undo, reason = UNDONE[change]
    layer = fused_layer()
    before = assert_as_peft(layer)
    apply(layer)
    assert_as_peft(layer)
    assert layer.kept_slow == reason
    undo(layer)
    torch.testing.assert_close(assert_as_peft(layer), before, rtol=1e-5, atol=1e-6)  # merging rounds the weight
    assert layer.kept_slow is None


def test_fused_forward_reads_the_current_dropout() -> None:
    layer = fused_layer(dropout=0.5)
    drawn = assert_as_peft(layer)
    layer.eval()
    whole = assert_as_peft(layer)
    assert not torch.equal(drawn, whole)
    layer.train()
    assert torch.equal(assert_as_peft(layer), drawn)
    layer.lora_dropout["default"].p = 0.25
    fewer = assert_as_peft(layer)
    assert not torch.equal(fewer, drawn) and not torch.equal(fewer, whole)
    replace(layer, "lora_dropout", nn.Dropout(0.5))
    assert torch.equal(assert_as_peft(layer), drawn)
    replace(layer, "lora_dropout", nn.Identity())
    assert torch.equal(assert_as_peft(layer), whole)
    assert layer.kept_slow is None


def test_fused_forward_reads_the_current_dtype_device_and_autocast() -> None:
    layer = fused_layer()
    assert assert_as_peft(layer).dtype == torch.float32
    half = rows(torch.bfloat16)
    wrong = "its input is torch.bfloat16, its weight torch.float32"
    assert layer.slow_reason(half) == wrong
    with torch.autocast("cpu", torch.bfloat16):
        for x in (half, rows()):
            assert assert_as_peft(layer, x).dtype == torch.bfloat16
            assert layer.kept_slow is None
        assert layer.slow_reason(torch.ones(3, K, dtype=torch.int64)) == "its input is torch.int64"
    assert layer.slow_reason(half) == wrong
    assert assert_as_peft(layer).dtype == torch.float32
    assert layer.slow_reason(rows().to("meta")) == "its input is on meta, its weight on cpu"
    assert layer.slow_reason(rows(), ("second",)) == "the call has arguments other than its input"
    layer.to(torch.bfloat16)
    assert assert_as_peft(layer, half).dtype == torch.bfloat16
    assert layer.kept_slow is None
    assert layer.slow_reason(rows()) == "its input is torch.float32, its weight torch.bfloat16"
    layer.to("meta")
    assert layer.slow_reason(half) == "its input is on cpu, its weight on meta"


def test_fused_forward_asks_for_its_kernels_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fused_layer()
    assert_as_peft(layer)
    monkeypatch.setattr(ops, "operands_problem", lambda kernels: f"no {kernels} here")
    monkeypatch.setattr(ops, "triton_problem", lambda device, *, products: f"no Triton on {device.type}")
    for kernels, reason in {"cpu-bf16": "no cpu-bf16 here", "triton": "no Triton on cpu", "auto": None}.items():
        layer.kernels = kernels
        layer(rows())
        assert layer.kept_slow == reason


def test_fused_layer_trace_skips_the_triton_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the check runs a kernel, which cannot be traced. The operator checks when it runs."""
    layer = fused_layer()
    layer.kernels = "triton"

    def asked(device: torch.device, *, products: bool) -> None:
        torch._dynamo.graph_break()

    monkeypatch.setattr(ops, "triton_problem", asked)
    torch._dynamo.reset()
    monkeypatch.setattr(ops, "lora_linear", lambda x, *args, **options: x)
    assert torch.compile(layer, backend="eager", fullgraph=True)(rows()).shape == rows().shape


def test_fused_layer_leaves_changed_nf4_weights_to_peft() -> None:
    layer = fused_layer("nf4")
    assert_as_peft(layer)
    state = layer.base_layer.weight.quant_state
    state.packing_format_for_cpu = True
    assert layer.slow_reason(rows()) == "its weight was repacked for AVX512"
    state.packing_format_for_cpu = False
    assert layer.slow_reason(rows()) is None
    state.shape = torch.Size([K, N])
    assert layer.slow_reason(rows()) == f"its weight was quantized as [{K}, {N}]"
    layer.base_layer.weight.quant_state = None
    assert layer.slow_reason(rows()) == "its weight is not quantized yet"


def test_fused_int8_weights_stay_where_bitsandbytes_saves_them() -> None:
    layer = fused_layer("int8")
    for _ in range(2):
        base = layer.base_layer
        base.weight = linear("int8", seed=6).weight  # as after a move, the parameter holds the matrix and its scales
        assert base.weight.CB is not None
        assert_as_peft(layer)
        assert layer.kept_slow is None
        assert base.weight.CB is None and base.weight.SCB is None
        assert base.weight.is_set_to(base.state.CB)
    base.weight.data = torch.zeros_like(base.weight.data)
    layer(rows())
    assert base.weight.is_set_to(base.state.CB)
    base.state.has_fp16_weights = True
    assert layer.slow_reason(rows()) == "its weight is kept in 16 bits"
