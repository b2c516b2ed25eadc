"""int8_dequant against bitsandbytes bit for bit, and against the float64 formula."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peftlab_kernels.int8_dequant import int8_dequant, int8_dequant_reference
from torch import Tensor

from peftlab.models.bnb import import_bitsandbytes

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
# Triton's interpreter multiplies the bit patterns of bfloat16 (triton#11584).
BACKENDS = [
    pytest.param("torch", torch.float32, id="torch-fp32"),
    pytest.param("torch", torch.float16, id="torch-fp16"),
    pytest.param("torch", torch.bfloat16, id="torch-bf16"),
    pytest.param("triton", torch.float32, id="triton-fp32", marks=NEEDS_TRITON),
    pytest.param("triton", torch.float16, id="triton-fp16", marks=NEEDS_TRITON),
]
if torch.cuda.is_available():
    BACKENDS.append(pytest.param("triton", torch.bfloat16, id="triton-bf16", marks=NEEDS_TRITON))
EACH_BACKEND = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
SHAPES = [(1, 1), (1, 7), (1, 256), (5, 33), (33, 130), (130, 50), (7, 96), (130, 64)]
LowRank = tuple[Tensor, Tensor, float]
Op = Callable[..., Tensor]


def quantized(N: int, K: int, device: torch.device, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random weight whose rows differ in size, as bitsandbytes stores it: int8 [N, K], float32 [N]."""
    values = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 3.0, N)[:, None]
    weight, row_absmax, _ = import_bitsandbytes().functional.int8_vectorwise_quant(values.to(device, torch.float16))
    return weight, row_absmax


def truth(weight: Tensor, row_absmax: Tensor, low_rank: LowRank | None = None) -> Tensor:
    """q * absmax / 127 + s B A, written out in float64."""
    W = weight.double() * row_absmax.double()[:, None] / 127
    if low_rank is None:
        return W
    A, B, scale = low_rank
    return W + scale * (B.double() @ A.double())


def factors(weight: Tensor, row_absmax: Tensor, rank: int, dtype: torch.dtype, *, ratio: float = 0.5) -> LowRank:
    """A, B and a scale with |s B A| = ratio * |W|."""
    N, K = weight.shape
    g = torch.Generator().manual_seed(1)
    A = torch.randn(rank, K, generator=g).to(weight.device, dtype)
    B = torch.randn(N, rank, generator=g).to(weight.device, dtype)
    return A, B, ratio * float(truth(weight, row_absmax).norm() / (B.double() @ A.double()).norm())


