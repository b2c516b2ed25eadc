"""gpu-check: Unsloth's fused LoRA linear on the same layer, where it is installed."""

# ruff: noqa: N803, N806 -- sizes are called M, N, K and R, as in the kernels
from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from _gpu_base import Device, Row, Task
from _gpu_lora_speed import DROPOUT, adapted, agreement, contestants
from _gpu_timing import interleaved


def unsloth_speed(device: Device) -> Iterator[Task]:
    """Unsloth's fused LoRA linear, in a process of its own because importing it patches other libraries."""
    for M in (2048, 8192):
        for dropout in (0.0, DROPOUT):
            what = {"case": "lora_linear against Unsloth", "M": M, "R": 16, "shape": [4096, 4096], "dropout": dropout}
            yield Task(what, partial(_unsloth, device, M, dropout), seconds=4)


def _unsloth(device: Device, M: int, dropout: float) -> Row:
    import importlib.metadata
    from types import SimpleNamespace

    import torch
    import unsloth  # noqa: F401 -- its kernels expect that
    from unsloth.kernels import apply_lora_o

    layer = adapted(device, "nf4", 4096, 4096, 16, dropout)
    x = device.randn(1, M, 4096, seed=6, dtype=torch.bfloat16).requires_grad_()
    grad = device.randn(1, M, 4096, seed=7, dtype=torch.bfloat16)
    own_x = x.detach().clone().requires_grad_()  # its backward may write into it
    owner = SimpleNamespace(o_proj=layer.narrow)

    def theirs(mark: Any) -> Any:
        y = apply_lora_o(owner, own_x)
        mark("forward")
        factors = [layer.narrow.lora_A["default"].weight, layer.narrow.lora_B["default"].weight]
        found = torch.autograd.grad(y, [own_x, *factors], grad)
        mark("backward")
        return y.detach(), *found

    runs = {"peftlab": contestants(device, layer, x, grad)["peftlab"], "Unsloth": theirs}
    agree = agreement(runs, "Unsloth") if not dropout else None
    with torch.no_grad():
        own_x.copy_(x)
    found = interleaved(device, runs, seconds=2.0, ahead=True)
    return {
        "us": found.spreads(),
        "rounds_us": found.rounds(),
        "ratio": found.ratio("Unsloth", "peftlab", "both"),
        "version": importlib.metadata.version("unsloth"),
        "expected": 1.12 if dropout else 1.05,
        "agreement": agree,
        "ok": agree is None or agree["ok"],
        **found.protocol(),
    }
