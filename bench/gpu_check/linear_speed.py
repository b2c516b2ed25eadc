"""gpu-check: adapted linears of Llama-3-8B against PEFT + bitsandbytes, and against the bare product of cuBLAS.

The baseline is PEFT's own forward of the same layer (``run.kernels=reference``), set up as PEFT's documentation recommends
for speed: bfloat16 compute type, and either float32 factors under bfloat16 autocast (as Trainer does, but without PEFT's
casts of the input) or bfloat16 factors without autocast. The faster of the two counts.
"""

# ruff: noqa: N803, N806 -- sizes are called M, N, K and R, as in the kernels
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from peftlab_kernels.lora_linear.cases import DROPOUT, DRY_TIMED, LAYER, TIMED

from bench.gpu_check.base import Device, Row, Task
from bench.gpu_check.dequant_speed import bytes_per_s, flops_per_s
from bench.gpu_check.roofline import (
    CARD,
    DROPOUT_MEMORY_TARGET,
    LIMIT,
    RANKS_TARGET,
    TARGET,
    base_bytes,
    card_of,
    gemm_flops,
    layer_us,
    predicted_us,
)
from bench.gpu_check.timing import Run, compared, interleaved, reaches

PEFT = ("PEFT, autocast", "PEFT, bf16")
FLUSHED_ROWS = 512  # up to here the L2 may still hold a call's inputs from the call before


@dataclass(frozen=True)
class Layer:
    """One frozen weight in two PEFT layers: ``wide`` has float32 factors, ``narrow`` bfloat16 ones."""

    wide: Any
    narrow: Any
    weight: Any


def adapted(device: Device, kind: str, N: int, K: int, R: int, dropout: float) -> Layer:
    """A random layer of peftlab. Its mode decides whether it runs PEFT's forward."""
    import torch
    from torch import nn

    from peftlab.models import import_bitsandbytes

    values = (device.randn(N, K, seed=5) / K**0.5).to(torch.bfloat16)
    bnb = import_bitsandbytes()
    if kind == "nf4":
        base = bnb.nn.Linear4bit(
            K, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True, device="meta"
        )
        base.weight = bnb.nn.Params4bit(
            values, requires_grad=False, quant_type="nf4", compress_statistics=True, module=base
        ).to(device.kind)
        base.support_avx512bf16_for_cpu = False
    else:
        base = nn.Linear(K, N, bias=False, dtype=torch.bfloat16, device="meta")
        base.weight = nn.Parameter(values, requires_grad=False)
    wide, narrow = (_with_lora(base, R, dropout) for _ in range(2))
    with torch.no_grad():
        wide.lora_B["default"].weight.normal_(0, 0.02 / R**0.5)
    for part, other in ((wide.lora_A, narrow.lora_A), (wide.lora_B, narrow.lora_B)):
        part["default"].to(device.kind, torch.float32)
        other["default"].weight = nn.Parameter(part["default"].weight.detach().to(torch.bfloat16))
    # Only PEFT's layer on a dense weight casts under autocast, from bfloat16 to float32 and back.
    wide.cast_input_dtype_enabled = False
    return Layer(wide.train(), narrow.train(), values)


def _with_lora(base: Any, R: int, dropout: float) -> Any:
    from peft import LoraConfig, inject_adapter_in_model
    from torch import nn

    from peftlab.adapters.fused import register

    holder = nn.Module()
    holder.proj = base
    config = LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=dropout, target_modules=["proj"])
    inject_adapter_in_model(register(config), holder)
    return holder.proj


def contestants(device: Device, layer: Layer, x: Any, grad: Any) -> dict[str, Run]:
    """Contestants by name: each runs forward and backward for x and the factors, on the same tensors."""
    import torch
    from torch.nn import functional as F

    def of(module: Any, kernels: str, autocast: bool) -> Run:
        leaves = [x, module.lora_A["default"].weight, module.lora_B["default"].weight]

        def run(mark: Any) -> Any:
            module.kernels = kernels
            with torch.autocast(device.kind, torch.bfloat16) if autocast else contextlib.nullcontext():
                y = module(x)
            mark("forward")
            gradients = torch.autograd.grad(y, leaves, grad)
            mark("backward")
            return y.detach(), *gradients

        return run

    def bare(mark: Any) -> Any:
        y = F.linear(x, layer.weight)
        mark("forward")
        gradients = torch.autograd.grad(y, [x], grad)
        mark("backward")
        return y.detach(), *gradients

    return {
        "peftlab": of(layer.wide, "auto", True),
        PEFT[0]: of(layer.wide, "reference", True),
        PEFT[1]: of(layer.narrow, "reference", False),
        "cuBLAS, no adapter": bare,
    }


