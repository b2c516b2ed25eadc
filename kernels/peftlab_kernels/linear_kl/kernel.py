"""Divergence of rows of student logits from a teacher, and its gradient written over them."""

import triton
import triton.language as tl

from peftlab_kernels.tiles import capped, log_sum_exp

# The values of KIND, in the order of reference.DIVERGENCES.
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
SKEW_FORWARD_KL = tl.constexpr(2)
SKEW_REVERSE_KL = tl.constexpr(3)
JSD = tl.constexpr(4)
# The values of TAIL, in the order of op.TAILS.
BUCKET = tl.constexpr(1)
RENORMALIZED = tl.constexpr(2)


@triton.jit
def terms(log_q, log_p, share, KIND: tl.constexpr):
    """Per class the summand of the divergence, and its derivative by q up to a constant over the row."""
    # The difference of two -inf (a class that does not exist) must be 0.
    log_q = tl.maximum(log_q, -1e30)
    log_p = tl.maximum(log_p, -1e30)
    q = tl.exp(log_q)
    p = tl.exp(log_p)
    if KIND == FORWARD_KL:
        return p * (log_p - log_q), p
    elif KIND == REVERSE_KL:
        return q * (log_q - log_p), log_q - log_p
    elif KIND == SKEW_FORWARD_KL:
        log_m = log_mix(log_p, log_q, share)
        return p * (log_p - log_m), -(1.0 - share) * tl.exp(log_p - log_m)
    elif KIND == SKEW_REVERSE_KL:
        log_m = log_mix(log_q, log_p, share)
        return q * (log_q - log_m), log_q - log_m - share * tl.exp(log_q - log_m)
    elif KIND == JSD:
        log_m = log_mix(log_p, log_q, share)
        term = share * p * (log_p - log_m) + (1.0 - share) * q * (log_q - log_m)
        return term, (1.0 - share) * (log_q - log_m)
    else:
        return 0.5 * tl.abs(p - q), tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0))


@triton.jit
def log_mix(log_a, log_b, share):
    """log(share a + (1 - share) b)."""
    one = log_a + tl.log(share)
    other = log_b + tl.log(1.0 - share)
    top = tl.maximum(one, other)
    return top + log1p_of_share(tl.exp(tl.minimum(one, other) - top))


@triton.jit
def log1p_of_share(x):
    """log(1 + x) for x in [0, 1], within 2.1e-7 of its value: a polynomial (minimax of the relative error) whose steps are one
    instruction each, where ``tl.log`` has some twenty and the rows of a JSD are bound by them."""
    y = 0.005232693161815405
    y = y * x - 0.029505234211683273
    y = y * x + 0.07822594791650772
    y = y * x - 0.13663245737552643
    y = y * x + 0.19106006622314453
    y = y * x - 0.2484298199415207
    y = y * x + 0.3331909775733948
    y = y * x - 0.4999949336051941
    y = y * x + 0.9999999403953552
    return y * x