def half_step(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours in ``dtype`` at each value, in float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(value.abs().clamp(min=info.smallest_normal))
    return torch.ldexp(torch.full_like(value, info.eps / 2), exponent - 1)


def check_rounded_once(actual: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Allows half a step of ``dtype``, plus 16 float32 roundings of the largest value for the arithmetic before it."""
    assert actual.dtype == dtype
    allowed = half_step(want, dtype) + 16 * 2**-24 * float(want.abs().max())
    excess = float(((actual.double() - want).abs() - allowed).max())
    assert excess <= 0, f"error beyond one rounding: {excess:.3g}, largest value {float(want.abs().max()):.3g}"


def check_exact(op: Op, weight: Tensor, row_absmax: Tensor, dtype: torch.dtype, backend: str) -> None:
    want = import_bitsandbytes().functional.int8_vectorwise_dequant(weight, row_absmax).to(dtype)
    actual = op(weight, row_absmax, dtype=dtype, backend=backend)
    assert actual.dtype == dtype
    assert torch.equal(actual, want), f"error: not bitsandbytes' bits, {list(weight.shape)}"


def check_merge(
    op: Op, weight: Tensor, row_absmax: Tensor, low_rank: LowRank, dtype: torch.dtype, backend: str
) -> None:
    actual = op(weight, row_absmax, dtype=dtype, low_rank=low_rank, backend=backend)
    check_rounded_once(actual, truth(weight, row_absmax, low_rank), dtype)


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_int8_dequant_equals_bitsandbytes_bit_for_bit(
    device: torch.device, backend: str, dtype: torch.dtype, N: int, K: int
) -> None:
    check_exact(int8_dequant, *quantized(N, K, device), dtype, backend)


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_int8_dequant_equals_the_formula(
    device: torch.device, backend: str, dtype: torch.dtype, N: int, K: int
) -> None:
    weight, row_absmax = quantized(N, K, device)
    check_rounded_once(int8_dequant(weight, row_absmax, dtype=dtype, backend=backend), truth(weight, row_absmax), dtype)


def test_int8_dequant_reference_equals_the_formula(device: torch.device) -> None:
    weight, row_absmax = quantized(33, 130, device)
    wide = int8_dequant_reference(weight, row_absmax.double(), dtype=torch.float64)
    torch.testing.assert_close(wide, truth(weight, row_absmax), rtol=1e-15, atol=0)
    check_exact(lambda w, s, *, dtype, backend: int8_dequant_reference(w, s, dtype=dtype), weight, row_absmax,
                torch.float32, "torch")  # fmt: skip


@pytest.mark.parametrize("rank", [1, 8, 16, 64, 100])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_int8_dequant_merge_rounds_once(device: torch.device, backend: str, dtype: torch.dtype, rank: int) -> None:
    for N, K in [(33, 130), (5, 33), (130, 64), (1, 7)]:
        weight, row_absmax = quantized(N, K, device)
        check_merge(int8_dequant, weight, row_absmax, factors(weight, row_absmax, rank, dtype), dtype, backend)


@pytest.mark.parametrize("rank", [1, 8, 16, 64, 100])
@pytest.mark.parametrize(("backend", "dtype"), [b for b in BACKENDS if b.values[1] != torch.float32])
def test_int8_dequant_merge_errs_no_more_than_rounding_twice(
    device: torch.device, backend: str, dtype: torch.dtype, rank: int
) -> None:
    weight, row_absmax = quantized(70, 130, device)
    A, B, scale = factors(weight, row_absmax, rank, dtype, ratio=0.1)
    want = truth(weight, row_absmax, (A, B, scale))
    twice = torch.addmm(truth(weight, row_absmax).to(dtype), B, A, alpha=scale)
    merged = int8_dequant(weight, row_absmax, dtype=dtype, low_rank=(A, B, scale), backend=backend)
    error, allowed = (float((x.double() - want).norm()) for x in (merged, twice))
    assert error <= 1.1 * allowed, f"error {error:.3g}, rounding twice {allowed:.3g}"


@EACH_BACKEND
def test_int8_dequant_takes_factors_of_another_layout_and_type(device: torch.device, backend: str) -> None:
    weight, row_absmax = quantized(33, 130, device)
    A, B, scale = factors(weight, row_absmax, 8, torch.float16)
    low_rank = (A.float().t().contiguous().t(), B.float().t().contiguous().t(), scale)
    assert not low_rank[0].is_contiguous() and not low_rank[1].is_contiguous()
    check_merge(int8_dequant, weight, row_absmax, low_rank, torch.float16, backend)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_int8_dequant_overwrites_out_and_nothing_else(
    device: torch.device, backend: str, dtype: torch.dtype, merge: bool
) -> None:
    weight, row_absmax = quantized(33, 130, device)
    low_rank = factors(weight, row_absmax, 8, dtype) if merge else None
    read = [weight, row_absmax, *(low_rank or ())[:2]]
    before = [x.clone() for x in read]
    out = torch.full(weight.shape, torch.nan, dtype=dtype, device=device)
    result = int8_dequant(weight, row_absmax, dtype=dtype, low_rank=low_rank, out=out, backend=backend)
    assert result is out
    assert torch.equal(out, int8_dequant(weight, row_absmax, dtype=dtype, low_rank=low_rank, backend=backend))
    assert all(torch.equal(a, b) for a, b in zip(read, before, strict=True))


@pytest.mark.parametrize("shape", [(0, 64), (7, 0)])
def test_int8_dequant_of_an_empty_weight(device: torch.device, shape: tuple[int, int]) -> None:
    weight = torch.empty(shape, dtype=torch.int8, device=device)
    assert int8_dequant(weight, torch.ones(shape[0], device=device), dtype=torch.float16).shape == shape


@pytest.mark.parametrize(
    ("weight", "row_absmax", "message"),
    [
        (torch.zeros(33, 130), torch.ones(33), r"found \[33, 130\] torch\.float32"),
        (torch.zeros(33, dtype=torch.int8), torch.ones(33), r"found \[33\] torch\.int8"),
        (torch.zeros(33, 130, dtype=torch.int8), torch.ones(32), "expected 33 row scales, found 32"),
        (torch.zeros(33, 130, dtype=torch.int8), torch.ones(130), "expected 33 row scales, found 130"),
    ],
)
def test_int8_dequant_refuses_weights_that_do_not_fit(
    device: torch.device, weight: Tensor, row_absmax: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        int8_dequant(weight.to(device), row_absmax.to(device), dtype=torch.float32)


@EACH_BACKEND
@pytest.mark.parametrize(
    ("A", "B", "message"),
    # Too large, not too small: unchecked, the latter would be read beyond their end.
    [((8, 131), (33, 8), "131"), ((8, 130), (34, 8), "34"), ((8, 130), (33, 19), "19")],
)
def test_int8_dequant_refuses_factors_that_do_not_fit(
    device: torch.device, backend: str, A: Any, B: Any, message: str
) -> None:
    weight, row_absmax = quantized(33, 130, device)
    low_rank = (torch.zeros(A, device=device), torch.zeros(B, device=device), 1.0)
    with pytest.raises(ValueError, match=message):
        int8_dequant(weight, row_absmax, dtype=torch.float32, low_rank=low_rank, backend=backend)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(33, 129), r"\[33, 130\] torch.float32, found \[33, 129\]"),
        (torch.empty(33, 130, dtype=torch.float16), "found .* torch.float16"),
        (torch.empty(130, 33).t(), "contiguous"),
    ],
)
def test_int8_dequant_refuses_out_that_does_not_fit(device: torch.device, out: Tensor, message: str) -> None:
    weight, row_absmax = quantized(33, 130, device)
    with pytest.raises(ValueError, match=message):
        int8_dequant(weight, row_absmax, dtype=torch.float32, out=out.to(device))


@NEEDS_TRITON
def test_int8_dequant_refuses_backends_that_cannot_run(device: torch.device) -> None:
    weight, row_absmax = quantized(33, 130, device)
    with pytest.raises(ValueError, match="found 'cuda'"):
        int8_dequant(weight, row_absmax, dtype=torch.float32, backend="cuda")
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        int8_dequant(weight, row_absmax, dtype=torch.float64, backend="triton")


def _neighbours_swapped(weight: Tensor, row_absmax: Tensor, **kwargs: Any) -> Tensor:
    return int8_dequant(weight.view(len(weight), -1, 2).flip(-1).reshape(weight.shape), row_absmax, **kwargs)


def _divided_by_128(weight: Tensor, row_absmax: Tensor, **kwargs: Any) -> Tensor:
    return int8_dequant(weight, row_absmax * (127 / 128), **kwargs)


def _one_scale_off(weight: Tensor, row_absmax: Tensor, **kwargs: Any) -> Tensor:
    row_absmax = row_absmax.clone()
    row_absmax[-1] *= 1.01
    return int8_dequant(weight, row_absmax, **kwargs)


def _without_scale(weight: Tensor, row_absmax: Tensor, *, low_rank: LowRank, **kwargs: Any) -> Tensor:
    return int8_dequant(weight, row_absmax, low_rank=(low_rank[0], low_rank[1], 1.0), **kwargs)


def _without_low_rank(weight: Tensor, row_absmax: Tensor, *, low_rank: LowRank, **kwargs: Any) -> Tensor:
    return int8_dequant(weight, row_absmax, **kwargs)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("fault", [_neighbours_swapped, _divided_by_128, _one_scale_off])
def test_int8_dequant_deliberate_faults_are_caught(
    device: torch.device, fault: Op, backend: str, dtype: torch.dtype
) -> None:
    weight, row_absmax = quantized(33, 130, device)
    with pytest.raises(AssertionError, match="error"):
        check_exact(fault, weight, row_absmax, dtype, backend)


@pytest.mark.parametrize("fault", [_neighbours_swapped, _one_scale_off, _without_scale, _without_low_rank])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_int8_dequant_deliberate_faults_of_a_merge_are_caught(
    device: torch.device, fault: Op, backend: str, dtype: torch.dtype
) -> None:
    weight, row_absmax = quantized(33, 130, device)
    with pytest.raises(AssertionError, match="error"):
        check_merge(fault, weight, row_absmax, factors(weight, row_absmax, 8, dtype), dtype, backend)
