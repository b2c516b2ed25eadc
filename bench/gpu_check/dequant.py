"""gpu-check: dequantization and merging against float64, and bit for bit against bitsandbytes on CUDA.

Stored weights are made of random bytes and scales: any such are a valid weight, and none needs a quantizer.
"""

# ruff: noqa: N803, N806 -- sizes are called M, N, K and R, as in the kernels
from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

from bench.gpu_check.base import Device, Row, Task

DTYPES = ("bfloat16", "float16", "float32")
# QLoRA's sixteen levels (Dettmers et al. 2023, appendix E), as bitsandbytes has them.
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# N, K: one element, odd sizes, blocks across rows, more than 256 blocks, the aligned and the ragged path at size.
SHAPES = [(1, 1), (1, 7), (5, 33), (33, 130), (300, 130), (64, 256), (1000, 4096), (1024, 4100)]
DRY_SHAPES = [(33, 128), (5, 33)]
RANKS = (8, 16, 64)


def nf4_weight(device: Device, N: int, K: int, *, nested: bool, blocksize: int = 64, seed: int = 0) -> Any:
    """A random NF4Weight whose values have the size of a layer's, about 1 / sqrt(K)."""
    import torch
    from peftlab_kernels.nf4_dequant import NF4Weight

    g = torch.Generator(device.kind).manual_seed(seed)
    blocks = -(-N * K // blocksize)

    def draw(*size: int, below: int = 256) -> Any:
        return torch.randint(0, below, size, generator=g, device=device.kind, dtype=torch.uint8)

    packed, code = draw(-(-N * K // 2)), torch.tensor(NF4_CODE, device=device.kind)
    scale = 2 / max(K, 1) ** 0.5
    if not nested:
        absmax = scale * (0.5 + torch.rand(blocks, generator=g, device=device.kind))
        return NF4Weight(packed, absmax, code, (N, K), blocksize)
    absmax2 = 0.3 * scale * (0.5 + torch.rand(-(-blocks // 256), generator=g, device=device.kind))
    second = (torch.linspace(-1, 1, 256, device=device.kind), absmax2, torch.tensor(scale, device=device.kind))
    return NF4Weight(packed, draw(blocks), code, (N, K), blocksize, second)


def int8_weight(device: Device, N: int, K: int, *, seed: int = 0) -> tuple[Any, Any]:
    """Random int8 values and the row scales that give them the size of a layer's."""
    import torch

    g = torch.Generator(device.kind).manual_seed(seed)
    q = torch.randint(-127, 128, (N, K), generator=g, device=device.kind, dtype=torch.int8)
    return q, (0.5 + torch.rand(N, generator=g, device=device.kind)) / max(K, 1) ** 0.5


def nf4_truth(weight: Any) -> Any:
    """The weight in float64."""
    import torch
    from peftlab_kernels.nf4_dequant import nf4_dequant_reference

    nested = tuple(t.double() for t in weight.nested) if weight.nested else None
    return nf4_dequant_reference(
        weight.packed, weight.absmax if nested else weight.absmax.double(), weight.code.double(), weight.shape,
        blocksize=weight.blocksize, nested=nested, dtype=torch.float64,
    )  # fmt: skip


def int8_truth(q: Any, row_absmax: Any) -> Any:
    return q.double() * row_absmax.double()[:, None] / 127


def quant_state(weight: Any, dtype: Any) -> Any:
    """bitsandbytes' description of the same tensors."""
    from bitsandbytes.functional import QuantState

    second, offset = None, None
    if weight.nested is not None:
        code2, absmax2, offset = weight.nested
        second = QuantState(absmax=absmax2, blocksize=weight.nested_blocksize, code=code2, dtype=absmax2.dtype)
    return QuantState(
        absmax=weight.absmax, shape=weight.shape, dtype=dtype, blocksize=weight.blocksize, code=weight.code,
        quant_type="nf4", offset=offset, state2=second,
    )  # fmt: skip


def of_bitsandbytes(weight: Any, dtype: Any) -> Any:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.packed.view(-1, 1), quant_state(weight, dtype)).view(weight.shape)


def beyond_one_rounding(actual: Any, want: Any) -> float:
    """Largest error beyond half a step of the type and 16 roundings of float32 of the largest value, by that value;
    not above 0 where ``actual`` was rounded once from float32."""
    import torch

    info = torch.finfo(actual.dtype)
    _, exponent = torch.frexp(want.abs().clamp(min=info.smallest_normal))
    half_step = torch.ldexp(torch.full_like(want, info.eps / 2), exponent - 1)
    largest = float(want.abs().max())
    excess = (actual.double() - want).abs() - half_step - 16 * 2**-24 * largest
    return float(excess.max()) / max(largest, 1e-300) if bool(torch.isfinite(actual).all()) else float("inf")


def low_rank(device: Device, N: int, K: int, R: int, dtype: Any, size: float) -> tuple[Any, Any, float]:
    """A [R, K], B [N, R] and a scale with |s B A| of half of ``size``, the norm of the weight."""
    A, B = device.randn(R, K, seed=1, dtype=dtype), device.randn(N, R, seed=2, dtype=dtype)
    return A, B, 0.5 * size / float((B.double() @ A.double()).norm())


def dequant_correctness(device: Device) -> Iterator[Task]:
    """nf4_dequant and int8_dequant: one rounding of the float64 formula, bitsandbytes' own bits, and merging no worse
    than dequantizing and adding in the type."""
    for dtype in DTYPES:
        for nested in (False, True):
            what = {"check": "nf4_dequant", "dtype": dtype, "nested": nested}
            yield Task(what, partial(_nf4_exact, device, dtype, nested))
            what = {"check": "nf4_dequant, merge", "dtype": dtype, "nested": nested}
            yield Task(what, partial(_merge, device, dtype, "nf4", nested))
        yield Task({"check": "int8_dequant", "dtype": dtype}, partial(_int8_exact, device, dtype))
        yield Task({"check": "int8_dequant, merge", "dtype": dtype}, partial(_merge, device, dtype, "int8"))


def _nf4_exact(device: Device, dtype_name: str, nested: bool) -> Row:
    import torch
    from peftlab_kernels.nf4_dequant import nf4_dequant

    dtype, compared = getattr(torch, dtype_name), importlib.util.find_spec("bitsandbytes") is not None
    excess, other = 0.0, []
    for blocksize in device.pick((64, 128), (64,)):
        for N, K in device.pick(SHAPES, DRY_SHAPES):
            weight = nf4_weight(device, N, K, nested=nested, blocksize=blocksize)
            actual = nf4_dequant(weight, dtype=dtype, backend=device.backend(dtype))
            excess = max(excess, beyond_one_rounding(actual, nf4_truth(weight)))
            # On a CPU bitsandbytes compiles for odd K, and errs where blocks span rows.
            if compared and not (device.dry and K % 64) and not torch.equal(actual, of_bitsandbytes(weight, dtype)):
                other.append([N, K, blocksize])
    return {
        "beyond_one_rounding": excess,
        "bit_equal_to_bitsandbytes": not other if compared else "bitsandbytes is not installed",
        "differing": other,
        "ok": excess <= 0 and not other,
    }


def _int8_exact(device: Device, dtype_name: str) -> Row:
    import torch
    from peftlab_kernels.int8_dequant import int8_dequant

    dtype, compared = getattr(torch, dtype_name), importlib.util.find_spec("bitsandbytes") is not None
    excess, other = 0.0, []
    for N, K in device.pick(SHAPES, DRY_SHAPES):
        q, row_absmax = int8_weight(device, N, K)
        actual = int8_dequant(q, row_absmax, dtype=dtype, backend=device.backend(dtype))
        excess = max(excess, beyond_one_rounding(actual, int8_truth(q, row_absmax)))
        if compared:
            from bitsandbytes.functional import int8_vectorwise_dequant

            if not torch.equal(actual, int8_vectorwise_dequant(q, row_absmax).to(dtype)):
                other.append([N, K])
    return {
        "beyond_one_rounding": excess,
        "bit_equal_to_bitsandbytes": not other if compared else "bitsandbytes is not installed",
        "differing": other,
        "ok": excess <= 0 and not other,
    }


def _merge(device: Device, dtype_name: str, kind: str, nested: bool = False) -> Row:
    """Error of W + s B A by that of adding to the rounded weight, as large as it gets over shapes and ranks."""
    import torch
    from peftlab_kernels.int8_dequant import int8_dequant
    from peftlab_kernels.nf4_dequant import nf4_dequant

    dtype = getattr(torch, dtype_name)
    worst, excess, bad = 0.0, 0.0, []
    for N, K in device.pick(SHAPES[3:], DRY_SHAPES[:1]):
        for R in device.pick(RANKS, (8,)):
            options: Row = {"dtype": dtype, "backend": device.backend(dtype)}
            if kind == "nf4":
                weight = nf4_weight(device, N, K, nested=nested)
                W = nf4_truth(weight)
                A, B, scale = low_rank(device, N, K, R, dtype, float(W.norm()))
                merged = nf4_dequant(weight, low_rank=(A, B, scale), **options)
            else:
                q, row_absmax = int8_weight(device, N, K)
                W = int8_truth(q, row_absmax)
                A, B, scale = low_rank(device, N, K, R, dtype, float(W.norm()))
                merged = int8_dequant(q, row_absmax, low_rank=(A, B, scale), **options)
            want = W + scale * (B.double() @ A.double())
            twice = torch.addmm(W.to(dtype), B, A, alpha=scale)
            error, allowed = (float((t.double() - want).norm()) for t in (merged, twice))
            # In float32 both are sums of R products in another order.
            limit = 1.1 * allowed + (R**0.5) * 2**-24 * float(want.norm())
            excess, worst = max(excess, beyond_one_rounding(merged, want)), max(worst, error / max(limit, 1e-300))
            if error > limit:
                bad.append([N, K, R])
    return {"worst_by_limit": worst, "beyond_one_rounding": excess, "bad": bad, "ok": not bad and excess <= 0}