@triton.jit
def log_sum_exp_and_mean(
    z_ptr,
    teacher_ptr,
    V,
    scale,
    softcap,
    teacher_scale,
    teacher_softcap,
    inverse_temperature,
    HAS_CAP: tl.constexpr,
    TEACHER_HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As ``log_sum_exp``, and the mean under q of the difference of the logits over T, student less teacher."""
    tops = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    totals = tl.zeros((BLOCK,), dtype=tl.float32)
    means = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        raw = tl.load(z_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
        z, _slope = capped(raw, scale, softcap, HAS_CAP)
        z = tl.where(raw == -float("inf"), raw, z * inverse_temperature)
        t = tl.load(teacher_ptr + v, mask=v < V, other=0.0).to(tl.float32)
        t, _teacher_slope = capped(t, teacher_scale, teacher_softcap, TEACHER_HAS_CAP)
        higher = tl.maximum(tops, z)
        base = tl.where(higher == -float("inf"), 0.0, higher)
        before, now = tl.exp(tops - base), tl.exp(z - base)
        totals = totals * before + now
        means = means * before + tl.where(now > 0, now * (z - t * inverse_temperature), 0.0)
        tops = higher
    top = tl.max(tops, axis=0)
    factors = tl.exp(tops - top)
    total = tl.sum(totals * factors, axis=0)
    return top, total, tl.sum(means * factors, axis=0) / total


@triton.jit
def divergence_rows_kernel(
    z_ptr,
    teacher_ptr,
    target_ptr,
    weight_ptr,
    soft_ptr,
    hard_ptr,
    V,
    stride,
    teacher_stride,
    scale,
    softcap,
    teacher_scale,
    teacher_softcap,
    inverse_temperature,
    share,
    soft_factor,
    hard_factor,
    KIND: tl.constexpr,
    HAS_HARD: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TEACHER_HAS_CAP: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program: divergence and cross-entropy, and weight * (soft_factor * dD + hard_factor * dCE) in place.

    Two passes over the row for forward and reverse KL, three for the others, whose gradient has an expectation of
    logarithms of both normalised rows in it. z_ptr, teacher_ptr: [C, V] logits before scale and cap. soft_ptr: [C] nats
    without any factor; hard_ptr: [C] nats.
    """
    row = tl.program_id(0)
    z_ptr += row.to(tl.int64) * stride
    teacher_ptr += row.to(tl.int64) * teacher_stride
    teacher_top, teacher_total = log_sum_exp(
        teacher_ptr, V, teacher_scale, teacher_softcap, inverse_temperature, TEACHER_HAS_CAP, BLOCK
    )
    teacher_lse = teacher_top + tl.log(teacher_total)
    expected = 0.0
    if KIND == REVERSE_KL:
        top, total, expected = log_sum_exp_and_mean(
            z_ptr, teacher_ptr, V, scale, softcap, teacher_scale, teacher_softcap, inverse_temperature,
            HAS_CAP, TEACHER_HAS_CAP, BLOCK,
        )  # fmt: skip
        lse = top + tl.log(total)
        expected -= lse - teacher_lse
    else:
        top, total = log_sum_exp(z_ptr, V, scale, softcap, inverse_temperature, HAS_CAP, BLOCK)
        lse = top + tl.log(total)
    hard_lse = 0.0
    target = 0
    if HAS_HARD:
        target = tl.load(target_ptr + row)
        # Before a reduction, where all threads wait: later the gradient overwrites the row without another wait.
        at_target, _slope = capped(tl.load(z_ptr + target).to(tl.float32), scale, softcap, HAS_CAP)
        hard_top, hard_total = log_sum_exp(z_ptr, V, scale, softcap, 1.0, HAS_CAP, BLOCK)
        tl.store(hard_ptr + row, tl.log(hard_total) - (at_target - hard_top))
        hard_lse = hard_top + tl.log(hard_total)
    weight = 1.0
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + row).to(tl.float32)
    loss = tl.zeros((BLOCK,), dtype=tl.float32)
    if KIND > REVERSE_KL:
        mean = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            raw = tl.load(z_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
            z, _ = capped(raw, scale, softcap, HAS_CAP)
            t = tl.load(teacher_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
            t, _ = capped(t, teacher_scale, teacher_softcap, TEACHER_HAS_CAP)
            log_q = z * inverse_temperature - lse
            term, derivative = terms(log_q, t * inverse_temperature - teacher_lse, share, KIND)
            loss += tl.where(v < V, term, 0.0)
            mean += tl.where(v < V, tl.exp(log_q) * derivative, 0.0)
        expected = tl.sum(mean, axis=0)
    if HAS_GRAD or KIND <= REVERSE_KL:
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            raw = tl.load(z_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
            z, slope = capped(raw, scale, softcap, HAS_CAP)
            t = tl.load(teacher_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
            t, _ = capped(t, teacher_scale, teacher_softcap, TEACHER_HAS_CAP)
            log_q = z * inverse_temperature - lse
            term, derivative = terms(log_q, t * inverse_temperature - teacher_lse, share, KIND)
            if KIND <= REVERSE_KL:
                loss += tl.where(v < V, term, 0.0)
            dz = tl.exp(log_q) - derivative if KIND == FORWARD_KL else tl.exp(log_q) * (derivative - expected)
            if HAS_GRAD:
                dz = dz * (soft_factor * inverse_temperature)
                if HAS_HARD:
                    dz += hard_factor * (tl.exp(z - hard_lse) - tl.where(v == target, 1.0, 0.0))
                tl.store(z_ptr + v, (dz * slope * weight).to(z_ptr.dtype.element_ty), mask=v < V)
    tl.store(soft_ptr + row, tl.sum(loss, axis=0))


@triton.jit
def sparse_rows_kernel(
    z_ptr,
    id_ptr,
    prob_ptr,
    target_ptr,
    weight_ptr,
    soft_ptr,
    hard_ptr,
    V,
    K,
    stride,
    scale,
    softcap,
    inverse_temperature,
    soft_factor,
    hard_factor,
    TAIL: tl.constexpr,
    HAS_HARD: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As ``divergence_rows_kernel``, forward KL from K stored classes: two passes over the student's row alone.

    The stored classes are taken out of the row first (-inf), so that the tail's mass is a sum over the tail: one less
    the mass of the stored classes has no digits left where the student is confident. id_ptr: [C, K] classes, distinct
    where prob_ptr is above 0; the others fill up a row and count for nothing.
    """
    row = tl.program_id(0)
    z_ptr += row.to(tl.int64) * stride
    j = tl.arange(0, BLOCK_K)
    ids = tl.load(id_ptr + row.to(tl.int64) * K + j, mask=j < K, other=0)
    p = tl.load(prob_ptr + row.to(tl.int64) * K + j, mask=j < K, other=0.0).to(tl.float32)
    stored = p > 0
    z_stored, slope_stored = capped(
        tl.load(z_ptr + ids, mask=stored, other=-float("inf")).to(tl.float32), scale, softcap, HAS_CAP
    )
    z_stored = tl.where(stored, z_stored, -float("inf"))
    target = 0
    at_target = 0.0
    if HAS_HARD:
        target = tl.load(target_ptr + row)
        at_target, _slope = capped(tl.load(z_ptr + target).to(tl.float32), scale, softcap, HAS_CAP)
    weight = 1.0
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + row).to(tl.float32)
    tl.debug_barrier()
    tl.store(z_ptr + ids, tl.full((BLOCK_K,), -float("inf"), dtype=z_ptr.dtype.element_ty), mask=stored)
    tl.debug_barrier()
    tail_top, tail_total = log_sum_exp(z_ptr, V, scale, softcap, inverse_temperature, HAS_CAP, BLOCK)
    stored_top = tl.max(z_stored * inverse_temperature, axis=0)
    top = tl.maximum(tail_top, stored_top)
    stored_total = tl.sum(tl.exp(z_stored * inverse_temperature - top), axis=0)
    lse = top + tl.log(tail_total * tl.exp(tail_top - top) + stored_total)
    log_q = tl.where(stored, z_stored * inverse_temperature - lse, 0.0)
    mass = tl.sum(p, axis=0)
    if TAIL == RENORMALIZED:
        p = p / mass
        log_q = tl.where(stored, z_stored * inverse_temperature - top - tl.log(stored_total), 0.0)
    loss = tl.sum(tl.where(stored, p * (tl.log(tl.where(stored, p, 1.0)) - log_q), 0.0), axis=0)
    q = tl.where(stored, tl.exp(log_q), 0.0)
    # In the tail the derivative is tail_mass * q - tail_target * (q without the stored classes, renormalized).
    tail_mass = mass
    tail_target = 0.0
    if TAIL == BUCKET:
        has_tail = tl.sum(stored.to(tl.int32), axis=0) < V
        rest = tl.where(has_tail, tl.maximum(1.0 - mass, 0.0), 0.0)
        log_tail = tail_top + tl.log(tl.where(has_tail, tail_total, 1.0)) - lse
        loss += tl.where(rest > 0, rest * (tl.log(tl.where(rest > 0, rest, 1.0)) - log_tail), 0.0)
        tail_mass = mass + rest
        tail_target = tl.where(rest > 0, rest / tl.where(has_tail, tail_total, 1.0), 0.0)
    elif TAIL == RENORMALIZED:
        tail_mass = 0.0
    tl.store(soft_ptr + row, loss)
    soft = soft_factor * inverse_temperature
    dz_stored = ((q if TAIL == RENORMALIZED else tail_mass * q) - p) * soft
    hard_lse = 0.0
    if HAS_HARD:
        hard_tail_top, hard_tail_total = log_sum_exp(z_ptr, V, scale, softcap, 1.0, HAS_CAP, BLOCK)
        hard_top = tl.maximum(hard_tail_top, tl.max(z_stored, axis=0))
        hard_total = hard_tail_total * tl.exp(hard_tail_top - hard_top) + tl.sum(tl.exp(z_stored - hard_top), axis=0)
        tl.store(hard_ptr + row, tl.log(hard_total) - (at_target - hard_top))
        hard_lse = hard_top + tl.log(hard_total)
        dz_stored += hard_factor * (tl.exp(z_stored - hard_lse) - tl.where(ids == target, 1.0, 0.0))
    if HAS_GRAD:
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            raw = tl.load(z_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
            z, slope = capped(raw, scale, softcap, HAS_CAP)
            z_soft = z * inverse_temperature
            dz = soft * tail_mass * tl.exp(z_soft - lse)
            if TAIL == BUCKET:
                dz -= soft * tail_target * tl.exp(z_soft - tail_top)
            if HAS_HARD:
                dz += hard_factor * (tl.exp(z - hard_lse) - tl.where(v == target, 1.0, 0.0))
            tl.store(z_ptr + v, (dz * slope * weight).to(z_ptr.dtype.element_ty), mask=v < V)
        tl.debug_barrier()
        tl.store(z_ptr + ids, (dz_stored * slope_stored * weight).to(z_ptr.dtype.element_ty), mask=stored)
