"""The comparison with Unsloth, on a CPU, with plain PyTorch functions of the same signatures in its place."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bench.gpu_check import base, unsloth

ROOT = Path(__file__).resolve().parents[3]


def linear(proj: Any, x: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight = proj.base_layer.weight
    W = dequantize_4bit(weight.data, weight.quant_state).to(x.dtype)
    A, B = proj.lora_A["default"].weight, proj.lora_B["default"].weight
    return x @ W.t() + (x @ A.t()) @ B.t() * proj.scaling["default"]


def kernels(**changes: Any) -> ModuleType:
    def swiglu_backward(grad: torch.Tensor, e: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """h, the gradients of up and of gate, written into the memory of the arguments."""
        with torch.enable_grad():
            gate, up = (t.detach().clone().requires_grad_() for t in (e, g))
            h = F.silu(gate) * up
            d_gate, d_up = torch.autograd.grad(h, [gate, up], grad)
        return grad.copy_(h.detach()), e.copy_(d_up), g.copy_(d_gate)

    def mlp(owner: Any, x: torch.Tensor, inplace: bool = True) -> torch.Tensor:
        return linear(owner.down_proj, F.silu(linear(owner.gate_proj, x)) * linear(owner.up_proj, x))

    module = ModuleType("unsloth.kernels")
    functions = {
        "apply_lora_qkv": lambda owner, x, inplace=True: tuple(
            linear(proj, x) for proj in (owner.q_proj, owner.k_proj, owner.v_proj)
        ),
        "apply_lora_o": lambda owner, x: linear(owner.o_proj, x),
        "apply_lora_mlp_swiglu": mlp,
        "swiglu_fg_kernel": lambda e, g: F.silu(e) * g,
        "swiglu_DWf_DW_dfg_kernel": swiglu_backward,
    }
    for name, function in (functions | changes).items():
        setattr(module, name, function)
    return module


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    package = ModuleType("unsloth")
    package.kernels = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unsloth", package)
    monkeypatch.setitem(sys.modules, "unsloth.kernels", module)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == "unsloth" else version(name))


def rows() -> list[dict[str, Any]]:
    return [task.run() for task in unsloth.unsloth_speed(base.Device("cpu"))]


def test_unsloth_and_peftlab_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, kernels())
    plain, dropped = rows()
    assert plain["ok"] and max(plain["agreement"]["y, dX, dA, dB"]) < 2e-2
    # q, k, v with x and six factors; o with x and two; down's output with x and six.
    assert len(plain["agreement"]["y, dX, dA, dB"]) == (3 + 7) + (1 + 3) + (1 + 7)
    assert dropped["agreement"] is None and dropped["ok"]
    for row in (plain, dropped):
        assert row["us"].keys() == {"peftlab", "peftlab, eager SwiGLU", "Unsloth"}
        assert all(phases.keys() == {"q, k, v", "o", "MLP", "both"} for phases in row["us"].values())
        assert row["ratio"]["value"] > 0 and row["eager_ratio"]["value"] > 0


def test_unsloth_with_another_result_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, kernels(apply_lora_o=lambda owner, x: 1.05 * linear(owner.o_proj, x)))
    assert [row["ok"] for row in rows()] == [False, True]


def test_unsloth_that_calls_our_forward_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If Unsloth does not know a configuration, it calls the layer itself, which is peftlab's."""
    install(monkeypatch, kernels(apply_lora_o=lambda owner, x: owner.o_proj(x)))
    with pytest.raises(RuntimeError, match="left its kernels"):
        rows()
