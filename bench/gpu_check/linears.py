"""gpu-check: lora_linear forward and every gradient against float64, in every way that a plan can take."""

# ruff: noqa: N803, N806 -- sizes are called M, N, K and R, as in the kernels
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from bench.gpu_check.base import Device, Row, Task, relative
from bench.gpu_check.dequant import int8_truth, int8_weight, nf4_truth, nf4_weight

NAMES = ("y", "x", "A", "B", "bias")
SCALE, SEED, DROPOUT = 0.7, 77, 0.05
# (forward, backward, dropout) by storage of the base weight.
WAYS: dict[str, list[tuple[str, str, float]]] = {
    "dense": [("merged", "merged", 0.0), ("split", "split", 0.0), ("split", "split", DROPOUT)],
    "nf4": [
        ("merged", "merged", 0.0),
        ("split", "split", 0.0),
        ("split", "split", DROPOUT),
        ("library", "merged", 0.0),
        ("library", "split", DROPOUT),
    ],
    "int8": [
        ("merged", "merged", 0.0),
        ("split", "split", 0.0),
        ("split", "split", DROPOUT),
        ("library", "merged", 0.0),
        ("library", "split", DROPOUT),
    ],
}
# M, N, K, R: every M with every rank on aligned sizes, then ragged ones, then a layer of Llama-3-8B. From 33 on dY is
# read twice.
SHAPES = [(M, 768, 1024, R) for M in (1, 63, 1000, 2048) for R in (8, 16, 64)]
SHAPES += [
    (1000, 768, 1024, 32),
    (63, 770, 1030, 8),
    (1000, 770, 1030, 16),
    (2048, 770, 1030, 64),
    (2048, 4096, 4096, 16),
]
DRY_SHAPES = [(63, 96, 128, 8), (1, 96, 128, 16)]
# kernels.md, protocol: relative error in bfloat16 at a layer's size. Twice as many bits in float16.
GATE = {"bfloat16": (4e-3, 1e-2), "float16": (5e-4, 1.25e-3)}


@dataclass(frozen=True)
class Case:
    """The tensors of a call; W: the base weight in float64, keep: what dropout keeps."""

    base: Any
    W: Any
    x: Any
    A: Any
    B: Any
    bias: Any
    grad: Any
    dropout: float = 0.0
    keep: Any = None

    def inputs(self) -> tuple[Any, ...]:
        return self.x, self.A, self.B, self.bias

    @property
    def keep_scale(self) -> float:
        from peftlab_kernels.lora_linear.reference import keep_threshold

        return keep_threshold(self.dropout)[1]


def base_weight(device: Device, kind: str, N: int, K: int, dtype: Any) -> tuple[Any, Any]:
    """A frozen weight and its values in float64."""
    from peftlab_kernels.lora_linear import DenseWeight, Int8Weight

    if kind == "nf4":
        weight = nf4_weight(device, N, K, nested=True)
        return weight, nf4_truth(weight)
    if kind == "int8":
        q, row_absmax = int8_weight(device, N, K)
        return Int8Weight(q, row_absmax), int8_truth(q, row_absmax)
    values = (device.randn(N, K, seed=3) / K**0.5).to(dtype)
    return DenseWeight(values), values.double()


@lru_cache(maxsize=16)
def keep_mask(device_kind: str, backend: str, M: int, K: int, dropout: float) -> Any:
    """[M, K] bool that a call with SEED should draw, on Triton by NumPy's Philox."""
    import torch
    from peftlab_kernels.lora_linear import dropout_mask, passes
    from peftlab_kernels.lora_linear.reference import philox_mask_reference

    if backend == "triton":
        packed = philox_mask_reference(SEED, M, K, dropout)
        return passes.unpack_mask(packed, K).to(device_kind)
    return dropout_mask(torch.zeros(M, K, device=device_kind), dropout, torch.tensor(SEED), backend=backend)[0]


def make_case(
    device: Device, kind: str, shape: tuple[int, int, int, int], dtype: Any, *, dropout: float, wide: bool = False
) -> Case:
    """shape: M, N, K, R. wide: the factors are float32 with values of ``dtype``, as PEFT keeps them."""
    import torch

    M, N, K, R = shape
    base, W = base_weight(device, kind, N, K, dtype)
    sizes = ((M, K), (R, K), (N, R), (N,), (M, N))
    x, A, B, bias, dY = (device.randn(*size, seed=10 + i) for i, size in enumerate(sizes))
    keep = keep_mask(device.kind, device.backend(dtype), M, K, dropout) if dropout else None
    x, A, B, bias, dY = (t.to(dtype) for t in (x, A / K**0.5, B / R**0.5, bias, dY))
    if wide:
        A, B = A.to(torch.float32), B.to(torch.float32)
    return Case(base, W, x, A, B, bias, dY, dropout, keep)


def gradients(function: Callable[..., Any], case: Case) -> dict[str, Any]:
    """The output, and the gradient of every input, by name."""
    import torch

    leaves = [t.detach().clone().requires_grad_() for t in case.inputs()]
    y = function(*leaves)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, case.grad)), strict=True))


def forced(forward: str, backward: str) -> Any:
    """A context in which every call takes this plan."""
    from peftlab_kernels.lora_linear import Plan, plan

    return plan.forced(Plan(forward, backward))


def fused(case: Case, backend: str) -> dict[str, Any]:
    import torch
    from peftlab_kernels.lora_linear import lora_linear

    def call(x: Any, A: Any, B: Any, bias: Any) -> Any:
        return lora_linear(
            x, case.base, A, B, scale=SCALE, bias_N=bias, dropout=case.dropout, seed=torch.tensor(SEED), backend=backend
        )

    return gradients(call, case)


