"""What to compile, check and time for ``lora_linear``."""

# Sizes are called M, N, K and R, as in the kernels.

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftlab_kernels.cases import Check, Compared, Compiled, Device, Timing
from peftlab_kernels.int8_dequant import cases as int8
from peftlab_kernels.lora_linear import passes, plan
from peftlab_kernels.lora_linear.base import BaseWeight, DenseWeight, Int8Weight, library_linear
from peftlab_kernels.lora_linear.op import dropout_mask, lora_linear
from peftlab_kernels.lora_linear.reference import MASK_ROUNDS, keep_threshold, philox_mask_reference
from peftlab_kernels.nf4_dequant import cases as nf4

COMPILED = [
    Compiled("dropout_down_kernel", "", "*T *A *fp32 *u8 *i64 i32 i16 R i16 i32 fp32 i16",
             lambda dtype, rank: {"ROUNDS": MASK_ROUNDS, **passes.down_options(rank, dtype)}, wide=True),
    Compiled("dropout_mask_kernel", "", "*u8 *i64 i32 i32",
             lambda dtype, rank: {"ROUNDS": MASK_ROUNDS, **passes.mask_options()}, matrix=False),
    Compiled("up_backward_kernel", "", "*T *A *T *fp32 *fp32 i32 i16 R fp32 i16",
             lambda dtype, rank: passes.up_options(rank, dtype), wide=True),
    Compiled("down_backward_kernel", "dropout", "*T *u8 *T *fp32 i32 i16 R i16 fp32 i16",
             lambda dtype, rank: {"HAS_MASK": True, **passes.down_backward_options(rank, dtype)}),
    Compiled("down_backward_kernel", "no dropout", "*T *T *T *fp32 i32 i16 R i16 fp32 i16",
             lambda dtype, rank: {"HAS_MASK": False, **passes.down_backward_options(rank, dtype)}),
    Compiled("dropout_dx_kernel", "", "*T *u8 *T *A i32 i16 R i16 fp32",
             lambda dtype, rank: passes.dropout_dx_options(rank, dtype), wide=True),
]  # fmt: skip

NAMES = ("y", "x", "A", "B", "bias")
SCALE, SEED, DROPOUT = 0.7, 77, 0.05
Way = tuple[str, str, float]
# (forward, backward, dropout) by storage of the base weight.
_OURS: list[Way] = [("merged", "merged", 0.0), ("split", "split", 0.0), ("split", "split", DROPOUT)]
_LIBRARY: list[Way] = [("library", "merged", 0.0), ("library", "split", DROPOUT)]
WAYS = {"dense": _OURS, "nf4": _OURS + _LIBRARY, "int8": _OURS + _LIBRARY}
Shape = tuple[int, int, int, int]
# M, N, K, R: every M with every rank on aligned sizes, then ragged ones, then a layer of Llama-3-8B. From rank 33 on dY is
# read twice.
SHAPES: list[Shape] = [(M, 768, 1024, R) for M in (1, 63, 1000, 2048) for R in (8, 16, 64)]
SHAPES += [
    (1000, 768, 1024, 32),
    (63, 770, 1030, 8),
    (1000, 770, 1030, 16),
    (2048, 770, 1030, 64),
    (2048, 4096, 4096, 16),
]
DRY_SHAPES: list[Shape] = [(63, 96, 128, 8), (1, 96, 128, 16)]
# kernels.md, protocol: relative error in bfloat16 at a layer's size, of activations and of factors. In float16 the limit is an eighth.
GATE = {"bfloat16": (4e-3, 1e-2), "float16": (5e-4, 1.25e-3)}
# (N, K) of the linears of a Llama-3-8B layer -> how many of them: q and o, k and v, gate and up, down.
LAYER = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
# Storage, rows and rank that are timed over a layer, most important first.
SMALL = (512, 16, 1)
TIMED: dict[str, list[tuple[str, int, int]]] = {
    "first": [("nf4", 8192, 16)],
    "rest": [
        ("nf4", 2048, 16),
        *(("dense", M, 16) for M in (8192, 2048)),
        *(("nf4", M, 16) for M in SMALL),
        *(("nf4", 2048, R) for R in (8, 64)),
        *(("dense", M, 16) for M in SMALL),
        *(("dense", 2048, R) for R in (8, 64)),
    ],
}
DRY_TIMED: dict[str, list[tuple[str, int, int]]] = {
    "first": [("nf4", 16, 16)],
    "rest": [("dense", 16, 16), ("nf4", 1, 16), ("dense", 1, 16)],
}


