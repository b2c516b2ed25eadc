"""nf4_dequant against bitsandbytes bit for bit, and against the float64 formula."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from peftlab_kernels.nf4_dequant import NF4Weight, nf4_dequant, nf4_dequant_reference
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
BLOCKS = [pytest.param(64, False, id="64"), pytest.param(64, True, id="64-nested")]
BLOCKS += [pytest.param(128, False, id="128"), pytest.param(128, True, id="128-nested")]
SHAPES = [(1, 1), (1, 7), (1, 256), (5, 33), (33, 130), (130, 50), (64, 256), (3, 1000)]
LowRank = tuple[Tensor, Tensor, float]
Op = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def eager_bitsandbytes() -> Iterator[None]:
    """bitsandbytes compiles its CPU path for an odd K, again for each shape. This takes seconds each and gives the same
    bits."""
    with torch.compiler.set_stance("force_eager"):
        yield


def quantized(
    N: int, K: int, device: torch.device, *, blocksize: int = 64, nested: bool = False, seed: int = 0
) -> tuple[NF4Weight, Any]:
    """A random weight as our tensors and as bitsandbytes' quantization state, which share memory."""
    values = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).to(device)
    packed, state = import_bitsandbytes().functional.quantize_4bit(
        values, blocksize=blocksize, quant_type="nf4", compress_statistics=nested
    )
    second = (state.state2.code, state.state2.absmax, state.offset) if nested else None
    assert not nested or state.state2.blocksize == 256
    return NF4Weight(packed, state.absmax, state.code, (N, K), blocksize, second), state


def of_bitsandbytes(weight: NF4Weight, state: Any, dtype: torch.dtype) -> Tensor:
    state.dtype = dtype
    result: Tensor = import_bitsandbytes().functional.dequantize_4bit(weight.packed.view(-1, 1), state)
    return result.view(weight.shape)


def truth(weight: NF4Weight, low_rank: LowRank | None = None) -> Tensor:
    """W + s B A in float64, by the reference and a plain product."""
    nested = tuple(x.double() for x in weight.nested) if weight.nested else None
    W = nf4_dequant_reference(
        weight.packed, weight.absmax if nested else weight.absmax.double(), weight.code.double(), weight.shape,
        blocksize=weight.blocksize, nested=nested, dtype=torch.float64,
    )  # fmt: skip
    if low_rank is None:
        return W
    A, B, scale = low_rank
    return W + scale * (B.double() @ A.double())


def factors(weight: NF4Weight, rank: int, dtype: torch.dtype, *, ratio: float = 0.5, seed: int = 1) -> LowRank:
    """A, B and a scale with |s B A| = ratio * |W|."""
    N, K = weight.shape
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, K, generator=g).to(weight.packed.device, dtype)
    B = torch.randn(N, rank, generator=g).to(weight.packed.device, dtype)
    return A, B, ratio * float(truth(weight).norm() / (B.double() @ A.double()).norm())


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


def check_exact(op: Op, weight: NF4Weight, state: Any, dtype: torch.dtype, backend: str) -> None:
    actual = op(weight, dtype=dtype, backend=backend)
    assert actual.dtype == dtype
    assert torch.equal(actual, of_bitsandbytes(weight, state, dtype)), f"error: not bitsandbytes' bits, {weight.shape}"


def check_merge(op: Op, weight: NF4Weight, low_rank: LowRank, dtype: torch.dtype, backend: str) -> None:
    check_rounded_once(op(weight, dtype=dtype, low_rank=low_rank, backend=backend), truth(weight, low_rank), dtype)


