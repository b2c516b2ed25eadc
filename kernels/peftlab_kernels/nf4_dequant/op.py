"""Checks and launches of NF4 dequantization."""

# Shape suffixes: N out features, K in features, R rank.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftlab_kernels import runtime
from peftlab_kernels.nf4_dequant.reference import nf4_dequant_reference
from peftlab_kernels.runtime import cdiv, next_power_of_2


@dataclass(frozen=True)
class NF4Weight:
    """A [N, K] weight as bitsandbytes stores it.

    Attributes:
        packed: uint8, two values per byte, the first in the high half. absmax: float32 [blocks], or with ``nested``
            uint8 indices into its code. code: [16] float32. nested: (code [256], absmax [blocks / nested_blocksize],
            offset []), all float32, for double quantization.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    shape: tuple[int, int]
    blocksize: int = 64
    nested: tuple[Tensor, Tensor, Tensor] | None = None
    nested_blocksize: int = 256

    def tensors(self) -> list[Tensor]:
        return [self.packed, self.absmax, self.code, *(self.nested or ())]


@torch.no_grad()
def nf4_dequant(
    weight: NF4Weight,
    *,
    dtype: torch.dtype,
    low_rank: tuple[Tensor, Tensor, float] | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The weight as ``dtype``, or ``dtype(W + s * B @ A)`` with one rounding.

    Without ``low_rank`` the result equals bitsandbytes' own, bit for bit.

    Args:
        dtype: float32, float16 or bfloat16. low_rank: (A [R, K], B [N, R], s). out: [N, K] contiguous, overwritten.
        backend: auto, triton or torch.
    Returns: [N, K], ``out`` if given.
    Raises: ValueError on tensors whose sizes or types do not match.
    """
    N, K = weight.shape
    numel = N * K
    _check(weight)
    check_low_rank(low_rank, N, K)
    if out is None:
        out = torch.empty((N, K), dtype=dtype, device=weight.packed.device)
    elif out.shape != (N, K) or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(f"expected out as contiguous [{N}, {K}] {dtype}, found {list(out.shape)} {out.dtype}")
    if numel == 0:
        return out
    if runtime.choose_backend(backend, out, products=low_rank is not None) == "triton":
        _launch(weight, low_rank, out)
    else:
        _torch(weight, low_rank, out)
    return out


def _check(weight: NF4Weight) -> None:
    """Checks the sizes: kernels index by them, so a wrong size would read out of bounds."""
    (N, K), numel = weight.shape, weight.shape[0] * weight.shape[1]
    if weight.packed.dtype != torch.uint8 or weight.packed.numel() != cdiv(numel, 2):
        raise ValueError(
            f"expected {cdiv(numel, 2)} uint8 values for a [{N}, {K}] weight, found {weight.packed.numel()} of "
            f"{weight.packed.dtype}"
        )
    blocks = cdiv(numel, weight.blocksize)
    expected = {"block scales": (weight.absmax, blocks), "code": (weight.code, 16)}
    if weight.nested is not None:
        code2, absmax2, offset = weight.nested
        expected["nested code"] = (code2, 256)
        expected["nested scales"] = (absmax2, cdiv(blocks, weight.nested_blocksize))
        expected["nested offset"] = (offset, 1)
    for name, (tensor, size) in expected.items():
        if tensor.numel() != size:
            raise ValueError(f"expected {size} values of {name} for a [{N}, {K}] weight, found {tensor.numel()}")


def check_low_rank(low_rank: tuple[Tensor, Tensor, float] | None, N: int, K: int) -> None:
    """Raises ValueError unless ``low_rank`` is None or (A [R, K], B [N, R], s)."""
    if low_rank is None:
        return
    A, B, _ = low_rank
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] != K or B.shape[0] != N or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"expected A [R, {K}] and B [{N}, R] for a [{N}, {K}] weight, found {list(A.shape)} and {list(B.shape)}"
        )


def _torch(weight: NF4Weight, low_rank: tuple[Tensor, Tensor, float] | None, out: Tensor) -> None:
    wide = out.dtype if out.dtype == torch.float64 else torch.float32
    if low_rank is None:
        out.copy_(_values(weight, out.dtype))
        return
    A_RK, B_NR, scale = low_rank
    # addmm_, not addmm: autocast would round the operands of addmm.
    merged = _values(weight, torch.float32).to(wide).addmm_(B_NR.to(wide), A_RK.to(wide), alpha=scale)
    out.copy_(merged)


