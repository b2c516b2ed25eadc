"""The passes of a LoRA linear that are not plain matrix products: dropout, and reading dY or x once for two results.

Partial sums go to a workspace with one slice per group of rows and are summed later, without atomics. The same input gives
the same bytes (bit-exact resume needs that).
"""

import triton
import triton.language as tl

from peftlab_kernels.tiles import unpack_bits


@triton.jit
def draw_mask_bytes(seed, byte_index, threshold, ROUNDS: tl.constexpr):
    """Eight keep decisions per byte from one Philox call: 4 words of 32 bits are 8 lanes of 16; keep if >= threshold.

    A mask is a function of seed and position alone, not of the tile shape.
    """
    w0, w1, w2, w3 = tl.randint4x(seed, byte_index, n_rounds=ROUNDS)
    w0 = w0.to(tl.uint32, bitcast=True)
    w1 = w1.to(tl.uint32, bitcast=True)
    w2 = w2.to(tl.uint32, bitcast=True)
    w3 = w3.to(tl.uint32, bitcast=True)
    byte = ((w0 & 0xFFFF) >= threshold).to(tl.int32)
    byte |= ((w0 >> 16) >= threshold).to(tl.int32) << 1
    byte |= ((w1 & 0xFFFF) >= threshold).to(tl.int32) << 2
    byte |= ((w1 >> 16) >= threshold).to(tl.int32) << 3
    byte |= ((w2 & 0xFFFF) >= threshold).to(tl.int32) << 4
    byte |= ((w2 >> 16) >= threshold).to(tl.int32) << 5
    byte |= ((w3 & 0xFFFF) >= threshold).to(tl.int32) << 6
    byte |= ((w3 >> 16) >= threshold).to(tl.int32) << 7
    return byte


@triton.jit(do_not_specialize=["threshold", "num_bytes"])
def dropout_mask_kernel(mask_ptr, seed_ptr, num_bytes, threshold, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    """The bits of a mask alone, ``num_bytes`` of them in all."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    byte = draw_mask_bytes(tl.load(seed_ptr), at.to(tl.uint32), threshold, ROUNDS=ROUNDS)
    tl.store(mask_ptr + at, byte.to(tl.uint8), mask=at < num_bytes)


@triton.jit(do_not_specialize=["threshold", "M"])
def dropout_down_kernel(
    x_ptr,
    a_ptr,
    s_ptr,
    mask_ptr,
    seed_ptr,
    M,
    K,
    R,
    num_bytes,
    threshold,
    keep_scale,
    GROUP_K,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DOT: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """S[M, R] = keep_scale * (mask * x) @ A^T; draws the mask and stores it, one bit per element.

    Drawing is what takes the time, so a row's columns are spread over programs. s_ptr: [groups of columns, M, R] float32
    partial sums. seed_ptr: one int64, read here, so that a CUDA graph draws from what is in it at each replay. num_bytes:
    ceil(K / 8), an argument because the compiler then knows what divides it.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * GROUP_K
    seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(first, tl.minimum(first + GROUP_K, K), BLOCK_K):
        j = start // 8 + tl.arange(0, BLOCK_K // 8)
        at = m[:, None] * num_bytes + j[None, :]
        byte = draw_mask_bytes(seed, at.to(tl.uint32), threshold, ROUNDS=ROUNDS)
        if tl.program_id(2) == 0:
            tl.store(mask_ptr + at, byte.to(tl.uint8), mask=(m[:, None] < M) & (j[None, :] < num_bytes))
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0).to(DOT)
        x = tl.where(unpack_bits(byte, BLOCK_M, BLOCK_K) == 1, x, 0.0)
        a = tl.load(a_ptr + r[None, :] * K + k[:, None], mask=(r[None, :] < R) & (k[:, None] < K), other=0.0)
        acc = tl.dot(x.to(DOT), a.to(DOT), acc, input_precision="ieee")
    to = (tl.program_id(1).to(tl.int64) * M + m[:, None]) * R + r[None, :]
    tl.store(s_ptr + to, acc * keep_scale, mask=(m[:, None] < M) & (r[None, :] < R))