@dataclass(frozen=True)
class Case:
    """The tensors of a call. W: the base weight in float64. keep: the elements that dropout keeps."""

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
    def keep_scale(self) -> float:
        return keep_threshold(self.dropout)[1]


def base_weight(device: Device, kind: str, N: int, K: int, dtype: torch.dtype) -> tuple[BaseWeight, Tensor]:
    """A frozen weight and its values in float64."""
    if kind == "nf4":
        weight = nf4.make(device, N, K, nested=True)
        return weight, nf4.truth(weight)
    if kind == "int8":
        pair = int8.make(device, N, K)
        return Int8Weight(*pair), int8.truth(pair)
    values = (device.randn(N, K, seed=3) / K**0.5).to(dtype)
    return DenseWeight(values), values.double()


@lru_cache(maxsize=16)
def keep_mask(device_kind: str, backend: str, M: int, K: int, dropout: float) -> Tensor:
    """[M, K] bool mask that a call with SEED should draw; for Triton it comes from Philox in NumPy."""
    if backend == "triton":
        packed = philox_mask_reference(SEED, M, K, dropout)
        return passes.unpack_mask(packed, K).to(device_kind)
    return dropout_mask(torch.zeros(M, K, device=device_kind), dropout, torch.tensor(SEED), backend=backend)[0]


def make_case(
    device: Device, kind: str, shape: Shape, dtype: torch.dtype, *, dropout: float, wide: bool = False
) -> Case:
    """wide: the factors are float32 with values of ``dtype``, as PEFT keeps them."""
    M, N, K, R = shape
    base, W = base_weight(device, kind, N, K, dtype)
    sizes = ((M, K), (R, K), (N, R), (N,), (M, N))
    x, A, B, bias, dY = (device.randn(*size, seed=10 + i) for i, size in enumerate(sizes))
    keep = keep_mask(device.kind, device.backend(dtype), M, K, dropout) if dropout else None
    x, A, B, bias, dY = (t.to(dtype) for t in (x, A / K**0.5, B / R**0.5, bias, dY))
    if wide:
        A, B = A.to(torch.float32), B.to(torch.float32)
    return Case(base, W, x, A, B, bias, dY, dropout, keep)


def gradients(function: Callable[..., Tensor], case: Case) -> dict[str, Tensor]:
    """The output, and the gradient of every input, by name."""
    leaves = [t.detach().clone().requires_grad_() for t in case.inputs()]
    y = function(*leaves)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, case.grad)), strict=True))


