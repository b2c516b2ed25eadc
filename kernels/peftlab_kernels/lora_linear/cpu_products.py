"""Products with the frozen weight whose operands are rounded to bfloat16 or int8, for processors with units for them.

Sums stay exact (float32, int32), and so do the adapter and the bias. int8 uses bitsandbytes' rows of W unchanged and rounds
each row of x to 255 steps, except for columns with outliers (LLM.int8, arXiv:2208.07339). oneDNN compiles and caches a kernel
per shape, and compiling takes longer than one product of a micro-batch. Rows are therefore split into blocks of a few sizes.
"""

# Shape suffixes: M rows of x, N out features, K in features.

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peftlab_kernels.lora_linear.base import BaseWeight, Int8Weight, as_float
from peftlab_kernels.runtime import cdiv, scratch

_BLOCK, _STEP = 512, 32  # rows of a block; the last block is padded to a multiple of the step
_PIECE = 2**17  # elements quantized at a time, so that they stay in cache
_STEPS_INT8 = 127.0


def add_product(y_MN: Tensor, x_MK: Tensor, base: BaseWeight, operands: str) -> None:
    """y += x W^T. Args: x_MK, y_MN: float32 on the CPU. operands: bf16 or int8 (of an ``Int8Weight``)."""
    if operands == "bf16":
        _add_bf16(y_MN, x_MK, as_float(base, torch.float32, backend="torch").t())
        return
    assert isinstance(base, Int8Weight)
    scale_N = base.row_absmax / _STEPS_INT8
    columns = _outliers(x_MK, base.threshold)
    if columns is not None:
        y_MN.addmm_(x_MK[:, columns], (base.weight[:, columns] * scale_N[:, None]).t())
        x_MK = x_MK.index_fill(1, columns, 0.0)
    _add_int8(y_MN, x_MK, base, scale_N)


def add_gradient(dX_MK: Tensor, dY_MN: Tensor, base: BaseWeight, operands: str) -> None:
    """dX += dY W, as ``add_product``. With int8 it runs in float32, since rounding gradients too saved no time."""
    W_NK = as_float(base, torch.float32, backend="torch")
    if operands == "bf16":
        _add_bf16(dX_MK, dY_MN, W_NK)
    else:
        dX_MK.addmm_(dY_MN, W_NK)


def _add_bf16(out: Tensor, rows: Tensor, weight: Tensor) -> None:
    with _bf16_operands():
        for start, stop, size in _blocks(rows.shape[0]):
            if stop - start == size:
                out[start:stop].addmm_(rows[start:stop], weight)
                continue
            padded = scratch((size, rows.shape[1]), rows.dtype, rows.device, use="padded rows")
            padded[: stop - start] = rows[start:stop]
            padded[stop - start :] = 0  # scratch memory may hold NaN
            product = scratch((size, weight.shape[1]), rows.dtype, rows.device, use="product")
            out[start:stop] += torch.mm(padded, weight, out=product)[: stop - start]


def _add_int8(y_MN: Tensor, x_MK: Tensor, base: Int8Weight, scale_N: Tensor) -> None:
    for start, stop, size in _blocks(x_MK.shape[0]):
        quantized, step = _quantize_rows(x_MK[start:stop], size)
        sums = scratch((size, base.shape[0]), torch.int32, x_MK.device, use="sums")
        torch._int_mm(quantized, base.weight.t(), out=sums)
        for first, piece in _pieces(y_MN[start:stop]):
            at = slice(first, first + len(piece))
            piece.addcmul_(sums[at] * step[at], scale_N)


def _blocks(M: int) -> Iterator[tuple[int, int, int]]:
    """(first row, end, number of rows multiplied) of each block."""
    for start in range(0, M, _BLOCK):
        stop = min(M, start + _BLOCK)
        yield start, stop, _STEP * cdiv(stop - start, _STEP)


def _pieces(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of pieces that stay in cache."""
    count = max(1, _PIECE // max(1, rows.shape[1]))
    return ((first, rows[first : first + count]) for first in range(0, rows.shape[0], count))


def _quantize_rows(rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[size, K] int8, which the next call overwrites, and the step [M, 1] of each row. A row's largest value is 127
    steps."""
    M, K = rows.shape
    quantized = scratch((size, K), torch.int8, rows.device, use="quantized rows")
    quantized[M:] = 0
    steps = torch.empty((M, 1), dtype=torch.float32)
    for first, piece in _pieces(rows):
        step = piece.abs().amax(1, keepdim=True).div_(_STEPS_INT8)
        step.clamp_min_(torch.finfo(torch.float32).tiny)  # a row of zeros
        steps[first : first + len(piece)] = step
        quantized[first : first + len(piece)] = (piece / step).round_()
    return quantized, steps


def _outliers(x_MK: Tensor, threshold: float) -> Tensor | None:
    """Columns of x with a value of at least ``threshold``. In int8 they would coarsen the steps of their whole row."""
    if not threshold or not x_MK.numel():
        return None
    low, high = x_MK.aminmax()
    if max(-float(low), float(high)) < threshold:
        return None
    largest_K = x_MK.new_zeros(x_MK.shape[1])
    for _, piece in _pieces(x_MK):
        torch.maximum(largest_K, piece.abs().amax(0), out=largest_K)
    return (largest_K >= threshold).nonzero().view(-1)


@contextlib.contextmanager
def _bf16_operands() -> Iterator[None]:
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
