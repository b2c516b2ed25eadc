"""Cross-entropy of rows of logits, and its gradient written over them."""

import triton
import triton.language as tl

from peftlab_kernels.tiles import capped, log_sum_exp


@triton.jit
def cross_entropy_rows_kernel(
    z_ptr,
    target_ptr,
    weight_ptr,
    loss_ptr,
    V,
    stride,
    scale,
    softcap,
    HAS_WEIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program, two passes over it: the log-sum-exp, then weight * (softmax - onehot) * slope in place.

    z_ptr: [C, V] logits before scale and cap, a row every ``stride``. loss_ptr: [C] float32, not weighted.
    """
    row = tl.program_id(0)
    z_ptr += row.to(tl.int64) * stride
    target = tl.load(target_ptr + row)
    at_target, _slope = capped(tl.load(z_ptr + target).to(tl.float32), scale, softcap, HAS_CAP)
    top, total = log_sum_exp(z_ptr, V, scale, softcap, 1.0, HAS_CAP, BLOCK)
    # Relative to the largest logit, so that a small loss is not the difference of two large numbers.
    tl.store(loss_ptr + row, tl.log(total) - (at_target - top))
    if HAS_GRAD:
        weight = 1.0
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + row).to(tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            raw = tl.load(z_ptr + v, mask=v < V, other=0.0).to(tl.float32)
            z, slope = capped(raw, scale, softcap, HAS_CAP)
            dz = tl.exp(z - top) / total - tl.where(v == target, 1.0, 0.0)
            tl.store(z_ptr + v, (dz * slope * weight).to(z_ptr.dtype.element_ty), mask=v < V)
