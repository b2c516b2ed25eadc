"""Losses of a student's class distribution against a teacher's logits, stored classes or labels.

Every function returns one value per row in nats, without reducing over rows: the training loop divides the sum by the
number of targets of the whole optimizer step. Sums over classes are in float32 for any dtype of the logits (float64
stays). The teacher never receives a gradient.
"""

# Shapes: N rows (tokens, or texts for classification), V classes, k stored classes of a sparse target.

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from peftlab.distillation.targets import SparseTarget
from peftlab.ops import token_divergence


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    share: float = 0.5,
    scale_by_t2: bool = True,
) -> Tensor:
    """Per-row divergence of ``softmax(teacher / T)`` and ``softmax(student / T)`` in nats, times T^2.

    These are true divergences: they include the teacher's entropy, so equal logits give 0. The kinds and their formulas
    are those of ``ops.token_divergence``.

    The factor T^2 compensates the gradient's factor 1 / T^2 if T is large relative to the logits (Hinton et al. 2015,
    section 2). That holds for classification with up to about a thousand classes, where T = 2 to 8 is usual. It does
    not hold for the peaked distributions over a language model's vocabulary: there T > 1 shrinks the gradient despite
    the factor, so use T = 1; ``gradients.gradient_report`` measures the effect for given models.

    Args:
        student_logits, teacher_logits: [N, V], any float dtype, with soft-cap and logit scale applied. -inf marks a class
            that does not exist.
        kind: one of ``ops.DIVERGENCES``. share: its a or b. temperature: above 0, of both sides.
        scale_by_t2: whether the factor T^2 is applied.
    Returns: [N] float32. Raises: ValueError if shapes differ, and as ``ops.check_divergence``.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        raise ValueError(
            f"expected student and teacher logits [N, V] of one shape, found {list(student_logits.shape)} and "
            f"{list(teacher_logits.shape)}; cut both to vocabulary.shared_width columns"
        )
    loss = token_divergence(student_logits, teacher_logits.detach(), kind=kind, temperature=temperature, share=share)
    return loss * temperature**2 if scale_by_t2 else loss


def cross_entropy(student_logits: Tensor, targets: Tensor) -> Tensor:
    """Per-row cross-entropy of the labels in nats, always at temperature 1: ``-log softmax(student)[target]``.

    Args: student_logits: [N, V]. targets: [N] int64, all valid; there is no ignored index.
    Returns: [N] float32. Raises: ValueError on a shape mismatch.
    """
    if student_logits.dim() != 2 or targets.shape != student_logits.shape[:1]:
        raise ValueError(
            f"expected logits [N, V] and targets [N], found {list(student_logits.shape)} and {list(targets.shape)}"
        )
    return F.cross_entropy(_exact(student_logits), targets, reduction="none")


def sparse_divergence(
    student_logits: Tensor, target: SparseTarget, *, temperature: float, scale_by_t2: bool = True
) -> Tensor:
    """Per-row forward KL of stored teacher classes in nats, times T^2. With p and q of teacher and student at T:

    bucket        sum over stored classes of p (log p - log q), plus the same for one class with all others:
                  p_rest = 1 - sum p, log q_rest = logsumexp of the student's other logits. At k = V it is the dense KL.
    renormalized  p and q divided by their sums over the stored classes. Biased: probability that the student gives to
                  other classes costs nothing.
    none          sum of w (log w - log q) with unchanged weights, for classes drawn from the teacher; the gradient is
                  ((sum w) q - w) / T, whose mean over draws is that of the dense KL if E[w] = p.

    The student's rest is summed from its logits, not computed as 1 - sum q: float32 resolves no mass below 6e-8, so a
    smaller one would become 0 and its logarithm -inf.

    Args: student_logits: [N, V]. target: N rows. temperature: the temperature of the target.
    Returns: [N] float32. Raises: ValueError on a shape mismatch, RecipeError on another temperature.
    """
    target.require_temperature(temperature)
    if student_logits.dim() != 2 or len(target) != len(student_logits):
        raise ValueError(
            f"expected logits [N, V] for {len(target)} stored rows, found {list(student_logits.shape)}: the target "
            "belongs to other positions"
        )
    logits = _exact(student_logits) / temperature
    p, stored = target.probs.to(logits.dtype), logits.gather(-1, target.ids)
    if target.tail == "renormalized":
        p = p / p.sum(-1, keepdim=True)
        # Rows with fewer classes are padded with entries of probability 0, which are not part of this sum.
        loss = _divided(p, stored.masked_fill(p == 0, -math.inf).log_softmax(-1)).sum(-1)
    else:
        log_sum = logits.logsumexp(-1, keepdim=True)
        loss = _divided(p, stored - log_sum).sum(-1)
        if target.tail == "bucket":
            loss = loss + _rest(logits, log_sum, target)
    return loss * temperature**2 if scale_by_t2 else loss


def _rest(logits: Tensor, log_sum: Tensor, target: SparseTarget) -> Tensor:
    """[N] term of the class that combines all classes not stored; 0 if the student has no such class."""
    # In float64: otherwise the rounding of k summands would count as mass.
    p = (1.0 - target.probs.double().sum(-1)).clamp_min(0.0).to(logits.dtype)
    others = logits.scatter(-1, target.ids, -math.inf)
    exist = (others > -math.inf).any(-1)
    # Zeros instead of -inf if no class exists: the gradient of an empty logsumexp is NaN, masked or not.
    log_q = torch.where(exist[:, None], others, 0.0).logsumexp(-1) - log_sum[:, 0]
    return torch.where(exist, _divided(p, log_q), 0.0)


def _divided(p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), 0 where p is 0 for any log q."""
    entropy: Tensor = torch.special.xlogy(p, p)
    return entropy - p * torch.where(p > 0, log_q, 0.0)


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