def lora_speed(device: Device, part: str) -> Iterator[Task]:
    """part: ``first`` for the rows of most claims, or ``rest``."""
    shapes = device.pick(list(LAYER), [(96, 128)])
    for kind, M, R in device.pick(TIMED, DRY_TIMED)[part]:
        for dropout in (0.0, DROPOUT):
            for N, K in shapes:
                what = _what(kind, M, R, dropout) | {"shape": [N, K]}
                yield Task(what, partial(_linear, device, kind, M, N, K, R, dropout), seconds=2.5 if M >= 2048 else 1.5)
            what = _what(kind, M, R, dropout) | {"case": "seven linears of a Llama-3-8B layer"}
            yield Task(what, partial(_layer, device, kind, M, R, dropout, shapes), seconds=0)


def _what(kind: str, M: int, R: int, dropout: float) -> Row:
    return {"case": "lora_linear", "kind": kind, "M": M, "R": R, "dropout": dropout}


def _linear(device: Device, kind: str, M: int, N: int, K: int, R: int, dropout: float) -> Row:
    import torch
    from peftlab_kernels.lora_linear import plan

    layer = adapted(device, kind, N, K, R, dropout)
    x = device.randn(M, K, seed=6, dtype=torch.bfloat16).requires_grad_()
    grad = device.randn(M, N, seed=7, dtype=torch.bfloat16)
    runs = contestants(device, layer, x, grad)
    runs["peftlab"](lambda phase: None)
    slow = layer.wide.kept_slow
    memory = _memory(device, runs, dropout > 0)
    agree = agreement(runs, PEFT[0]) if not dropout else None
    timed = interleaved(device, runs, seconds=1.0, flush=M <= FLUSHED_ROWS, ahead=True)
    phases = ("forward", "backward", "both")
    best = {phase: timed.fastest(PEFT, phase) for phase in phases}
    ratios = {phase: timed.ratio(best[phase], "peftlab", phase) for phase in phases}
    floor = _floor_us(device, kind, M, N, K)
    ours = timed.times["peftlab"]["both"].median
    chosen = plan.choose(kind, x.device, M=M, N=N, K=K, dropout=dropout > 0, on_grid=kind == "dense", backend="triton")
    row: Row = {
        "us": timed.spreads(),
        "rounds_us": timed.rounds(),
        "ratio": ratios,
        "faster_peft": best,
        "over_cublas": timed.ratio("peftlab", "cuBLAS, no adapter", "both"),
        **memory,
        "plan": [chosen.forward, chosen.backward],
        "bitsandbytes_forward": _bnb_path(device, kind, M, N, K),
        "agreement": agree,
        "floor_us": floor,
        "above_limit": not device.dry and ours < 0.9 * floor,
        "l2_flushed": M <= FLUSHED_ROWS,
        "liger": "has no counterpart of a LoRA linear",
        **timed.protocol(),
    }
    if M >= 512 and (card := card_of(device)):
        row["predicted_us"] = {
            who: predicted_us(who, kind, M, N, K, R, dropout=dropout > 0, card=card) for who in ("PEFT", "built")
        }
    if M <= FLUSHED_ROWS:  # where launches take most of the time
        alone = interleaved(device, runs, seconds=0.3, flush=True)
        row["alone_us"] = {name: phases["both"] for name, phases in alone.spreads().items()}
        row["alone_ratio"] = alone.ratio(alone.fastest(PEFT, "both"), "peftlab", "both")
    if slow or (agree is not None and not agree["ok"]):
        row |= {"slow": slow, "ok": False}
    return row


def agreement(runs: dict[str, Run], other: str) -> Row:
    """Relative differences of outputs and gradients: a contestant that computes something else gets no figure."""
    got, want = (runs[name](lambda phase: None) for name in ("peftlab", other))
    errors = [
        float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(got, want, strict=True)
    ]  # fmt: skip
    # Each path rounds twice; a missing scale or factor is off by tens of percent.
    return {"y, dX, dA, dB": errors, "ok": max(errors) <= 2e-2}


