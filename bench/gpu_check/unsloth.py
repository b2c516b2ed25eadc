"""gpu-check: the seven adapted linears of a Llama-3-8B layer against Unsloth's QKV, O and MLP functions, if it is installed.

Both compute the same: q, k and v of one input, o of another, then gate, up, SwiGLU and down, forward and backward for every input
and factor. Unsloth's MLP function includes SwiGLU, so "peftlab" calls Unsloth's SwiGLU kernels between its linears and differs in
the linears only. "peftlab, eager SwiGLU" uses the SwiGLU of a transformers step today. Unsloth gets bfloat16 factors without
autocast, which saves casts; ours are float32 under autocast, as in use.

Source: unsloth/kernels/fast_lora.py, swiglu.py and utils.py of Unsloth 2026.10.9 (PyPI). Importing them needs a GPU, so they were only
read. Their requirement for a layer (``_lora_dropout_and_bias``), extracted from the file, accepts these layers with and without dropout.
unslothai/unsloth at 015bdef0d94a has the same signatures, but no dropout.
"""

# ruff: noqa: N803, N806 -- sizes are called M, N, K and R, as in the kernels
from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

from peftlab_kernels.lora_linear.cases import DROPOUT

from bench.gpu_check.base import Device, Row, Task
from bench.gpu_check.linear_speed import Layer, adapted, agreement
from bench.gpu_check.roofline import CARD, UNSLOTH_TARGET, additions_us, card_of, layer_us
from bench.gpu_check.timing import Run, interleaved, reaches

RANK = 16
OURS, EAGER, THEIRS = "peftlab", "peftlab, eager SwiGLU", "Unsloth"
# Part of the layer -> the linears in it.
PARTS = {"q, k, v": ("q", "k", "v"), "o": ("o",), "MLP": ("gate", "up", "down")}
Forwards = dict[str, Callable[[Any], tuple[Any, ...]]]
# Part -> its input, [1, M, K], and the gradients of its outputs.
Tensors = dict[str, tuple[Any, list[Any]]]


def unsloth_speed(device: Device) -> Iterator[Task]:
    """Runs in its own process, because importing Unsloth patches other libraries."""
    for M in device.pick((8192, 2048), (16,)):
        for dropout in (0.0, DROPOUT):
            what = {"case": "seven linears against Unsloth", "M": M, "R": RANK, "dropout": dropout}
            yield Task(what, partial(_unsloth, device, M, dropout), seconds=6)


def _unsloth(device: Device, M: int, dropout: float) -> Row:
    import unsloth  # noqa: F401 -- its kernels expect that
    from unsloth import kernels

    layers = _layers(device, dropout)
    tensors = _tensors(device, layers, M)
    mine, their_own = ({n: getattr(layer, kind) for n, layer in layers.items()} for kind in ("wide", "narrow"))
    runs = {
        OURS: _run(device, _ours(mine, _their_swiglu(kernels)), mine, tensors, autocast=True),
        EAGER: _run(device, _ours(mine, _eager_swiglu), mine, tensors, autocast=True),
        THEIRS: _run(device, _theirs(their_own, kernels), their_own, tensors, autocast=False),
    }
    agree = agreement(runs, THEIRS) if not dropout else None
    timed = interleaved(device, runs, seconds=3.0, ahead=True)
    ratio = timed.ratio(THEIRS, OURS, "both")
    target = UNSLOTH_TARGET[M][dropout > 0] if device.has(CARD) else None
    return {
        "us": timed.spreads(),
        "rounds_us": timed.rounds(),
        "ratio": ratio,
        "eager_ratio": timed.ratio(THEIRS, EAGER, "both"),
        **_predicted(device, M, dropout > 0),
        "version": importlib.metadata.version("unsloth"),
        "target": target,
        "met": reaches(ratio, target),
        "agreement": agree,
        "ok": agree is None or agree["ok"],
        **timed.protocol(),
    }


def _predicted(device: Device, M: int, dropout: bool) -> Row:
    """Predictions for the linears only."""
    if not (card := card_of(device)):
        return {}
    theirs = layer_us("Unsloth", M, dropout=dropout, card=card)
    built = layer_us("built", M, dropout=dropout, card=card) + additions_us(M, card=card)
    return {"predicted_us": {THEIRS: theirs, "built": built}, "predicted_ratio": round(theirs / built, 3)}


