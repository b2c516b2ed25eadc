"""Shared by the tests of lora_linear: cases, PEFT's formula, the truth in float64, the tolerances."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peftlab_kernels.lora_linear import BaseWeight, DenseWeight, Int8Weight, lora_linear, passes
from peftlab_kernels.lora_linear.reference import philox_mask_reference
from peftlab_kernels.nf4_dequant import NF4Weight, nf4_dequant_reference
from torch import Tensor
from torch.nn import functional as F

from peftlab.models.bnb import import_bitsandbytes

NAMES = ("y", "x", "A", "B", "bias")
SCALE, SEED = 0.7, 77
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
# Triton's interpreter multiplies the bit patterns of bfloat16 (triton#11584).
SIXTEEN_BITS = [
    pytest.param("torch", torch.float16, id="torch-fp16"),
    pytest.param("torch", torch.bfloat16, id="torch-bf16"),
    pytest.param("triton", torch.float16, id="triton-fp16", marks=NEEDS_TRITON),
]
if torch.cuda.is_available():
    SIXTEEN_BITS.append(pytest.param("triton", torch.bfloat16, id="triton-bf16", marks=NEEDS_TRITON))
BACKENDS = [
    pytest.param("torch", torch.float64, id="torch-fp64"),
    pytest.param("torch", torch.float32, id="torch-fp32"),
    pytest.param("triton", torch.float32, id="triton-fp32", marks=NEEDS_TRITON),
    *[p for p in SIXTEEN_BITS if p.values[0] == "triton"],
]
EACH_BACKEND = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
KINDS = ("dense", "nf4", "int8")
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
EACH_DROPOUT = pytest.mark.parametrize("dropout", [0.0, 0.3])
EACH_WAY = pytest.mark.parametrize(("how", "dropout"), [("merged", 0.0), ("split", 0.0), ("split", 0.3)])
# Largest error relative to the largest value. A product of K <= 130 terms of either sign errs by a few roundings of its
# result, and up to five products and sums follow one another. Quantized weights are decoded in float32, whatever type x
# has.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """The tensors of a call, W in float64, and grad, the incoming gradient."""

    base: BaseWeight
    W: Tensor
    x: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor
    grad: Tensor
    dropout: float = 0.0
    keep: Tensor | None = None

    def inputs(self) -> tuple[Tensor, ...]:
        return self.x, self.A, self.B, self.bias

    @property
    def share(self) -> float:
        """The share that dropout keeps, in steps of its 16-bit lanes."""
        return 1 - threshold_of(self.dropout) / 65536


@functools.cache
def weight(kind: str, N: int, K: int, dtype: torch.dtype, device: torch.device) -> tuple[BaseWeight, Tensor]:
    """A base weight and its values in float64."""
    values = (torch.randn(N, K, generator=torch.Generator().manual_seed(1)) / K**0.5).to(device)
    bnb = import_bitsandbytes().functional
    if kind == "dense-fp32":
        return DenseWeight(values), values.double()
    if kind == "dense":
        return DenseWeight(values.to(dtype)), values.to(dtype).double()
    if kind == "int8":
        q, row_absmax, _ = bnb.int8_vectorwise_quant(values.half())
        return Int8Weight(q, row_absmax), q.double() * row_absmax.double()[:, None] / 127
    packed, state = bnb.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    second = (state.state2.code, state.state2.absmax, state.offset)
    W = nf4_dequant_reference(
        packed, state.absmax, state.code.double(), (N, K), nested=tuple(x.double() for x in second), dtype=torch.float64
    )  # fmt: skip
    return NF4Weight(packed, state.absmax, state.code, (N, K), 64, second), W


def threshold_of(dropout: float) -> int:
    """The smallest lane of 16 random bits that is kept."""
    return round(dropout * 65536)


def mask(M: int, K: int, dropout: float, backend: str, device: torch.device) -> Tensor:
    """[M, K] bool: the elements that the op should keep."""
    philox = backend == "triton" or device.type == "cuda"
    packed = philox_mask_reference(SEED, M, K, dropout) if philox else _sfc64(M, K, dropout)
    return passes.unpack_mask(packed, K).to(device)


def _sfc64(M: int, K: int, dropout: float) -> Tensor:
    return passes._sfc64(torch.empty(M, K), threshold_of(dropout), SEED)


def problem(
    kind: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    backend: str = "torch",
    dropout: float = 0.0,
) -> Case:
    """shape: M, K, N, R. The adapter's part is about as large as the base's."""
    M, K, N, R = shape
    base, W = weight(kind, N, K, dtype, device)
    g = torch.Generator().manual_seed(0)
    sizes = ((M, K), (R, K), (N, R), (N,), (M, N))
    x, A, B, bias, dY = (torch.randn(size, generator=g).to(device) for size in sizes)
    keep = mask(M, K, dropout, backend, device) if dropout else None
    tensors = (x, A / K**0.5, B / R**0.5, bias, dY)
    return Case(base, W, *(t.to(dtype) for t in tensors), dropout, keep)


def run(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dY: Tensor) -> dict[str, Tensor]:
    """The output, and the gradient of every input, by name."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    grads = torch.autograd.grad(y, leaves, dY)
    return dict(zip(NAMES, (y.detach(), *grads), strict=True))


def call(case: Case, leaves: Sequence[Tensor], backend: str, **change: Any) -> Tensor:
    x, A, B, bias = leaves
    options = {"scale": SCALE, "dropout": case.dropout, "seed": torch.tensor(SEED), "backend": backend} | change
    return lora_linear(x, case.base, A, B, bias_N=bias, **options)


def run_op(case: Case, backend: str, **change: Any) -> dict[str, Tensor]:
    return run(lambda *leaves: call(case, leaves, backend, **change), case.inputs(), case.grad)


def run_unfused(case: Case) -> dict[str, Tensor]:
    """PEFT's formula in the type of x."""

    def function(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        dropped = x if case.keep is None else x * case.keep * (1 / case.share)
        return F.linear(x, case.W.to(x.dtype), bias) + F.linear(F.linear(dropped, A), B) * SCALE

    return run(function, case.inputs(), case.grad)


def truth(case: Case, x_of_base: Tensor | None = None) -> dict[str, Tensor]:
    """Output and gradients written out in float64. x_of_base: the input of the base product instead of x."""
    x, A, B, bias, dY = (t.double() for t in (*case.inputs(), case.grad))
    D = torch.ones_like(x) if case.keep is None else case.keep.double() / case.share
    dS = SCALE * dY @ B
    return {
        "y": (x if x_of_base is None else x_of_base) @ case.W.T + bias + SCALE * (x * D) @ A.T @ B.T,
        "x": dY @ case.W + D * (dS @ A),
        "A": dS.T @ (x * D),
        "B": SCALE * dY.T @ ((x * D) @ A.T),
        "bias": dY.sum(0),
    }


def check(actual: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    for name in NAMES:
        assert actual[name].shape == want[name].shape, name
        if not actual[name].numel():
            continue
        error = float((actual[name].double() - want[name]).abs().max())
        largest = float(want[name].abs().max())
        assert error <= tolerance * largest, f"{name}: error {error:.3g}, largest value {largest:.3g}"


def tolerance_of(kind: str, dtype: torch.dtype) -> float:
    return TOLERANCE[torch.float32 if kind != "dense" and dtype == torch.float64 else dtype]
