"""gpu-check: small adapters survive rounding, dropout keeps the right elements, two calls give the same bytes."""

# ruff: noqa: N806 -- sizes are called M, N, K and R, as in the kernels
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peftlab_kernels.lora_linear import dropout_mask, plan
from peftlab_kernels.lora_linear.cases import (
    DROPOUT,
    DRY_SHAPES,
    NAMES,
    SCALE,
    SEED,
    WAYS,
    Way,
    fused,
    keep_mask,
    make_case,
    unfused,
)

from bench.gpu_check.base import Device, Row, Task


def adapter_behaviour(device: Device) -> Iterator[Task]:
    """Small adapters, the mask and determinism."""
    for kind in ("nf4", "int8", "dense"):
        yield Task({"check": "a small adapter passes", "kind": kind}, partial(_gain, device, kind))
    for dropout in (DROPOUT, 0.5):
        yield Task({"check": "dropout mask", "dropout": dropout}, partial(_mask, device, dropout))
    for kind, ways in WAYS.items():
        for way in ways:
            what = {"check": "two calls give the same bytes", "kind": kind, "forward": way[0], "dropout": way[2]}
            yield Task(what, partial(_same_twice, device, kind, way))


def _gain(device: Device, kind: str) -> Row:
    """Share of an adapter of |sBA| = 1e-3 |W| that is left in a bfloat16 output, by plan.

    With a single rounding, of a merged weight or of an output to which the product was added, nearly all of it must be
    left. If the output is rounded before the addition, or the adapter is merged into 16 bits, about half is lost.
    """
    M, N, K, R = shape = device.pick((2048, 4096, 4096, 16), (64, 128, 128, 8))
    case = make_case(device, kind, shape, torch.bfloat16, dropout=0.0)
    A, B = case.A.double(), case.B.double()
    B = (B * (1e-3 / SCALE * float(case.W.norm()) / float((B @ A).norm()))).to(torch.bfloat16)
    case = replace(case, B=B, bias=torch.zeros_like(case.bias))
    base = case.x.double() @ case.W.T
    adapter = SCALE * case.x.double() @ A.T @ B.double().T

    def gain(y: Any) -> float:
        return float(((y.double() - base) * adapter).sum() / adapter.square().sum())

    gains = {"unfused": gain(unfused(case)["y"])}
    for way in ("merged", "split"):
        with plan.forced(plan.Plan(way, way)):
            gains[way] = gain(fused(case, device.backend(torch.bfloat16))["y"])
    # A dry run has too few elements to judge.
    margin, spare = device.pick((0.05, 0.02), (0.5, 0.5))
    lossless = ["split"] if kind == "dense" else ["split", "merged"]
    ok = all(abs(gains[way] - 1) <= margin for way in lossless) and gains["merged"] >= gains["unfused"] - spare
    return {"shape": [M, N, K, R], "size": 1e-3, "gain": gains, "ok": ok}


def _mask(device: Device, dropout: float) -> Row:
    """The bits equal the NumPy reference, and the kept share is within five sigma, in total and per bit of a byte."""
    M, K = device.pick((2048, 4096), (64, 96))
    x = torch.zeros(M, K, device=device.kind)
    keep, keep_scale = dropout_mask(x, dropout, torch.tensor(SEED), backend="triton")
    share, same = 1 / keep_scale, bool(torch.equal(keep, keep_mask(device.kind, "triton", M, K, dropout)))
    off = []
    for part in (keep, *(keep[:, place::8] for place in range(8))):
        sigma = (share * (1 - share) / part.numel()) ** 0.5
        off.append(abs(float(part.double().mean()) - share) / sigma)
    kept = float(keep.double().mean())
    return {"kept": kept, "expected": share, "sigmas_off": max(off), "as_reference": same, "ok": same and max(off) < 5}


def _same_twice(device: Device, kind: str, way: Way) -> Row:
    dtype = torch.bfloat16
    shape = device.pick((2048, 4096, 4096, 16), DRY_SHAPES[0])
    case = make_case(device, kind, shape, dtype, dropout=way[2])
    with plan.forced(plan.Plan(way[0], way[1])):
        first, second = (fused(case, device.backend(dtype)) for _ in range(2))
    differing = [name for name in NAMES if not torch.equal(first[name], second[name])]
    return {"shape": list(shape), "differing": differing, "ok": not differing}