def fused(case: Case, backend: str) -> dict[str, Tensor]:
    def call(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        return lora_linear(
            x, case.base, A, B, scale=SCALE, bias_N=bias, dropout=case.dropout, seed=torch.tensor(SEED), backend=backend
        )

    return gradients(call, case)


def unfused(case: Case, *, library: bool = False) -> dict[str, Tensor]:
    """PEFT's formula in the type of x. library: the output uses bitsandbytes' base product."""
    dtype = case.x.dtype
    W = case.W.to(dtype)
    keep = None if case.keep is None else case.keep.to(dtype) * case.keep_scale

    def adapter(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        dropped = x if keep is None else x * keep
        return F.linear(F.linear(dropped, A.to(dtype)), B.to(dtype)) * SCALE

    results = gradients(lambda x, A, B, bias: F.linear(x, W, bias) + adapter(x, A, B), case)
    if library:
        product = library_linear(case.x, case.base, case.bias)
        results["y"] = product + adapter(case.x, case.A, case.B)
    return results


def truth(case: Case) -> dict[str, Tensor]:
    """Output and gradients computed in float64."""
    x, A, B, bias, dY = (t.double() for t in (*case.inputs(), case.grad))
    D = torch.ones_like(x) if case.keep is None else case.keep.double() * case.keep_scale
    dS = SCALE * dY @ B
    return {
        "y": x @ case.W.T + bias + SCALE * (x * D) @ A.T @ B.T,
        "x": dY @ case.W + D * (dS @ A),
        "A": dS.T @ (x * D),
        "B": SCALE * dY.T @ ((x * D) @ A.T),
        "bias": dY.sum(0),
    }


def checks(device: Device, dtype: str) -> Iterator[Check]:
    """One row per storage and plan, over all shapes; then the same with float32 factors."""

    def check(kind: str, way: Way, shapes: list[Shape], *, wide: bool) -> Check:
        what: dict[str, Any] = {
            "check": "lora_linear",
            "kind": kind,
            "dtype": dtype,
            "factors": "float32" if wide else dtype,
        }
        what |= {"forward": way[0], "backward": way[1], "dropout": way[2]}
        return Check(what, shapes, partial(_compared, device, kind, dtype, way, wide), "M, N, K, R")

    for kind, ways in WAYS.items():
        for way in ways:
            yield check(kind, way, device.pick(SHAPES, DRY_SHAPES), wide=False)
    if dtype == "float32":
        return
    shapes = device.pick([s for s in SHAPES if s[0] in (63, 2048)], DRY_SHAPES[:1])
    for kind, ways in WAYS.items():
        for way in (ways[0], ways[2]):
            yield check(kind, way, shapes, wide=True)


def _compared(device: Device, kind: str, dtype: str, way: Way, wide: bool, shape: tuple[int, ...]) -> Compared:
    M, N, K, R = shape
    case = make_case(device, kind, (M, N, K, R), getattr(torch, dtype), dropout=way[2], wide=wide)
    with plan.forced(plan.Plan(way[0], way[1])):
        actual = fused(case, device.backend(case.x.dtype))
    # Both paths round the M x R numbers between the factors.
    return Compared(actual, unfused(case, library=way[0] == "library"), truth(case), terms=max(M, N, K), rounded=M * R)


def times(device: Device) -> Iterator[Timing]:
    """Two orders where dropout forbids merging. Adding the adapter after the product reads and writes the whole output again.
    Before it, the matrix unit hides that traffic, and the sum is rounded once, not twice."""
    for M in device.pick((8192, 2048), (16,)):
        for N, K in device.pick(list(LAYER), [(96, 128)]):
            what = {"case": "product + adapter, added after or before", "M": M, "shape": [N, K], "R": 16}
            yield Timing(what, partial(_addition_order, device, M, N, K), ("after", "before"))


def _addition_order(device: Device, M: int, N: int, K: int) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Any]]:
    # The product is about 1, the adapter a tenth of it.
    sizes = {(M, K): 1.0, (N, K): K**-0.5, (M, 16): 0.25, (N, 16): 0.05}
    x, W, S, B = (
        (device.randn(*size, seed=i) * scale).to(torch.bfloat16) for i, (size, scale) in enumerate(sizes.items())
    )
    y = torch.empty(M, N, dtype=torch.bfloat16, device=device.kind)
    calls: dict[str, Callable[[], Tensor]] = {
        "after": lambda: torch.mm(x, W.t(), out=y).addmm_(S, B.t(), alpha=2.0),
        "before": lambda: torch.mm(S, (2.0 * B).t(), out=y).addmm_(x, W.t()),
        "product alone": lambda: torch.mm(x, W.t(), out=y),
    }
    want = x.double() @ W.double().T + 2 * S.double() @ B.double().T
    errors = {}
    for name in ("after", "before"):
        calls[name]()
        errors[name] = float((y.double() - want).norm() / want.norm())
    return calls, {"error": errors}
