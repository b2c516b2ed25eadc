"""gpu-check: dequantization and merging against float64, and bit for bit against bitsandbytes on CUDA, for every storage."""

# ruff: noqa: N803, N806 -- sizes are called M, N, K and R, as in the kernels
from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peftlab_kernels.cases import Storage, gathered

from bench.gpu_check.base import Device, Row, Task, lacking

DTYPES = ("bfloat16", "float16", "float32")
DRY_SHAPES = [(33, 128), (5, 33)]
FIRST_MERGED = 3  # index into a storage's shapes; those before it are too small for rank 8
RANKS = (8, 16, 64)


def storages() -> list[tuple[str, Storage]]:
    """Storages by op, smallest first."""
    return sorted(gathered("STORAGE").items(), key=lambda item: float(item[1].stored_bytes))


def beyond_one_rounding(actual: Any, want: Any) -> float:
    """Largest error beyond half a step of the type and 16 float32 roundings of the largest value, relative to that value. It is at
    most 0 if ``actual`` was rounded once from float32."""
    info = torch.finfo(actual.dtype)
    _, exponent = torch.frexp(want.abs().clamp(min=info.smallest_normal))
    half_step = torch.ldexp(torch.full_like(want, info.eps / 2), exponent - 1)
    largest = float(want.abs().max())
    excess = (actual.double() - want).abs() - half_step - 16 * 2**-24 * largest
    return float(excess.max()) / max(largest, 1e-300) if bool(torch.isfinite(actual).all()) else float("inf")


def low_rank(device: Device, N: int, K: int, R: int, dtype: Any, size: float) -> tuple[Any, Any, float]:
    """A [R, K], B [N, R] and a scale so that |s B A| is half of ``size``, the norm of the weight."""
    A, B = device.randn(R, K, seed=1, dtype=dtype), device.randn(N, R, seed=2, dtype=dtype)
    return A, B, 0.5 * size / float((B.double() @ A.double()).norm())


def dequant_correctness(device: Device) -> Iterator[Task]:
    """Checks: one rounding of the float64 formula, the same bits as bitsandbytes, and merging no less accurate than dequantizing
    and adding in the type."""
    for dtype in DTYPES:
        for op, storage in storages():
            for variant in storage.variants:
                what = {"check": op, "dtype": dtype, **variant}
                yield Task(what, partial(_exact, device, storage, dtype, variant))
                what = {"check": f"{op}, merge", "dtype": dtype, **variant}
                yield Task(what, partial(_merge, device, storage, dtype, variant))


def _exact(device: Device, storage: Storage, dtype_name: str, variant: Row) -> Row:
    dtype, compared = getattr(torch, dtype_name), not lacking("bitsandbytes")
    excess, other = 0.0, []
    for form in device.pick(storage.forms, storage.forms[:1]):
        for N, K in device.pick(storage.shapes, DRY_SHAPES):
            weight = storage.make(device, N, K, **variant, **form)
            actual = storage.dense(weight, dtype=dtype, backend=device.backend(dtype))
            excess = max(excess, beyond_one_rounding(actual, storage.truth(weight)))
            if compared and not (device.dry and K % storage.library_columns):
                theirs = storage.library(weight, dtype)(None).view(N, K)
                if not torch.equal(actual, theirs):
                    other.append([N, K, *form.values()])
    return {
        "beyond_one_rounding": excess,
        "bit_equal_to_bitsandbytes": not other if compared else "bitsandbytes is not installed",
        "differing": other,
        "ok": excess <= 0 and not other,
    }


def _merge(device: Device, storage: Storage, dtype_name: str, variant: Row) -> Row:
    """Error of W + s B A divided by the error of adding to the rounded weight: the largest over shapes and ranks."""
    dtype = getattr(torch, dtype_name)
    worst, excess, bad = 0.0, 0.0, []
    for N, K in device.pick(storage.shapes[FIRST_MERGED:], DRY_SHAPES[:1]):
        for R in device.pick(RANKS, (8,)):
            weight = storage.make(device, N, K, **variant)
            W = storage.truth(weight)
            A, B, scale = low_rank(device, N, K, R, dtype, float(W.norm()))
            merged = storage.dense(weight, low_rank=(A, B, scale), dtype=dtype, backend=device.backend(dtype))
            want = W + scale * (B.double() @ A.double())
            twice = torch.addmm(W.to(dtype), B, A, alpha=scale)
            error, allowed = (float((t.double() - want).norm()) for t in (merged, twice))
            # In float32 both are sums of R products in another order.
            limit = 1.1 * allowed + (R**0.5) * 2**-24 * float(want.norm())
            excess, worst = max(excess, beyond_one_rounding(merged, want)), max(worst, error / max(limit, 1e-300))
            if error > limit:
                bad.append([N, K, R])
    return {"worst_by_limit": worst, "beyond_one_rounding": excess, "bad": bad, "ok": not bad and excess <= 0}
