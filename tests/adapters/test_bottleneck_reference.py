"""Bottlenecks against plain formulas of a block in float64, and against recorded outputs of the package ``adapters``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from peftlab.adapters.bottleneck import STYLES, Bottleneck, BottleneckConfig, BottleneckLayer, add_bottlenecks
from tests.adapters.bottleneck_examples import filled
from tests.family_examples import CLASSIFIERS, DECODERS, make_config, make_model

RECORDED = Path(__file__).parent / "bottlenecks_of_adapters.safetensors"
_SCALING = 1.7
# Sums of float64 in another order; the largest difference seen is 1.6e-14.
_CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def formula(x: Tensor, adapter: Bottleneck) -> Tensor:
    """``scaling * up(silu(down(x)))``."""
    z = x @ adapter.down.weight.T + adapter.down.bias
    return _SCALING * ((z * torch.sigmoid(z)) @ adapter.up.weight.T + adapter.up.bias)


def linear(x: Tensor, layer: Any) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def post_norm_block(x: Tensor, layer: Any, style: str, adapters: list[Bottleneck]) -> Tensor:
    """A block of BERT as its paper writes it, with the adapters where theirs put them.

    Args: layer: a ``BertLayer`` without adapters.
    """

    def norm(value: Tensor, module: Any) -> Tensor:
        spread = value.var(-1, unbiased=False, keepdim=True) + module.eps
        return (value - value.mean(-1, keepdim=True)) / spread.sqrt() * module.weight + module.bias

    own = layer.attention.self
    q, k, v = (heads(linear(x, p), own.num_attention_heads) for p in (own.query, own.key, own.value))
    weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
    h = linear((weights @ v).transpose(1, 2).flatten(2), layer.attention.output.dense)
    if style == "houlsby":
        h = h + formula(h, adapters[0])
    r = norm(h + x, layer.attention.output.LayerNorm)
    h = linear(F.gelu(linear(r, layer.intermediate.dense)), layer.output.dense)
    read = {"houlsby": h, "pfeiffer": norm(h + r, layer.output.LayerNorm), "parallel": r}[style]
    return norm(h + formula(read, adapters[-1]) + r, layer.output.LayerNorm)


def pre_norm_block(x: Tensor, layer: Any, style: str, adapters: list[Bottleneck]) -> Tensor:
    """A block of GPT-2, with the adapters before the residual sums. Args: layer: a ``GPT2Block`` without adapters."""

    def norm(value: Tensor, module: Any) -> Tensor:
        return F.layer_norm(value, value.shape[-1:], module.weight, module.bias, module.eps)

    attn, mlp = layer.attn, layer.mlp
    q, k, v = (norm(x, layer.ln_1) @ attn.c_attn.weight + attn.c_attn.bias).chunk(3, -1)
    q, k, v = (heads(part, attn.num_heads) for part in (q, k, v))
    past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    weights = torch.softmax((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~past, -torch.inf), -1)
    h = (weights @ v).transpose(1, 2).flatten(2) @ attn.c_proj.weight + attn.c_proj.bias
    if style == "houlsby":
        h = h + formula(h, adapters[0])
    r = h + x
    inner = F.gelu(norm(r, layer.ln_2) @ mlp.c_fc.weight + mlp.c_fc.bias, approximate="tanh")
    h = inner @ mlp.c_proj.weight + mlp.c_proj.bias
    read = {"houlsby": h, "pfeiffer": h + r, "parallel": r}[style]
    return h + formula(read, adapters[-1]) + r


def compare(family: str, style: Any) -> None:
    """Compares the first block of a model of one layer in float64: its output, and the gradients of input and adapters."""
    families = {"BertConfig": ("num_hidden_layers", CLASSIFIERS), "GPT2Config": ("n_layer", DECODERS)}
    count, known = families[family]
    config = make_config(family, {family: {**known[family], count: 1}})
    plain = make_model(config, "AutoModel").double()
    generator = torch.Generator().manual_seed(2)
    for parameter in plain.parameters():  # biases and norms start at 0 and 1, which would hide a fault
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    adapted = make_model(config, "AutoModel").double()
    adapted.load_state_dict(plain.state_dict())
    settings = BottleneckConfig(style, reduction_factor=4, non_linearity="silu", scaling=_SCALING)
    model = filled(add_bottlenecks(adapted, settings))
    adapters: Any = [layer.bottleneck["default"] for layer in model.bottleneck_layers()]
    assert all(p.dtype == torch.float64 for adapter in adapters for p in adapter.parameters())
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=generator, requires_grad=True)
    if family == "BertConfig":
        (actual,) = _first(model.get_base_model().encoder.layer[0](x))
        want = post_norm_block(x, plain.encoder.layer[0], style, adapters)
    else:
        (actual,) = _first(model.get_base_model().h[0](x))
        want = pre_norm_block(x, plain.h[0], style, adapters)
    torch.testing.assert_close(actual, want, **_CLOSE)
    weights = torch.randn(want.shape, dtype=torch.float64, generator=generator)
    inputs = [x, *(p for adapter in adapters for p in adapter.parameters())]
    gradients = [torch.autograd.grad((output * weights).sum(), inputs) for output in (actual, want)]
    for mine, reference in zip(*gradients, strict=True):
        assert reference.abs().max() > 0
        torch.testing.assert_close(mine, reference, **_CLOSE)


def _first(output: Any) -> tuple[Tensor]:
    return (output if isinstance(output, Tensor) else output[0],)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", ["BertConfig", "GPT2Config"])
def test_bottleneck_block_equals_the_formula(family: str, style: str) -> None:
    compare(family, style)


def _without_scaling(adapter: Any, x: Tensor) -> Any:
    return adapter.up(adapter.non_linearity(adapter.down(x)))


def _without_residual(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """The adapter replaces the output of its sublayer instead of being added to it."""
    output = layer.base_layer(*args, **kwargs)
    adapter = layer.bottleneck["default"]
    if layer.wraps_norm:
        return layer.base_layer(args[0] * 0 + adapter(output))
    h = output[0] if isinstance(output, tuple) else output
    changed = adapter(layer._input(h))
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


# Each fault replaces a method; (class, method, replacement, styles in which it makes a difference).
FAULTS: dict[str, tuple[type[nn.Module], str, Callable[..., Any], tuple[str, ...]]] = {
    "no scaling": (Bottleneck, "forward", _without_scaling, STYLES),
    "no residual": (BottleneckLayer, "forward", _without_residual, STYLES),
    "the adapter reads the output": (BottleneckLayer, "_input", lambda layer, h: h, ("parallel", "pfeiffer")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bottleneck_formula_notices(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, replacement, styles = FAULTS[fault]
    monkeypatch.setattr(owner, method, replacement)
    for style in styles:
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            compare("GPT2Config", style)


@pytest.mark.parametrize("style", STYLES)
def test_bottlenecks_equal_the_recorded_outputs_of_adapters(style: str) -> None:
    """Base weights, adapter weights and outputs that ``python -m tests.conformance.bottleneck_peers`` wrote."""
    from transformers import BertConfig, BertModel

    with safe_open(RECORDED, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        notes = file.metadata()
    assert (notes["adapters"], notes["transformers"]) == ("1.3.0", "4.57.6")
    settings = json.loads(notes["styles"])[style]
    base = BertModel(BertConfig(**json.loads(notes["config"]))).eval()
    base.load_state_dict({n.removeprefix("base."): t for n, t in tensors.items() if n.startswith("base.")})
    with torch.no_grad():
        without = base(tensors["input_ids"]).last_hidden_state
    model = add_bottlenecks(base, BottleneckConfig(style, **settings))
    for layer in model.bottleneck_layers():
        theirs = f"{style}.{layer.place.output.removesuffix('.dropout')}.adapters.recorded.adapter"
        adapter: Any = layer.bottleneck["default"]
        for mine, name in ((adapter.down, f"{theirs}_down.0"), (adapter.up, f"{theirs}_up")):
            mine.load_state_dict({key: tensors.pop(f"{name}.{key}") for key in ("weight", "bias")})
    assert not [name for name in tensors if name.startswith(f"{style}.") and ".adapters." in name]
    with torch.no_grad():
        output = model(tensors["input_ids"]).last_hidden_state
    assert (output - without).abs().max() > 0.1
    # Float32, after two layers; the largest difference seen is 1.4e-7, of Pfeiffer's style.
    torch.testing.assert_close(output, tensors[f"{style}.output"], rtol=0, atol=2e-6)
