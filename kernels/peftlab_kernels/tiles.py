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


@triton.jit
def capped(z, scale, softcap, HAS_CAP: tl.constexpr):
    """``cap(scale * z)`` and its derivative; tanh through exp, which the interpreter has."""
    z = z * scale
    slope = scale
    if HAS_CAP:
        u = z / softcap
        e = tl.exp(-2.0 * tl.abs(u))
        t = (1.0 - e) / (1.0 + e)
        t = tl.where(u < 0, -t, t)
        z = softcap * t
        slope = scale * (1.0 - t * t)
    return z, slope


@triton.jit
def log_sum_exp(z_ptr, V, scale, softcap, inverse_temperature, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Largest value of ``cap(scale * z) / T`` of a row, and the sum of exp(value - largest), in one pass.

    Logits of -inf are no classes, not even under a cap; of none at all the sum is 0.
    """
    tops = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    totals = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        raw = tl.load(z_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
        z, _ = capped(raw, scale, softcap, HAS_CAP)
        z = tl.where(raw == -float("inf"), raw, z * inverse_temperature)
        higher = tl.maximum(tops, z)
        # -inf - -inf is NaN: a lane without a value yet uses 0 as its base.
        base = tl.where(higher == -float("inf"), 0.0, higher)
        totals = totals * tl.exp(tops - base) + tl.exp(z - base)
        tops = higher
    top = tl.max(tops, axis=0)
    total = tl.sum(totals * tl.exp(tops - tl.where(top == -float("inf"), 0.0, top)), axis=0)
    return top, total
