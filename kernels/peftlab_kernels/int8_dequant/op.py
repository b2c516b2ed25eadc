"""Checks and launches of LLM.int8 dequantization."""

# Shape suffixes: N out features, K in features, R rank.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftlab_kernels import runtime
from peftlab_kernels.nf4_dequant.op import check_low_rank
from peftlab_kernels.runtime import cdiv, next_power_of_2


@torch.no_grad()
def int8_dequant(
    weight_NK: Tensor,
    row_absmax_N: Tensor,
    *,
    dtype: torch.dtype,
    low_rank: tuple[Tensor, Tensor, float] | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``dtype(W)`` of a row-scaled int8 weight, or ``dtype(W + s * B @ A)`` with one rounding.

    Without ``low_rank`` the float32 result equals bitsandbytes' ``int8_vectorwise_dequant``, bit for bit.

    Args:
        weight_NK: [N, K] int8, contiguous. row_absmax_N: [N] float32, the magnitude that 127 represents.
        dtype: float32, float16 or bfloat16. low_rank: (A [R, K], B [N, R], s). out: [N, K] contiguous, overwritten.
        backend: auto, triton or torch.
    Returns: [N, K], ``out`` if given.
    Raises: ValueError on tensors whose sizes or types do not match.
    """
    if weight_NK.dtype != torch.int8 or weight_NK.dim() != 2:
        raise ValueError(f"expected a [N, K] int8 weight, found {list(weight_NK.shape)} {weight_NK.dtype}")
    N, K = weight_NK.shape
    if row_absmax_N.numel() != N:
        raise ValueError(f"expected {N} row scales, found {row_absmax_N.numel()}")
    check_low_rank(low_rank, N, K)
    if out is None:
        out = torch.empty((N, K), dtype=dtype, device=weight_NK.device)
    elif out.shape != (N, K) or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(f"expected out as contiguous [{N}, {K}] {dtype}, found {list(out.shape)} {out.dtype}")
    if out.numel() == 0:
        return out
    if runtime.choose_backend(backend, out, products=low_rank is not None) == "triton":
        _launch(weight_NK, row_absmax_N, low_rank, out)
    else:
        _torch(weight_NK, row_absmax_N, low_rank, out)
    return out


def _torch(weight_NK: Tensor, row_absmax_N: Tensor, low_rank: tuple[Tensor, Tensor, float] | None, out: Tensor) -> None:
    wide = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    torch.mul(weight_NK, row_absmax_N.view(-1, 1), out=wide)
    wide.mul_(1 / 127)
    if low_rank is not None:
        A_RK, B_NR, scale = low_rank
        wide.addmm_(B_NR.float(), A_RK.float(), alpha=scale)
    if wide is not out:
        out.copy_(wide)


def _launch(
    weight_NK: Tensor, row_absmax_N: Tensor, low_rank: tuple[Tensor, Tensor, float] | None, out: Tensor
) -> None:
    from peftlab_kernels.int8_dequant.kernel import int8_dequant_kernel

    N, K = weight_NK.shape
    A_RK, B_NR, scale = low_rank or (row_absmax_N, row_absmax_N, 0.0)
    rank = A_RK.shape[0] if low_rank else 0
    options = tile_options(rank)
    grid = (cdiv(K, options["BLOCK_K"]), cdiv(N, options["BLOCK_N"]))
    runtime.launch(
        int8_dequant_kernel, grid, weight_NK.contiguous(), row_absmax_N, A_RK.contiguous(), B_NR.contiguous(), out,
        N, K, rank, float(scale), MERGE=low_rank is not None, DOT=runtime.dot_dtype(out.dtype), **options,
    )  # fmt: skip


def tile_options(rank: int) -> dict[str, Any]:
    """Compile-time values and launch options, chosen as for the NF4 merge and for the same reasons."""
    return {
        "BLOCK_N": 64,
        "BLOCK_K": 64,
        "BLOCK_R": min(64, max(16, next_power_of_2(rank))),
        "num_warps": 8,
        "num_stages": 1,
        "enable_fp_fusion": False,
        **({"maxnreg": 255} if rank > 32 else {}),
    }