@pytest.mark.parametrize(("blocksize", "nested"), BLOCKS)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_nf4_dequant_equals_bitsandbytes_bit_for_bit(
    device: torch.device, backend: str, dtype: torch.dtype, blocksize: int, nested: bool
) -> None:
    for N, K in SHAPES:
        check_exact(nf4_dequant, *quantized(N, K, device, blocksize=blocksize, nested=nested), dtype, backend)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_nf4_dequant_reads_many_nested_blocks(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    """With more than 256 blocks, a second entry of the nested scales is read."""
    weight, state = quantized(300, 130, device, nested=True)
    assert weight.nested is not None and weight.nested[1].numel() == 3
    check_exact(nf4_dequant, weight, state, dtype, backend)
    check_merge(nf4_dequant, weight, factors(weight, 4, dtype), dtype, backend)


@pytest.mark.parametrize(("blocksize", "nested"), BLOCKS)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_nf4_dequant_equals_the_formula(
    device: torch.device, backend: str, dtype: torch.dtype, blocksize: int, nested: bool
) -> None:
    for N, K in SHAPES:
        weight, _ = quantized(N, K, device, blocksize=blocksize, nested=nested)
        check_rounded_once(nf4_dequant(weight, dtype=dtype, backend=backend), truth(weight), dtype)


@pytest.mark.parametrize(("N", "K", "blocksize"), [(7, 96, 64), (40, 16, 64), (9, 64, 128), (4, 192, 128)])
@EACH_BACKEND
def test_nf4_dequant_of_blocks_that_span_rows_equals_the_formula(
    device: torch.device, backend: str, N: int, K: int, blocksize: int
) -> None:
    """K is a multiple of 16 but not of the blocksize. On a CPU with AVX512, bitsandbytes 0.50.2 then errs by the size
    of the weights (max error 1.4 for normal values), so it is no reference here."""
    weight, _ = quantized(N, K, device, blocksize=blocksize)
    check_rounded_once(nf4_dequant(weight, dtype=torch.float32, backend=backend), truth(weight), torch.float32)


def test_nf4_dequant_reference_in_float32_rounds_as_bitsandbytes(device: torch.device) -> None:
    weight, state = quantized(33, 130, device, nested=True)
    plain = nf4_dequant_reference(weight.packed, weight.absmax, weight.code, weight.shape, nested=weight.nested)
    assert torch.equal(plain, of_bitsandbytes(weight, state, torch.float32))


@pytest.mark.parametrize(
    ("N", "K", "blocksize", "nested"),
    [(33, 130, 64, True), (5, 33, 64, False), (70, 128, 64, True), (130, 256, 128, False), (1, 64, 64, False)],
)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_nf4_dequant_merge_rounds_once(
    device: torch.device, backend: str, dtype: torch.dtype, N: int, K: int, blocksize: int, nested: bool
) -> None:
    weight, _ = quantized(N, K, device, blocksize=blocksize, nested=nested)
    for rank in (1, 8, 16, 64, 100):
        check_merge(nf4_dequant, weight, factors(weight, rank, dtype), dtype, backend)


@pytest.mark.parametrize("rank", [1, 8, 16, 64, 100])
@pytest.mark.parametrize(("backend", "dtype"), [b for b in BACKENDS if b.values[1] != torch.float32])
def test_nf4_dequant_merge_errs_no_more_than_rounding_twice(
    device: torch.device, backend: str, dtype: torch.dtype, rank: int
) -> None:
    weight, _ = quantized(70, 130, device, nested=True)
    A, B, scale = factors(weight, rank, dtype, ratio=0.1)
    want = truth(weight, (A, B, scale))
    twice = torch.addmm(truth(weight).to(dtype), B, A, alpha=scale)
    merged = nf4_dequant(weight, dtype=dtype, low_rank=(A, B, scale), backend=backend)
    error, allowed = (float((x.double() - want).norm()) for x in (merged, twice))
    assert error <= 1.1 * allowed, f"error {error:.3g}, rounding twice {allowed:.3g}"


@EACH_BACKEND
def test_nf4_dequant_takes_factors_of_another_layout_and_type(device: torch.device, backend: str) -> None:
    weight, _ = quantized(33, 130, device)
    A, B, scale = factors(weight, 8, torch.float16)
    low_rank = (A.float().t().contiguous().t(), B.float().t().contiguous().t(), scale)
    assert not low_rank[0].is_contiguous() and not low_rank[1].is_contiguous()
    check_merge(nf4_dequant, weight, low_rank, torch.float16, backend)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_nf4_dequant_overwrites_out_and_nothing_else(
    device: torch.device, backend: str, dtype: torch.dtype, merge: bool
) -> None:
    weight, _ = quantized(33, 130, device, nested=True)
    low_rank = factors(weight, 8, dtype) if merge else None
    read = [*weight.tensors(), *(low_rank or ())[:2]]
    before = [x.clone() for x in read]
    out = torch.full(weight.shape, torch.nan, dtype=dtype, device=device)
    result = nf4_dequant(weight, dtype=dtype, low_rank=low_rank, out=out, backend=backend)
    assert result is out
    assert torch.equal(out, nf4_dequant(weight, dtype=dtype, low_rank=low_rank, backend=backend))
    assert all(torch.equal(a, b) for a, b in zip(read, before, strict=True))


@pytest.mark.parametrize("shape", [(0, 64), (7, 0)])
def test_nf4_dequant_of_an_empty_weight(device: torch.device, shape: tuple[int, int]) -> None:
    packed = torch.empty(0, dtype=torch.uint8, device=device)
    weight = NF4Weight(packed, torch.empty(0, device=device), torch.zeros(16, device=device), shape)
    assert nf4_dequant(weight, dtype=torch.float16).shape == shape


@EACH_BACKEND
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: replace(w, packed=w.packed[:-1]), r"expected 2145 uint8 values for a \[33, 130\] .* found 2144"),
        (lambda w: replace(w, packed=w.packed.view(torch.int8)), r"found 2145 of torch\.int8"),
        (lambda w: replace(w, absmax=w.absmax[:-1]), "expected 68 values of block scales .* found 67"),
        (lambda w: replace(w, blocksize=128), "expected 34 values of block scales .* found 68"),
        # Too large, not too small: unchecked, the latter are read beyond their end.
        (lambda w: replace(w, nested=(w.nested[0].repeat(2), *w.nested[1:])), "512"),
        (lambda w: replace(w, nested=(w.nested[0], w.nested[1].repeat(2), w.nested[2])), "found 2"),
    ],
)
def test_nf4_dequant_refuses_weights_that_do_not_fit(
    device: torch.device, backend: str, change: Any, message: str
) -> None:
    weight, _ = quantized(33, 130, device, nested=True)
    with pytest.raises(ValueError, match=message):
        nf4_dequant(change(weight), dtype=torch.float32, backend=backend)