@triton.jit(do_not_specialize=["M"])
def up_backward_kernel(
    dy_ptr,
    b_ptr,
    s_ptr,
    ds_ptr,
    db_ptr,
    M,
    N,
    R,
    scale,
    GROUP_M,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DOT: tl.constexpr,
):
    """One read of dY for both dS = scale * dY @ B and dB = scale * dY^T @ S.

    ds_ptr: [tiles of N, M, R] float32 partial sums; db_ptr: [groups of rows, N, R] float32 partial sums.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1).to(tl.int64) * GROUP_M
    in_r = r[None, :] < R
    b = tl.load(b_ptr + n[:, None] * R + r[None, :], mask=(n[:, None] < N) & in_r, other=0.0).to(DOT)
    db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for start in range(0, GROUP_M, BLOCK_M):
        m = first + start + tl.arange(0, BLOCK_M)
        dy = tl.load(
            dy_ptr + m[:, None] * N + n[None, :], mask=(m[:, None] < M) & (n[None, :] < N), other=0.0
        ).to(DOT)  # fmt: skip
        row = m[:, None] * R + r[None, :]
        inside = (m[:, None] < M) & in_r
        ds = tl.dot(dy, b, input_precision="ieee")
        tl.store(ds_ptr + tl.program_id(0).to(tl.int64) * M * R + row, ds * scale, mask=inside)
        s = tl.load(s_ptr + row, mask=inside, other=0.0).to(DOT)
        db = tl.dot(tl.trans(dy), s, db, input_precision="ieee")
    to = (tl.program_id(1).to(tl.int64) * N + n[:, None]) * R + r[None, :]
    tl.store(db_ptr + to, db * scale, mask=(n[:, None] < N) & in_r)


@triton.jit(do_not_specialize=["M"])
def down_backward_kernel(
    x_ptr,
    mask_ptr,
    ds_ptr,
    da_ptr,
    M,
    K,
    R,
    num_bytes,
    keep_scale,
    GROUP_M,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DOT: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """dA = keep_scale * dS^T @ (mask * x), computed as its transpose: with the rank in front a tile would be too low
    for Hopper's matrix unit. da_ptr: [groups of rows, R, K] float32 partial sums."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    j = tl.program_id(0) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1).to(tl.int64) * GROUP_M
    acc = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    for start in range(0, GROUP_M, BLOCK_M):
        m = first + start + tl.arange(0, BLOCK_M)
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0).to(DOT)
        if HAS_MASK:
            word = m[:, None] * num_bytes + j[None, :]
            byte = tl.load(mask_ptr + word, mask=(m[:, None] < M) & (j[None, :] < num_bytes), other=0)
            x = tl.where(unpack_bits(byte, BLOCK_M, BLOCK_K) == 1, x, 0.0).to(DOT)
        ds = tl.load(
            ds_ptr + m[:, None] * R + r[None, :], mask=(m[:, None] < M) & (r[None, :] < R), other=0.0
        ).to(DOT)  # fmt: skip
        acc = tl.dot(tl.trans(x), ds, acc, input_precision="ieee")
    to = (tl.program_id(1).to(tl.int64) * R + r[None, :]) * K + k[:, None]
    tl.store(da_ptr + to, acc * keep_scale, mask=(k[:, None] < K) & (r[None, :] < R))


@triton.jit(do_not_specialize=["M"])
def dropout_dx_kernel(
    dx_ptr,
    mask_ptr,
    ds_ptr,
    a_ptr,
    M,
    K,
    R,
    num_bytes,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DOT: tl.constexpr,
):
    """dX[M, K] = keep_scale * mask * (dS @ A): the adapter's part, onto which the large product is added."""
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    j = tl.program_id(0) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        ds = tl.load(ds_ptr + m[:, None] * R + r[None, :], mask=(m[:, None] < M) & (r[None, :] < R), other=0.0)
        a = tl.load(a_ptr + r[:, None] * K + k[None, :], mask=(r[:, None] < R) & (k[None, :] < K), other=0.0)
        acc = tl.dot(ds.to(DOT), a.to(DOT), acc, input_precision="ieee")
    byte = tl.load(
        mask_ptr + m[:, None] * num_bytes + j[None, :], mask=(m[:, None] < M) & (j[None, :] < num_bytes), other=0
    )
    acc = tl.where(unpack_bits(byte, BLOCK_M, BLOCK_K) == 1, acc * keep_scale, 0.0)
    to = dx_ptr + m[:, None] * K + k[None, :]
    inside = (m[:, None] < M) & (k[None, :] < K)
    tl.store(to, acc.to(dx_ptr.dtype.element_ty), mask=inside)