def _memory(device: Device, runs: dict[str, Run], dropout: bool) -> Row:
    """Peak bytes beyond the inputs, including scratch, and bytes held from forward to backward, without the output."""
    from peftlab_kernels.runtime import release_scratch

    peaks, held = {}, {}
    for name, run in runs.items():
        release_scratch()
        peaks[name] = device.peak(partial(run, lambda phase: None))
        seen: dict[str, int] = {}
        before = device.allocated()
        output = run(partial(_seen, device, seen))[0]
        held[name] = seen["forward"] - before - output.numel() * output.element_size()
        del output
    row: Row = {"peak_bytes": peaks, "held_bytes": held, "held_share": None}
    smallest = min(held[name] for name in PEFT)
    if dropout and smallest > 0:
        row["held_share"] = held["peftlab"] / smallest
        row["held_target"], row["held_met"] = DROPOUT_MEMORY_TARGET, row["held_share"] <= DROPOUT_MEMORY_TARGET
    return row


def _seen(device: Device, seen: dict[str, int], phase: str) -> None:
    seen.setdefault(phase, device.allocated())


def _floor_us(device: Device, kind: str, M: int, N: int, K: int) -> float:
    """Least time of forward and dX: FLOPs at the measured rate, or the fewest bytes where the L2 does not help."""
    flops = 1e6 * 2 * gemm_flops(M, N, K) / flops_per_s(device)
    moved = base_bytes(kind, M, N, K) if M <= FLUSHED_ROWS else 0.0
    return max(flops, 1e6 * moved / 2 / bytes_per_s(device))


def _bnb_path(device: Device, kind: str, M: int, N: int, K: int) -> str | None:
    """Whether bitsandbytes' forward uses its fused product or dequantizes and multiplies; bitsandbytes does not report it."""
    if kind != "nf4" or device.dry:
        return None
    import torch

    try:
        from bitsandbytes.backends.cuda.ops import _gemm_4bit_use_custom_fn as fused
    except ImportError:
        return "unknown"
    return "fused" if M <= 1536 and fused(0, torch.bfloat16, M, N, K) else "dequantize + product"


def _layer(device: Device, kind: str, M: int, R: int, dropout: float, shapes: list[tuple[int, int]]) -> Row:
    """Sums over the linears of a layer, next to the predictions of kernels.md's model."""
    parts: list[tuple[int, Row]] = []
    for N, K in shapes:
        linear_row = device.row_of(**_what(kind, M, R, dropout), shape=[N, K])
        if linear_row is None:
            return {"not_run": f"{N}x{K} was not measured, or is red", "ok": None}
        parts.append((LAYER.get((N, K), 1), linear_row))
    us = {name: sum(count * row["us"][name]["both"][1] for count, row in parts) for name in parts[0][1]["us"]}

    def blocks(who: Callable[[Row], str]) -> list[float]:
        """The sum over the layer, per block."""
        times = ([count * t for t in row["rounds_us"][who(row)]["both"]] for count, row in parts)
        return [sum(values) for values in zip(*times, strict=True)]

    ratio = compared(blocks(lambda row: row["faster_peft"]["both"]), blocks(lambda row: "peftlab"))
    targets = TARGET.get(M, {}) if R == 16 else RANKS_TARGET
    target = targets.get(dropout > 0) if kind == "nf4" and device.has(CARD) else None
    fastest = sum(count * row["us"][row["faster_peft"]["both"]]["both"][1] for count, row in parts)
    row: Row = {"us": us, "fastest_peft_us": fastest, "ratio": ratio, "target": target, "met": reaches(ratio, target)}
    card = card_of(device)
    if M >= 512 and card:
        options: Row = {"dropout": dropout > 0, "kind": kind, "card": card}
        predicted = {who: layer_us(who, M, R, **options) for who in ("PEFT", "limit", "built")}
        row |= {"predicted_us": predicted, "predicted_ratio": round(predicted["PEFT"] / predicted["built"], 3)}
    if kind == "nf4" and R == 16 and M >= 2048 and card == CARD:
        row["limit"] = LIMIT[dropout > 0]
        row["above_limit"] = ratio["value"] > row["limit"]
    return row