def _layers(device: Device, dropout: float) -> dict[str, Layer]:
    """Layers that fail if Unsloth uses PEFT's forward instead of its kernels, because in these layers that is ours."""
    hidden, narrow, wide = device.pick((4096, 1024, 14336), (64, 64, 128))
    sizes = {"q": (hidden, hidden), "k": (narrow, hidden), "v": (narrow, hidden), "o": (hidden, hidden)}
    sizes |= {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide)}
    layers = {name: adapted(device, "nf4", N, K, RANK, dropout) for name, (N, K) in sizes.items()}

    def left(module: Any, inputs: Any) -> None:
        raise RuntimeError("Unsloth left its kernels for PEFT's forward")

    for layer in layers.values():
        layer.narrow.register_forward_pre_hook(left)
    return layers


def _tensors(device: Device, layers: dict[str, Layer], M: int) -> Tensors:
    import torch

    inputs = {}
    for number, (part, names) in enumerate(PARTS.items()):
        K = layers[names[0]].weight.shape[1]
        x = device.randn(1, M, K, seed=10 + number, dtype=torch.bfloat16).requires_grad_()
        sizes = [layers[name].weight.shape[0] for name in (names if part != "MLP" else ("down",))]
        inputs[part] = x, [device.randn(1, M, N, seed=20 + i, dtype=torch.bfloat16) for i, N in enumerate(sizes)]
    return inputs


def _run(device: Device, forwards: Forwards, modules: dict[str, Any], tensors: Tensors, *, autocast: bool) -> Run:
    """Forward and backward part by part. Each part is a phase; ``both`` is their sum."""
    import torch

    leaves = {
        part: [
            x,
            *(m.weight for n in PARTS[part] for m in (modules[n].lora_A["default"], modules[n].lora_B["default"])),
        ]
        for part, (x, _) in tensors.items()
    }

    def run(mark: Any) -> Any:
        results: list[Any] = []
        for part, (x, grads) in tensors.items():
            with torch.autocast(device.kind, torch.bfloat16, enabled=autocast):
                outputs = forwards[part](x)
            gradients = torch.autograd.grad(outputs, leaves[part], grads)
            mark(part)
            results += [*(y.detach() for y in outputs), *gradients]
        return tuple(results)

    return run


def _ours(modules: dict[str, Any], swiglu: Callable[[Any, Any], Any]) -> Forwards:
    return {
        "q, k, v": lambda x: (modules["q"](x), modules["k"](x), modules["v"](x)),
        "o": lambda x: (modules["o"](x),),
        "MLP": lambda x: (modules["down"](swiglu(modules["gate"](x), modules["up"](x))),),
    }


def _theirs(modules: dict[str, Any], kernels: Any) -> Forwards:
    """inplace=False: otherwise backward writes dX into x, and every call would get another input."""
    owner = SimpleNamespace(**{f"{name}_proj": module for name, module in modules.items()})
    return {
        "q, k, v": lambda x: kernels.apply_lora_qkv(owner, x, inplace=False),
        "o": lambda x: (kernels.apply_lora_o(owner, x),),
        "MLP": lambda x: (kernels.apply_lora_mlp_swiglu(owner, x, inplace=False),),
    }


def _eager_swiglu(gate: Any, up: Any) -> Any:
    from torch.nn import functional as F

    return F.silu(gate) * up


def _their_swiglu(kernels: Any) -> Callable[[Any, Any], Any]:
    import torch

    class SwiGLU(torch.autograd.Function):
        """Unsloth's kernels. Forward takes [1, M, N] gate and up; backward takes [M, N] and overwrites all three inputs."""

        @staticmethod
        def forward(ctx: Any, gate: Any, up: Any) -> Any:
            ctx.save_for_backward(gate, up)
            return kernels.swiglu_fg_kernel(gate, up)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            gate, up = ctx.saved_tensors
            flat = (t.view(-1, t.shape[-1]) for t in (grad.contiguous(), gate, up))
            _, d_up, d_gate = kernels.swiglu_DWf_DW_dfg_kernel(*flat)
            return d_gate.view_as(gate), d_up.view_as(up)

    return lambda gate, up: SwiGLU.apply(gate, up)
