"""Parts of kernels that several ops use. Only ``@triton.jit`` functions."""

import triton
import triton.language as tl


@triton.jit
def low_rank_tile(
    b_ptr,
    a_ptr,
    n,
    k,
    N,
    K,
    R,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DOT: tl.constexpr,
):
    """[BLOCK_N, BLOCK_K] float32 tile of ``scale * B @ A`` at rows ``n`` and columns ``k``; B is [N, R], A is [R, K]."""
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        b = tl.load(b_ptr + n[:, None] * R + r[None, :], mask=(n[:, None] < N) & (r[None, :] < R), other=0.0)
        a = tl.load(a_ptr + r[:, None] * K + k[None, :], mask=(r[:, None] < R) & (k[None, :] < K), other=0.0)
        acc = tl.dot(b.to(DOT), a.to(DOT), acc, input_precision="ieee")
    return acc * scale


@triton.jit
def unpack_bits(byte, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] 0 or 1 from [ROWS, COLUMNS // 8] bytes; bit i of a byte is column 8 * byte + i."""
    shifts = tl.arange(0, 8)
    bits = (byte.to(tl.int32)[:, :, None] >> shifts[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, COLUMNS))
