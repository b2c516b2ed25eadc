"""NF4 to float: the packed weight alone, or the weight plus a low-rank product."""

import triton
import triton.language as tl

from peftlab_kernels.tiles import low_rank_tile


@triton.jit
def block_scale(
    absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, mask, NESTED: tl.constexpr, BLOCK2: tl.constexpr
):
    """float32 scales of quantization blocks. Product and sum are rounded apart (compile without fp fusion)."""
    if NESTED:
        index = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        scale2 = tl.load(absmax2_ptr + block // BLOCK2, mask=mask, other=0.0)
        return tl.load(code2_ptr + index) * scale2 + tl.load(offset_ptr)
    else:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)


@triton.jit
def nf4_dequant_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    code2_ptr,
    absmax2_ptr,
    offset_ptr,
    out_ptr,
    numel,
    num_bytes,
    BLOCKSIZE: tl.constexpr,
    ROWS: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCK2: tl.constexpr,
):
    """One row of the tile is one quantization block, so its scale is decoded once. num_bytes: ceil(numel / 2), an
    argument because the compiler then knows what divides it and loads words instead of bytes."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    num_blocks = (numel + BLOCKSIZE - 1) // BLOCKSIZE
    scale = block_scale(
        absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, row, row < num_blocks, NESTED=NESTED, BLOCK2=BLOCK2
    )[:, None]
    at = row[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    byte = tl.load(packed_ptr + at, mask=at < num_bytes, other=0).to(tl.int32)
    values = tl.interleave(tl.load(code_ptr + (byte >> 4)) * scale, tl.load(code_ptr + (byte & 15)) * scale)
    to = row[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(out_ptr + to, values.to(out_ptr.dtype.element_ty), mask=to < numel)


@triton.jit
def row_blocks(
    packed_ptr,
    absmax_ptr,
    code2_ptr,
    absmax2_ptr,
    offset_ptr,
    n,
    N,
    K,
    BLOCKSIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCK2: tl.constexpr,
):
    """Scales and packed bytes of rows ``n`` in the block of columns that is the program's."""
    block = n * (K // BLOCKSIZE) + tl.program_id(0)
    absmax = block_scale(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, n < N, NESTED=NESTED, BLOCK2=BLOCK2)
    half = tl.program_id(0) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    byte = tl.load(packed_ptr + n[:, None] * (K // 2) + half[None, :], mask=n[:, None] < N, other=0)
    return absmax[:, None], byte.to(tl.int32)


@triton.jit
def nf4_merge_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    code2_ptr,
    absmax2_ptr,
    offset_ptr,
    a_ptr,
    b_ptr,
    out_ptr,
    N,
    K,
    R,
    scale,
    ALIGNED: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DOT: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCK2: tl.constexpr,
):
    """``W + scale * B @ A``. ALIGNED: K is a multiple of BLOCKSIZE and BLOCK_K equals it, so that a tile row has one
    scale and whole bytes; otherwise every element looks up its own byte and block. EARLY: these are loaded before the
    product, where the registers hold both."""
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (n[:, None] < N) & (k[None, :] < K)
    at = n[:, None] * K + k[None, :]
    if EARLY:  # these loads run while the factors are loaded and multiplied
        absmax, byte = row_blocks(
            packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, n, N, K, BLOCKSIZE, BLOCK_K, NESTED, BLOCK2
        )
    delta = low_rank_tile(
        b_ptr, a_ptr, n, k, N, K, R, scale, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R, DOT=DOT
    )
    if ALIGNED:
        if not EARLY:
            absmax, byte = row_blocks(
                packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, n, N, K, BLOCKSIZE, BLOCK_K, NESTED, BLOCK2
            )
        weight = tl.interleave(tl.load(code_ptr + (byte >> 4)) * absmax, tl.load(code_ptr + (byte & 15)) * absmax)
    else:
        absmax = block_scale(
            absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, at // BLOCKSIZE, inside, NESTED=NESTED, BLOCK2=BLOCK2
        )
        byte = tl.load(packed_ptr + at // 2, mask=inside, other=0).to(tl.int32)
        weight = tl.load(code_ptr + tl.where(at % 2 == 0, byte >> 4, byte & 15)) * absmax
    tl.store(out_ptr + at, (weight + delta).to(out_ptr.dtype.element_ty), mask=inside)