def _values(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """A new [N, K] tensor; float32 replaces types that bitsandbytes cannot write."""
    import bitsandbytes  # noqa: F401  # registers the ops

    dtype = dtype if dtype in runtime.TRITON_DTYPES else torch.float32
    N, K = weight.shape
    # bitsandbytes 0.50.2 on a CPU takes a row's scales from the wrong blocks where blocks span rows. So it gets rows that
    # are whole blocks; if there are none, the formula is used.
    shape = (N, K) if K % weight.blocksize == 0 else (N * K // weight.blocksize, weight.blocksize)
    if shape[0] * shape[1] != N * K:
        values = nf4_dequant_reference(
            weight.packed, weight.absmax, weight.code, weight.shape,
            blocksize=weight.blocksize, nested=weight.nested, nested_blocksize=weight.nested_blocksize,
        )  # fmt: skip
        return values.to(dtype)
    absmax = weight.absmax
    if weight.nested is not None:
        code2, absmax2, offset = weight.nested
        absmax = torch.ops.bitsandbytes.dequantize_blockwise.default(
            absmax, absmax2, code2, weight.nested_blocksize, torch.float32
        )
        absmax += offset
    values = torch.ops.bitsandbytes.dequantize_4bit.default(
        weight.packed.view(-1, 1), absmax, weight.blocksize, "nf4", shape, dtype
    )
    result: Tensor = values.view(N, K)
    return result


def _launch(weight: NF4Weight, low_rank: tuple[Tensor, Tensor, float] | None, out: Tensor) -> None:
    from peftlab_kernels.nf4_dequant.kernel import nf4_dequant_kernel, nf4_merge_kernel

    N, K = weight.shape
    code2, absmax2, offset = weight.nested or (weight.absmax,) * 3
    stored = (weight.packed, weight.absmax, weight.code, code2, absmax2, offset)
    nested = {"NESTED": weight.nested is not None, "BLOCK2": weight.nested_blocksize}
    if low_rank is None:
        options = dequant_options(weight.blocksize)
        grid = (cdiv(N * K, weight.blocksize * options["ROWS"]),)
        runtime.launch(
            nf4_dequant_kernel,
            grid,
            *stored,
            out,
            N * K,
            cdiv(N * K, 2),
            BLOCKSIZE=weight.blocksize,
            **nested,
            **options,
        )
        return
    A_RK, B_NR, scale = low_rank
    options = merge_options(K, A_RK.shape[0], weight.blocksize, out.dtype)
    tiles = (cdiv(K, options["BLOCK_K"]), cdiv(N, options["BLOCK_N"]))
    runtime.launch(
        nf4_merge_kernel, tiles, *stored, A_RK.contiguous(), B_NR.contiguous(), out, N, K, A_RK.shape[0], float(scale),
        BLOCKSIZE=weight.blocksize, DOT=runtime.dot_dtype(out.dtype), **nested, **options,
    )  # fmt: skip


def dequant_options(blocksize: int) -> dict[str, Any]:
    """Compile-time values and launch options. A thread takes 8 values: it reads one word and writes four at once."""
    return {"ROWS": max(1, 2048 // blocksize), "num_warps": 8, "enable_fp_fusion": False}


def merge_options(K: int, rank: int, blocksize: int, dtype: torch.dtype) -> dict[str, Any]:
    """As ``dequant_options``. Hopper's matrix unit takes tiles of at least 64 rows. With 128 rows unaligned and float32 tiles
    spill registers, and tiles with blocks of 128 leave room for one program per processor. One stage: up to rank 64 the
    product has one step, so there is nothing to prefetch. Products in float32 leave no registers for early loads.
    """
    aligned = K % blocksize == 0 and blocksize <= 128
    return {
        "ALIGNED": aligned,
        "EARLY": aligned and dtype != torch.float32,
        "BLOCK_N": 128 if aligned and blocksize <= 64 and dtype != torch.float32 else 64,
        "BLOCK_K": blocksize if aligned else 64,
        "BLOCK_R": min(64, max(16, next_power_of_2(rank))),
        "num_warps": 8,
        "num_stages": 1,
        "enable_fp_fusion": False,
    }
