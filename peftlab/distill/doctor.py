"""The gradient doctor: what the chosen temperature, weight and number of classes do to the gradient at step 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftlab.distill.losses import cross_entropy
from peftlab.distill.objective import Objective
from peftlab.distill.targets import SparseTarget, Tail

# A few [chunk, V] float32 tensors exist at a time: 64 MiB each.
_CHUNK_BYTES = 64 * 2**20
# Where a warning begins. Below a tenth of the step the teacher's term is within the noise of the labels'; half the
# gradient is more than a temperature should cost; 15 degrees and a quarter of the length are beyond what a tail bucket
# errs on a language model (6 to 8 degrees, 2 to 7 % measured with 50 classes) and below renormalized classes (37 to 59).
_NOISE, _SHRUNK, _ANGLE_DEG, _LENGTH = 0.1, 0.5, 15.0, 1.25
# A gradient this much below the labels' is what float32 leaves of an exact 0.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class GradientReport:
    """Gradients of the mean loss over the given tokens with respect to the student's logits, as one vector each.

    Attributes:
        kd_norm, ce_norm: norms of T^2 D and of CE, before ``hard_weight``. ratio: kd_norm / ce_norm.
        weighted_ratio: the same with the weights of the step loss; None at hard_weight 0.
        kd_norm_at_t1: kd_norm at temperature 1; None when the teacher is known at its own temperature only.
        k, tail: stored classes compared with all of them, with angle_deg between the two gradients and
            norm_ratio = sparse / dense; None when not asked for.
    """

    num_tokens: int
    kd_norm: float
    ce_norm: float
    ratio: float
    weighted_ratio: float | None
    kd_norm_at_t1: float | None = None
    k: int | None = None
    tail: str | None = None
    angle_deg: float | None = None
    norm_ratio: float | None = None
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"gradients at step 0 over {self.num_tokens:,} tokens: KD / CE = {self.kd_norm:.3g} / {self.ce_norm:.3g} = {self.ratio:.3g}"
        if self.weighted_ratio is not None:
            text += f", with hard_weight {self.weighted_ratio:.3g}"
        if self.angle_deg is not None:
            text += f"; {self.k:,} classes ({self.tail}) against all: {self.angle_deg:.1f} degrees, {self.norm_ratio:.2f} x as long"
        return text


def gradient_report(
    student_logits: Tensor,
    teacher: Tensor | SparseTarget,
    targets: Tensor,
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    share: float = 0.5,
    hard_weight: float = 0.0,
    scale_by_t2: bool = True,
    k: int | None = None,
    tail: Tail = "bucket",
) -> GradientReport:
    """Measures ||g_KD|| / ||g_CE|| and, for ``k`` stored classes of dense teacher logits, their angle to the dense gradient.

    Taken on the logits: a sum over tokens of a batch, as in the head's weights, adds the correlation between tokens.

    Args: student_logits: [N, V] of selected positions. teacher: logits [N, V], or the stored classes that will train.
    targets: [N] int64. k, tail: of a target to be stored; forward KL and dense logits only.
    Raises: ValueError without rows, and as ``Objective``.
    """
    if not len(student_logits):
        raise ValueError("expected at least one token to take gradients at, found none")
    if k is not None and (isinstance(teacher, SparseTarget) or kind != "forward_kl"):
        raise ValueError("expected dense teacher logits and forward_kl to compare k classes with all of them")
    objective = Objective(kind, temperature, share, hard_weight, scale_by_t2)
    at_t1 = Objective(kind, 1.0, share, hard_weight, scale_by_t2)
    dense_sq = ce_sq = t1_sq = sparse_sq = product = 0.0
    size = max(1, _CHUNK_BYTES // (4 * student_logits.shape[1]))
    for start in range(0, len(student_logits), size):
        chosen = slice(start, start + size)
        logits = student_logits[chosen].detach()
        rows = teacher[chosen] if isinstance(teacher, Tensor) else teacher.rows(chosen)
        ce_sq += _square(_gradient(cross_entropy, logits, targets[chosen]))
        if isinstance(rows, Tensor) and temperature != 1:
            t1_sq += _square(_gradient(at_t1.soft_losses, logits, rows))
        dense = _gradient(objective.soft_losses, logits, rows)
        dense_sq += _square(dense)
        if k is not None and isinstance(rows, Tensor):
            stored = SparseTarget.from_logits(rows, k, temperature=temperature, tail=tail)
            sparse = _gradient(objective.soft_losses, logits, stored)
            sparse_sq += _square(sparse)
            product += float(torch.linalg.vecdot(dense, sparse).double().sum())
    num_tokens = len(student_logits)
    kd, ce, t1, short = (math.sqrt(square) / num_tokens for square in (dense_sq, ce_sq, t1_sq, sparse_sq))
    kd = kd if kd > _ROUNDING * ce else 0.0
    comparable = k is not None and kd > 0 and short > 0
    report = GradientReport(
        num_tokens=num_tokens,
        kd_norm=kd,
        ce_norm=ce,
        ratio=_ratio(kd, ce),
        weighted_ratio=_ratio((1 - hard_weight) * kd, hard_weight * ce) if hard_weight else None,
        kd_norm_at_t1=(t1 if temperature != 1 else kd) if isinstance(teacher, Tensor) else None,
        k=k if k is not None else None if isinstance(teacher, Tensor) else teacher.num_classes,
        tail=tail if k is not None else None if isinstance(teacher, Tensor) else teacher.tail,
        angle_deg=_angle(product / num_tokens**2, kd, short) if comparable else None,
        norm_ratio=short / kd if comparable else None,
    )
    report.warnings.extend(_warnings(report, objective))
    return report


def _warnings(report: GradientReport, objective: Objective) -> list[str]:
    found = []
    if report.kd_norm == 0:
        found.append("the teacher's term has no gradient: the student already gives the teacher's probabilities")
        return found
    if report.kd_norm_at_t1 and report.kd_norm < _SHRUNK * report.kd_norm_at_t1:
        factor = f"T^2 = {objective.temperature**2:g} is applied" if objective.scale_by_t2 else "T^2 is not applied"
        found.append(
            f"temperature {objective.temperature:g} makes the teacher's gradient {report.kd_norm_at_t1 / report.kd_norm:.1f} x "
            f"smaller than temperature 1 ({report.kd_norm:.3g} against {report.kd_norm_at_t1:.3g}; {factor}): take temperature 1 "
            "for a language model, higher ones for a few hundred classes"
        )
    if report.weighted_ratio is not None and objective.hard_weight < 1 and report.weighted_ratio < _NOISE:
        found.append(
            f"the teacher's term is {report.weighted_ratio:.3g} of the labels' with hard_weight {objective.hard_weight:g}: this "
            "trains on the labels. Lower hard_weight or the temperature"
        )
    if report.angle_deg is not None and report.norm_ratio is not None:
        long = max(report.norm_ratio, 1 / report.norm_ratio)
        if report.angle_deg > _ANGLE_DEG or long > _LENGTH:
            advice = "store more classes" if report.tail == "bucket" else "use tail: bucket, or store more classes"
            found.append(
                f"{report.k:,} classes per token ({report.tail}) give a gradient {report.angle_deg:.0f} degrees off the one of all "
                f"classes and {report.norm_ratio:.2f} x as long; the error is the same in every step and does not average "
                f"out: {advice}"
            )
    if report.tail == "renormalized" and report.angle_deg is None:
        found.append(
            f"{report.k:,} renormalized classes per token: what the student gives to other classes is free, and without the "
            "teacher's logits the error cannot be measured. Use tail: bucket where the stored masses allow it"
        )
    return found


def _gradient(losses: Callable[[Tensor, Any], Tensor], logits: Tensor, against: Tensor | SparseTarget) -> Tensor:
    with torch.enable_grad():
        leaf = logits.float().requires_grad_()
        (gradient,) = torch.autograd.grad(losses(leaf, against).sum(), leaf)
    return gradient


def _square(gradient: Tensor) -> float:
    return float(gradient.square().sum(-1).double().sum())


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.inf if above else 0.0


def _angle(product: float, one: float, other: float) -> float:
    return math.degrees(math.acos(min(1.0, max(-1.0, product / (one * other)))))
