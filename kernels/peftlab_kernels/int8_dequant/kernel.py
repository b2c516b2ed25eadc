"""Row-scaled int8 to float: the weight alone, or the weight plus a low-rank product."""

import triton
import triton.language as tl

from peftlab_kernels.tiles import low_rank_tile


@triton.jit
def int8_dequant_kernel(
    weight_ptr,
    row_scale_ptr,
    a_ptr,
    b_ptr,
    out_ptr,
    N,
    K,
    R,
    scale,
    MERGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DOT: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (n[:, None] < N) & (k[None, :] < K)
    at = n[:, None] * K + k[None, :]
    absmax = tl.load(row_scale_ptr + n, mask=n < N, other=0.0)
    # The order of bitsandbytes' int8_vectorwise_dequant: (q * absmax) * (1 / 127), each product rounded.
    values = tl.load(weight_ptr + at, mask=inside, other=0).to(tl.float32) * absmax[:, None] * 7.874015718698502e-3
    if MERGE:
        values += low_rank_tile(
            b_ptr, a_ptr, n, k, N, K, R, scale, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R, DOT=DOT
        )
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=inside)
