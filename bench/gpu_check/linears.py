"""gpu-check: lora_linear forward and every gradient against float64, for every plan, and with default settings."""

# ruff: noqa: N806 -- sizes are called M, N, K and R, as in the kernels
from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from peftlab_kernels.lora_linear import plan
from peftlab_kernels.lora_linear.cases import DROPOUT, DRY_SHAPES, GATE, NAMES, WAYS, fused, make_case, truth

from bench.gpu_check.base import Device, Row, Task, relative
from bench.gpu_check.checks import checks_of


def lora_correctness(device: Device, dtype: str) -> Iterator[Task]:
    """The rows of the op's cases.py, then rows with default settings against fixed limits."""
    # Otherwise cuBLAS may add parts of a long sum in 16 bits for only one of the paths.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    yield from checks_of(device, "lora_linear", dtype)
    if dtype == "float32":
        return
    for kind in WAYS:
        for dropout in (0.0, DROPOUT):
            what = {"check": "lora_linear, as in use", "kind": kind, "dtype": dtype, "dropout": dropout}
            yield Task(what, partial(_as_in_use, device, kind, dtype, dropout))


def _as_in_use(device: Device, kind: str, dtype_name: str, dropout: float) -> Row:
    """Relative errors of the chosen plan, with PyTorch's default settings, against fixed limits."""
    dtype = getattr(torch, dtype_name)
    shape = device.pick((2048, 4096, 4096, 16), DRY_SHAPES[0])
    M, N, K = shape[:3]
    case = make_case(device, kind, shape, dtype, dropout=dropout, wide=True)
    chosen = plan.choose(
        kind,
        case.x.device,
        M=M,
        N=N,
        K=K,
        dropout=dropout > 0,
        on_grid=kind == "dense" and dtype.itemsize == 2,
        backend="triton",
    )
    settings = torch.backends.cuda.matmul
    settings.allow_bf16_reduced_precision_reduction = settings.allow_fp16_reduced_precision_reduction = True
    try:
        actual, want = fused(case, device.backend(dtype)), truth(case)
    finally:
        settings.allow_bf16_reduced_precision_reduction = settings.allow_fp16_reduced_precision_reduction = False
    errors = {name: relative(actual[name].double() - want[name], want[name]) for name in NAMES[:4]}
    activations, factors = GATE[dtype_name]
    limits = {"y": activations, "x": activations, "A": factors, "B": factors}
    if kind == "int8" and chosen.forward == "library":
        limits["y"] = 2e-2  # LLM.int8 rounds x to 8 bits: 1 / (254 sqrt(3)) of a row's largest value
    return {
        "shape": list(shape),
        "plan": [chosen.forward, chosen.backward],
        "error": errors,
        "limit": limits,
        "ok": all(errors[name] <= limit for name, limit in limits.items()),
    }