def unfused(case: Case, *, library: bool = False, backend: str = "auto") -> dict[str, Any]:
    """PEFT's formula in the type of x. library: the output has bitsandbytes' base product in it."""
    from torch.nn import functional as F

    dtype = case.x.dtype
    W = case.W.to(dtype)
    keep = None if case.keep is None else case.keep.to(dtype) * case.keep_scale

    def adapter(x: Any, A: Any, B: Any) -> Any:
        dropped = x if keep is None else x * keep
        return F.linear(F.linear(dropped, A.to(dtype)), B.to(dtype)) * SCALE

    found = gradients(lambda x, A, B, bias: F.linear(x, W, bias) + adapter(x, A, B), case)
    if library:
        from peftlab_kernels.lora_linear.base import library_linear

        product = library_linear(case.x, case.base, case.bias)
        found["y"] = product + adapter(case.x, case.A, case.B)
    return found


def truth(case: Case) -> dict[str, Any]:
    """Output and gradients written out in float64."""
    import torch

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


def judge(case: Case, actual: dict[str, Any], plain: dict[str, Any], want: dict[str, Any]) -> tuple[float, str]:
    """The largest error by its limit, and whose. Limits:

    - Root mean square: 1.1 x that of the unfused formula. Largest: twice it, so that one wrong element of millions shows.
    - Sums in float32, in any order: sqrt(terms) * 2^-24 of the result.
    - The M x R numbers between the factors are rounded on either path. Of few numbers the error may happen to be
      anything up to a rounding, of many it is the same: 2 / sqrt(MR) roundings of the result.
    """
    import torch

    (M, K), (N, R) = case.x.shape, case.B.shape
    slack = max(M, N, K) ** 0.5 * 2**-24 + torch.finfo(case.x.dtype).eps * (M * R) ** -0.5
    worst, where = 0.0, ""
    for name in NAMES:
        if not bool(torch.isfinite(actual[name]).all()):
            return float("inf"), f"{name} is not finite"
        ours, theirs = ((t[name].double() - want[name]).abs() for t in (actual, plain))
        mean = float(ours.norm()) / (1.1 * float(theirs.norm()) + slack * float(want[name].norm()))
        largest = float(ours.max()) / (2 * float(theirs.max()) + 4 * slack * float(want[name].abs().max()))
        for value, which in ((mean, "rms"), (largest, "largest")):
            if not value <= worst:
                worst, where = value, f"{which} of {name}"
    return worst, where


def lora_correctness(device: Device, dtype: str) -> Iterator[Task]:
    """One row per storage and way, over all shapes; then with float32 factors; then as in use, against fixed limits."""
    import torch

    # Otherwise cuBLAS may add parts of a long sum in 16 bits, for one path and not for the other.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    for kind, ways in WAYS.items():
        for way in ways:
            what: Row = {"check": "lora_linear", "kind": kind, "dtype": dtype, "factors": dtype}
            what |= {"forward": way[0], "backward": way[1], "dropout": way[2]}
            shapes = device.pick(SHAPES, DRY_SHAPES)
            yield Task(what, partial(_many, device, kind, dtype, way, shapes))
    if dtype == "float32":
        return
    shapes = device.pick([s for s in SHAPES if s[0] in (63, 2048)], DRY_SHAPES[:1])
    for kind in WAYS:
        for way in (WAYS[kind][0], WAYS[kind][2]):
            what = {"check": "lora_linear", "kind": kind, "dtype": dtype, "factors": "float32"}
            what |= {"forward": way[0], "backward": way[1], "dropout": way[2]}
            yield Task(what, partial(_many, device, kind, dtype, way, shapes, wide=True))
    for kind in WAYS:
        for dropout in (0.0, DROPOUT):
            what = {"check": "lora_linear, as in use", "kind": kind, "dtype": dtype, "dropout": dropout}
            yield Task(what, partial(_as_in_use, device, kind, dtype, dropout))


def _many(
    device: Device, kind: str, dtype_name: str, way: tuple[str, str, float], shapes: list[Any], wide: bool = False
) -> Row:
    import torch

    dtype, worst, bad = getattr(torch, dtype_name), (0.0, ""), []
    for shape in shapes:
        case = make_case(device, kind, shape, dtype, dropout=way[2], wide=wide)
        backend = device.backend(dtype)
        with forced(way[0], way[1]):
            actual = fused(case, backend)
        plain = unfused(case, library=way[0] == "library", backend=backend)
        value, where = judge(case, actual, plain, truth(case))
        worst = max(worst, (value, f"{where} at M, N, K, R = {list(shape)}"))
        if not value <= 1:
            bad.append({"shape": list(shape), "where": where, "by_limit": value})
    return {"shapes": len(shapes), "worst_by_limit": worst[0], "worst_at": worst[1], "bad": bad[:8], "ok": not bad}


def _as_in_use(device: Device, kind: str, dtype_name: str, dropout: float) -> Row:
    """Relative errors of the way that the plan chooses, with PyTorch's default settings, against fixed limits."""
    import torch
    from peftlab_kernels.lora_linear import plan

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
        limits["y"] = 2e-2  # LLM.int8 rounds x to 8 bits: 1 / (254 sqrt(3)) of the largest of a row
    return {
        "shape": list(shape),
        "plan": [chosen.forward, chosen.backward],
        "error": errors,
        "limit": limits,
        "ok": all(errors[name] <= limit for name, limit in limits.items()),
    }
