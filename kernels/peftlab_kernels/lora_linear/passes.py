"""The steps of a LoRA linear around its large matrix products, on Triton or in PyTorch.

The PyTorch versions process rows in pieces that stay in cache, so that no temporary has the size of x.
"""

# Shape suffixes: M rows of x, N out features, K in features, R rank, P packed bytes of a mask row (ceil(K / 8)).

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftlab_kernels import runtime
from peftlab_kernels.lora_linear.reference import MASK_ROUNDS, keep_threshold
from peftlab_kernels.runtime import cdiv, next_power_of_2

# Elements of x at a time. On a CPU they stay in cache; on a GPU, where many launches would be slow, they take little memory.
_PIECE = {"cpu": 2**18, "cuda": 2**25}
# The partial sums of dS that up_backward_kernel writes and reads again are 8R / (2 * 128) of dY. Above this rank two plain
# products, which read dY twice, move fewer bytes.
_MAX_SHARED_READ_RANK = 32


def dropout_down(x_MK: Tensor, A_RK: Tensor, dropout: float, seed: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """S [M, R] = (mask * x / share kept) A^T in the type of x, and the mask as bits, [M, P] uint8.

    Args: seed: [] int64. backend: the caller's; the mask may come from Triton where the product does not.
    """
    M, K = x_MK.shape
    R = A_RK.shape[0]
    threshold, keep_scale = keep_threshold(dropout)
    if runtime.choose_backend(backend, x_MK, products=True) == "triton":
        from peftlab_kernels.lora_linear.kernel import dropout_down_kernel

        mask_MP = torch.empty((M, cdiv(K, 8)), dtype=torch.uint8, device=x_MK.device)
        if not M:
            return x_MK.new_empty((0, R)), mask_MP
        options = down_options(R, x_MK.dtype)
        tiles = cdiv(M, options["BLOCK_M"])
        group = _per_group(K, tiles, options["BLOCK_K"], x_MK.device)
        S = torch.empty((cdiv(K, group), M, R), dtype=torch.float32, device=x_MK.device)
        grid = (tiles, S.shape[0], cdiv(R, options["BLOCK_R"]))
        runtime.launch(
            dropout_down_kernel, grid, x_MK.contiguous(), A_RK.contiguous(), S, mask_MP, seed.to(x_MK.device), M, K, R,
            cdiv(K, 8), threshold, keep_scale, group,
            DOT=runtime.dot_dtype(x_MK.dtype), ROUNDS=MASK_ROUNDS, **options,
        )  # fmt: skip
        return S.sum(0).to(x_MK.dtype), mask_MP
    mask_MP = draw_mask(x_MK, dropout, seed, backend)
    A_KR = A_RK.t().to(x_MK.dtype)
    S_MR = x_MK.new_empty((M, R))
    for rows in _pieces(x_MK):
        torch.mm(x_MK[rows] * _factors(mask_MP[rows], K, x_MK.dtype), A_KR, out=S_MR[rows])
    return S_MR.mul_(keep_scale), mask_MP


def up_backward(dY_MN: Tensor, B_NR: Tensor, S_MR: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """dS [M, R] = scale * dY B in the type of dY; dB [N, R] = scale * dY^T S, float32 or the type of B."""
    M, N = dY_MN.shape
    R = B_NR.shape[1]
    if backend != "triton" or not M or R > _MAX_SHARED_READ_RANK:
        dY_MN, dtype = dY_MN.contiguous(), dY_MN.dtype
        return (dY_MN @ B_NR.to(dtype)).mul_(scale), (dY_MN.t() @ S_MR).mul_(scale)
    from peftlab_kernels.lora_linear.kernel import up_backward_kernel

    options = up_options(R, dY_MN.dtype)
    group = _per_group(M, cdiv(N, options["BLOCK_N"]), options["BLOCK_M"], dY_MN.device)
    dS = torch.empty((cdiv(N, options["BLOCK_N"]), M, R), dtype=torch.float32, device=dY_MN.device)
    dB = torch.empty((cdiv(M, group), N, R), dtype=torch.float32, device=dY_MN.device)
    grid = (dS.shape[0], dB.shape[0], cdiv(R, options["BLOCK_R"]))
    runtime.launch(
        up_backward_kernel, grid, dY_MN.contiguous(), B_NR.contiguous(), S_MR, dS, dB, M, N, R, scale, group,
        DOT=runtime.dot_dtype(dY_MN.dtype), **options,
    )  # fmt: skip
    return dS.sum(0).to(dY_MN.dtype), dB.sum(0)


def down_backward(
    x_MK: Tensor,
    A_RK: Tensor,
    dS_MR: Tensor,
    mask_MP: Tensor | None,
    dropout: float,
    backend: str,
    *,
    need_dX: bool,
    need_dA: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients through A: its part of dX [M, K] = D(dS A), and dA [R, K] = dS^T D(x).

    D multiplies by mask / share kept. Triton gives dA in float32. A gradient that is not needed is None.
    """
    M, K = x_MK.shape
    if mask_MP is None:
        dX_MK = dS_MR @ A_RK.to(x_MK.dtype) if need_dX else None
        if not need_dA:
            return dX_MK, None
        if backend == "triton" and M:
            return dX_MK, _down_backward_launch(x_MK, None, dS_MR, dropout)
        return dX_MK, dS_MR.t() @ x_MK
    if backend == "triton" and M:
        return (
            _dropout_dx_launch(dS_MR, A_RK, mask_MP, dropout) if need_dX else None,
            _down_backward_launch(x_MK, mask_MP, dS_MR, dropout) if need_dA else None,
        )
    _, keep_scale = keep_threshold(dropout)
    scaled_MR = dS_MR * keep_scale
    A_RK = A_RK.to(x_MK.dtype)
    dX_MK = x_MK.new_empty((M, K)) if need_dX else None
    dA_RK = x_MK.new_zeros(A_RK.shape) if need_dA else None
    for rows in _pieces(x_MK):
        keep = _factors(mask_MP[rows], K, x_MK.dtype)
        if dX_MK is not None:
            torch.mm(scaled_MR[rows], A_RK, out=dX_MK[rows]).mul_(keep)
        if dA_RK is not None:
            dA_RK.addmm_(scaled_MR[rows].t(), keep.mul_(x_MK[rows]))
    return dX_MK, dA_RK


def _down_backward_launch(x_MK: Tensor, mask_MP: Tensor | None, dS_MR: Tensor, dropout: float) -> Tensor:
    from peftlab_kernels.lora_linear.kernel import down_backward_kernel

    (M, K), R = x_MK.shape, dS_MR.shape[1]
    _, keep_scale = keep_threshold(dropout)
    options = down_backward_options(R, x_MK.dtype)
    group = _per_group(M, cdiv(K, options["BLOCK_K"]), options["BLOCK_M"], x_MK.device)
    dA = torch.empty((cdiv(M, group), R, K), dtype=torch.float32, device=x_MK.device)
    grid = (cdiv(K, options["BLOCK_K"]), dA.shape[0], cdiv(R, options["BLOCK_R"]))
    runtime.launch(
        down_backward_kernel, grid, x_MK.contiguous(), mask_MP if mask_MP is not None else dS_MR, dS_MR.contiguous(), dA, M, K, R,
        cdiv(K, 8), keep_scale, group, DOT=runtime.dot_dtype(x_MK.dtype), HAS_MASK=mask_MP is not None, **options,
    )  # fmt: skip
    return dA.sum(0)


def _dropout_dx_launch(dS_MR: Tensor, A_RK: Tensor, mask_MP: Tensor, dropout: float) -> Tensor:
    from peftlab_kernels.lora_linear.kernel import dropout_dx_kernel

    M, (R, K) = dS_MR.shape[0], A_RK.shape
    dX_MK = dS_MR.new_empty((M, K))
    _, keep_scale = keep_threshold(dropout)
    options = dropout_dx_options(R, dX_MK.dtype)
    grid = (cdiv(K, options["BLOCK_K"]), cdiv(M, options["BLOCK_M"]))
    runtime.launch(
        dropout_dx_kernel, grid, dX_MK, mask_MP, dS_MR.contiguous(), A_RK.contiguous(), M, K, R, cdiv(K, 8), keep_scale,
        DOT=runtime.dot_dtype(dX_MK.dtype), **options,
    )  # fmt: skip
    return dX_MK


def unpack_mask(mask_MP: Tensor, K: int) -> Tensor:
    """[M, K] bool from bits; bit i of a byte is column 8 * byte + i."""
    if mask_MP.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(mask_MP.numpy(), axis=1, count=K, bitorder="little").view(np.bool_))
    shifts = torch.arange(8, dtype=torch.uint8, device=mask_MP.device)
    return ((mask_MP[:, :, None] >> shifts) & 1).view(mask_MP.shape[0], -1)[:, :K].bool()


def _factors(mask_MP: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """The mask as zeros and ones in ``dtype``: PyTorch multiplies equal types ten times faster than float by bool."""
    return unpack_mask(mask_MP, K).to(dtype)


def draw_mask(x_MK: Tensor, dropout: float, seed: Tensor, backend: str) -> Tensor:
    """[M, P] uint8 keep bits for ``x_MK``, on its device. They depend on seed and shape only. On a GPU, and from Triton
    anywhere, they equal ``philox_mask_reference``."""
    M, K = x_MK.shape
    threshold, _ = keep_threshold(dropout)
    if runtime.choose_backend(backend, x_MK, products=False) == "triton":
        from peftlab_kernels.lora_linear.kernel import dropout_mask_kernel

        mask_MP = torch.empty((M, cdiv(K, 8)), dtype=torch.uint8, device=x_MK.device)
        if mask_MP.numel():
            grid = (cdiv(mask_MP.numel(), mask_options()["BLOCK"]),)
            runtime.launch(
                dropout_mask_kernel, grid, mask_MP, seed.to(x_MK.device), mask_MP.numel(), threshold,
                ROUNDS=MASK_ROUNDS, **mask_options(),
            )  # fmt: skip
        return mask_MP
    if x_MK.is_cuda:
        mask_MP = torch.empty((M, cdiv(K, 8)), dtype=torch.uint8, device=x_MK.device)
        for rows in _pieces(x_MK):
            mask_MP[rows] = _philox(rows, K, threshold, seed.to(x_MK.device))
        return mask_MP
    return _sfc64(x_MK, threshold, int(seed)).to(x_MK.device)


def _philox(rows: slice, K: int, threshold: int, seed: Tensor) -> Tensor:
    """[rows, P] uint8 keep bits in plain PyTorch, for a GPU without Triton. The host never reads the seed. 64-bit products wrap,
    which keeps the bits that count; words are in the low half."""
    low, width = 0xFFFFFFFF, cdiv(K, 8)
    index = torch.arange(rows.start * width, rows.stop * width, device=seed.device)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    words, key = (index & low, zero, zero, zero), (seed & low, (seed >> 32) & low)
    for _ in range(MASK_ROUNDS):
        even, odd = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = (
            (odd >> 32) & low ^ words[1] ^ key[0], odd & low, (even >> 32) & low ^ words[3] ^ key[1], even & low
        )  # fmt: skip
        key = ((key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low)
    byte = torch.zeros_like(index, dtype=torch.uint8)
    for lane in range(8):
        bits = (words[lane // 2] >> 16 * (lane % 2)) & 0xFFFF
        byte |= (bits >= threshold).to(torch.uint8) << lane
    return byte.view(rows.stop - rows.start, width)


def _sfc64(x_MK: Tensor, threshold: int, seed: int) -> Tensor:
    """[M, P] uint8 keep bits. NumPy's SFC64 is several times faster than Philox on a CPU. The masks of a seed differ
    between devices, as with PyTorch's own dropout."""
    M, K = x_MK.shape
    source = np.random.SFC64(seed)
    mask = np.empty((M, cdiv(K, 8)), dtype=np.uint8)
    for rows in _pieces(x_MK):
        num = rows.stop - rows.start
        lanes = source.random_raw(cdiv(num * K, 4)).view(np.uint16)[: num * K].reshape(num, K)
        mask[rows] = np.packbits(lanes >= threshold, axis=1, bitorder="little")
    return torch.from_numpy(mask)


def _pieces(x_MK: Tensor) -> Iterator[slice]:
    M, K = x_MK.shape
    step = max(1, _PIECE.get(x_MK.device.type, _PIECE["cpu"]) // max(1, K))
    for start in range(0, M, step):
        yield slice(start, min(M, start + step))


def _per_group(size: int, tiles: int, block: int, device: torch.device) -> int:
    """How many of ``size`` rows or columns one program processes, a multiple of ``block``. With ``tiles`` programs in the other
    direction this gives about four programs per processor, and at least four blocks each to keep the workspace small."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    groups = max(1, min(cdiv(size, 4 * block), cdiv(4 * processors, tiles)))
    return cdiv(cdiv(size, groups), block) * block


def _rank_block(rank: int) -> int:
    return min(64, max(16, next_power_of_2(rank)))


def mask_options() -> dict[str, Any]:
    """Compile-time values and launch options of ``dropout_mask_kernel``: four bytes per thread."""
    return {"BLOCK": 512, "num_warps": 4}


def down_options(rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time values and launch options of ``dropout_down_kernel``.

    With four warps the random numbers spill registers, and in the other passes the sums of rank 64 do. Float32 products
    run without the matrix unit and hold their operands in registers, so their tiles are smaller. Larger tiles would also
    need more shared memory than a block may have on sm_89 and sm_120 (99 KiB).
    """
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_K": 32, "BLOCK_R": _rank_block(rank), "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_R": _rank_block(rank), "num_warps": 8, "num_stages": 4}


def up_options(rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """As ``down_options``, for ``up_backward_kernel``. 128 columns, because they are the rows of dB's tile."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_R": _rank_block(rank), "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_R": _rank_block(rank), "num_warps": 8, "num_stages": 3}


def down_backward_options(rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """As ``down_options``, for ``down_backward_kernel``. For a rank that is not a multiple of 16, ptxas without an explicit
    limit aims at 64 registers on sm_100 and spills."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_K": 64, "BLOCK_R": _rank_block(rank), "num_warps": 8, "num_stages": 2}
    return {
        "BLOCK_M": 64,
        "BLOCK_K": 128,
        "BLOCK_R": _rank_block(rank),
        "num_warps": 8,
        "num_stages": 3,
        **({"maxnreg": 128} if rank % 16 else {}),
    }


def dropout_dx_options(rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """As ``down_options``, for ``dropout_dx_kernel``."""
    return {"BLOCK_M": 64, "BLOCK_K": 128, "BLOCK_R": _rank_block(rank), "num_warps": 8, "num_stages": 1}