@EACH_BACKEND
@pytest.mark.parametrize(
    ("A", "B", "message"),
    [((8, 131), (33, 8), "131"), ((8, 130), (34, 8), "34"), ((8, 130), (33, 19), "19")],
)
def test_nf4_dequant_refuses_factors_that_do_not_fit(
    device: torch.device, backend: str, A: Any, B: Any, message: str
) -> None:
    weight, _ = quantized(33, 130, device)
    low_rank = (torch.zeros(A, device=device), torch.zeros(B, device=device), 1.0)
    with pytest.raises(ValueError, match=message):
        nf4_dequant(weight, dtype=torch.float32, low_rank=low_rank, backend=backend)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(33, 129), r"\[33, 130\] torch.float32, found \[33, 129\]"),
        (torch.empty(33, 130, dtype=torch.float16), "found .* torch.float16"),
        (torch.empty(130, 33).t(), "contiguous"),
    ],
)
def test_nf4_dequant_refuses_out_that_does_not_fit(device: torch.device, out: Tensor, message: str) -> None:
    weight, _ = quantized(33, 130, device)
    out = out.to(device)
    with pytest.raises(ValueError, match=message):
        nf4_dequant(weight, dtype=torch.float32, out=out)


@NEEDS_TRITON
def test_nf4_dequant_refuses_backends_that_cannot_run(device: torch.device) -> None:
    weight, _ = quantized(33, 130, device)
    with pytest.raises(ValueError, match="found 'cuda'"):
        nf4_dequant(weight, dtype=torch.float32, backend="cuda")
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        nf4_dequant(weight, dtype=torch.float64, backend="triton")


def test_nf4_dequant_in_float64_is_right_or_refused(device: torch.device) -> None:
    """Supported types are float32, float16 and bfloat16. Another type must not return uninitialized memory."""
    weight, _ = quantized(33, 130, device)
    try:
        values = nf4_dequant(weight, dtype=torch.float64, backend="torch")
    except ValueError:
        return
    torch.testing.assert_close(values, truth(weight), rtol=1e-6, atol=1e-6)


def _swapped_nibbles(weight: NF4Weight, **kwargs: Any) -> Tensor:
    return nf4_dequant(replace(weight, packed=(weight.packed << 4) | (weight.packed >> 4)), **kwargs)


def _one_scale_off(weight: NF4Weight, **kwargs: Any) -> Tensor:
    """The last block's scale is 1 % too large. If nested, it takes another entry of its code."""
    absmax = weight.absmax.clone()
    absmax[-1] = absmax[-1] * 1.01 if weight.nested is None else 255 - absmax[-1].long()
    return nf4_dequant(replace(weight, absmax=absmax), **kwargs)


def _without_offset(weight: NF4Weight, **kwargs: Any) -> Tensor:
    assert weight.nested is not None
    code, absmax, offset = weight.nested
    return nf4_dequant(replace(weight, nested=(code, absmax, offset * 0)), **kwargs)


def _without_scale(weight: NF4Weight, *, low_rank: LowRank, **kwargs: Any) -> Tensor:
    return nf4_dequant(weight, low_rank=(low_rank[0], low_rank[1], 1.0), **kwargs)


def _without_low_rank(weight: NF4Weight, *, low_rank: LowRank, **kwargs: Any) -> Tensor:
    return nf4_dequant(weight, **kwargs)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(
    ("fault", "nested"),
    [(_swapped_nibbles, False), (_one_scale_off, False), (_one_scale_off, True), (_without_offset, True)],
)
def test_nf4_dequant_deliberate_faults_are_caught(
    device: torch.device, fault: Op, nested: bool, backend: str, dtype: torch.dtype
) -> None:
    weight, state = quantized(33, 130, device, nested=nested)
    check_exact(nf4_dequant, weight, state, dtype, backend)
    with pytest.raises(AssertionError, match="error"):
        check_exact(fault, weight, state, dtype, backend)


@pytest.mark.parametrize("fault", [_swapped_nibbles, _one_scale_off, _without_scale, _without_low_rank])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_nf4_dequant_deliberate_faults_of_a_merge_are_caught(
    device: torch.device, fault: Op, backend: str, dtype: torch.dtype
) -> None:
    weight, _ = quantized(33, 130, device)
    with pytest.raises(AssertionError, match="error"):
        check_merge(fault, weight, factors(weight, 8, dtype), dtype, backend)
