"""The gradient doctor: the effect of temperature, weight and number of classes on the gradient at step 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftlab.distillation.losses import cross_entropy
from peftlab.distillation.objective import Objective
from peftlab.distillation.targets import SparseTarget, Tail

# Columns of the hidden states used for a head's gradient: all V x H values would be a second head in memory.
_DIRECTIONS = 64
# Thresholds of the warnings. Below a tenth of the step the teacher's term is within the noise of the labels' term; a
# temperature should not cost a third of the gradient. Angles measured in the head of SmolLM2-135M and its copy without
# layer 14, 496 tokens: tail bucket 2 degrees with 50 classes and 6 with 12, renormalized 11 and 20.
_NOISE, _SHRUNK, _ANGLE_DEG, _LENGTH = 0.1, 0.67, 10.0, 1.25
# A gradient smaller than this share of the labels' is float32 rounding of an exact 0.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class GradientReport:
    """Gradients of the mean loss over the given tokens, each as one vector: with respect to the weights of the head if
    hidden states were given (``of`` is then "head"), else to the logits.

    Attributes:
        kd_norm, ce_norm: norms of T^2 D and of CE, before ``hard_weight``. ratio: kd_norm / ce_norm.
        weighted_ratio: the same with the weights of the step loss; None at hard_weight 0.
        kd_norm_at_t1: kd_norm at temperature 1; None if the teacher is only known at its own temperature.
        k, tail: stored classes compared with all of them, with angle_deg between the two gradients and
            norm_ratio = sparse / dense; None if not requested.
    """

    num_tokens: int
    of: str
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
        text = (
            f"gradients of the {self.of} at step 0 over {self.num_tokens:,} tokens: "
            f"KD / CE = {self.kd_norm:.3g} / {self.ce_norm:.3g} = {self.ratio:.3g}"
        )
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
    hidden: Tensor | None = None,
    chunk_bytes: int = 64 * 2**20,
) -> GradientReport:
    """Measures ||g_KD|| / ||g_CE|| and, for ``k`` stored classes of dense teacher logits, their angle to the dense gradient.

    With ``hidden`` it measures the gradient of the head's weights, a sum over tokens like that of every trained weight.

    Args: student_logits: [N, V] of selected positions. teacher: logits [N, V], or the stored classes used for training.
    targets: [N] int64. k, tail: of a target to be stored; forward KL and dense logits only. hidden: [N, H] hidden states
    of the student's logits; with more than 64 columns, 64 random combinations are used, which changes norms and angles by
    a few percent. chunk_bytes: of the float32 logits of one chunk of tokens.
    Raises: ValueError without rows, and as ``Objective``.
    """
    if not len(student_logits):
        raise ValueError("expected at least one token to take gradients at, found none")
    if k is not None and (isinstance(teacher, SparseTarget) or kind != "forward_kl"):
        raise ValueError("expected dense teacher logits and forward_kl to compare k classes with all of them")
    if hidden is not None and (hidden.dim() != 2 or len(hidden) != len(student_logits)):
        raise ValueError(f"expected hidden states [{len(student_logits)}, H], found {list(hidden.shape)}")
    objective = Objective(kind, temperature, share, hard_weight, scale_by_t2)
    at_t1 = Objective(kind, 1.0, share, hard_weight, scale_by_t2)
    vectors = _Vectors(None if hidden is None else _directions(hidden.detach().float()))
    size = max(1, chunk_bytes // (4 * student_logits.shape[1]))
    for start in range(0, len(student_logits), size):
        chosen = slice(start, start + size)
        logits = student_logits[chosen].detach()
        rows = teacher[chosen] if isinstance(teacher, Tensor) else teacher.rows(chosen)
        gradients = {
            "ce": _gradient(cross_entropy, logits, targets[chosen]),
            "kd": _gradient(objective.soft_losses, logits, rows),
        }
        if isinstance(rows, Tensor) and temperature != 1:
            gradients["t1"] = _gradient(at_t1.soft_losses, logits, rows)
        if isinstance(rows, Tensor) and k is not None:
            stored = SparseTarget.from_logits(rows, k, temperature=temperature, tail=tail)
            gradients["sparse"] = _gradient(objective.soft_losses, logits, stored)
        vectors.add(chosen, gradients)
    num_tokens = len(student_logits)
    kd, ce, t1, sparse = (math.sqrt(vectors.product(n, n)) / num_tokens for n in ("kd", "ce", "t1", "sparse"))
    kd = kd if kd > _ROUNDING * ce else 0.0
    comparable = k is not None and kd > 0 and sparse > 0
    report = GradientReport(
        num_tokens=num_tokens,
        of="logits" if hidden is None else "head",
        kd_norm=kd,
        ce_norm=ce,
        ratio=_ratio(kd, ce),
        weighted_ratio=_ratio((1 - hard_weight) * kd, hard_weight * ce) if hard_weight else None,
        kd_norm_at_t1=(t1 if temperature != 1 else kd) if isinstance(teacher, Tensor) else None,
        k=k if isinstance(teacher, Tensor) else teacher.num_classes,
        tail=teacher.tail if isinstance(teacher, SparseTarget) else tail if k is not None else None,
        angle_deg=_angle(vectors.product("kd", "sparse") / num_tokens**2, kd, sparse) if comparable else None,
        norm_ratio=sparse / kd if comparable else None,
    )
    report.warnings.extend(_warnings(report, objective))
    return report


class _Vectors:
    """Inner products of gradients that come in chunks of tokens: of the logits, or of the head over ``hidden`` [N, H]."""

    def __init__(self, hidden: Tensor | None) -> None:
        self._hidden = hidden
        self._products: dict[tuple[str, str], float] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, chosen: slice, gradients: dict[str, Tensor]) -> None:
        """Adds a chunk. Args: gradients: [n, V] each, of the tokens ``chosen``."""
        if self._hidden is not None:
            for name, gradient in gradients.items():
                part = gradient.T @ self._hidden[chosen]
                self._sums[name] = self._sums[name] + part if name in self._sums else part
            return
        for pair in [*((name, name) for name in gradients), ("kd", "sparse")]:
            if pair[1] in gradients:
                self._products[pair] = self._products.get(pair, 0.0) + _dot(gradients[pair[0]], gradients[pair[1]])

    def product(self, one: str, other: str) -> float:
        """The inner product of two gradients; 0 if one was never added."""
        if self._hidden is None:
            return self._products.get((one, other), 0.0)
        return _dot(self._sums[one], self._sums[other]) if one in self._sums and other in self._sums else 0.0


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.linalg.vecdot(one, other).double().sum())


def _directions(hidden: Tensor) -> Tensor:
    """[N, at most 64] random combinations of the columns that preserve inner products on average (Johnson-Lindenstrauss)."""
    width = hidden.shape[1]
    if width <= _DIRECTIONS:
        return hidden
    mix = torch.randn(width, _DIRECTIONS, generator=torch.Generator().manual_seed(0)) / math.sqrt(_DIRECTIONS)
    return hidden @ mix.to(hidden.device)


def _warnings(report: GradientReport, objective: Objective) -> list[str]:
    warnings = []
    if report.kd_norm == 0:
        warnings.append("the teacher's term has no gradient: the student already has the teacher's probabilities")
        return warnings
    if report.kd_norm_at_t1 and report.kd_norm < _SHRUNK * report.kd_norm_at_t1:
        factor = f"T^2 = {objective.temperature**2:g} is applied" if objective.scale_by_t2 else "T^2 is not applied"
        warnings.append(
            f"temperature {objective.temperature:g} makes the teacher's gradient {report.kd_norm_at_t1 / report.kd_norm:.1f} x "
            f"smaller than temperature 1 ({report.kd_norm:.3g} against {report.kd_norm_at_t1:.3g}; {factor}): use temperature 1 "
            "for language models, higher temperatures for up to a few hundred classes"
        )
    if report.weighted_ratio is not None and objective.hard_weight < 1 and report.weighted_ratio < _NOISE:
        warnings.append(
            f"the teacher's term is {report.weighted_ratio:.3g} of the labels' term with hard_weight "
            f"{objective.hard_weight:g}: the labels dominate training. Lower hard_weight or the temperature"
        )
    if report.angle_deg is not None and report.norm_ratio is not None:
        long = max(report.norm_ratio, 1 / report.norm_ratio)
        if report.angle_deg > _ANGLE_DEG or long > _LENGTH:
            advice = "store more classes" if report.tail == "bucket" else "use tail: bucket, or store more classes"
            warnings.append(
                f"{report.k:,} classes per token ({report.tail}) give a gradient {report.angle_deg:.0f} degrees away from that of "
                f"all classes and {report.norm_ratio:.2f} x as long; the error is the same in every step and does not average "
                f"out: {advice}"
            )
    if report.tail == "renormalized" and report.angle_deg is None:
        warnings.append(
            f"{report.k:,} renormalized classes per token: probability that the student gives to other classes costs nothing, and "
            "the error cannot be measured without the teacher's logits. Use tail: bucket if the stored masses allow it"
        )
    return warnings


def _gradient(losses: Callable[[Tensor, Any], Tensor], logits: Tensor, against: Tensor | SparseTarget) -> Tensor:
    with torch.enable_grad():
        leaf = logits.float().requires_grad_()
        (gradient,) = torch.autograd.grad(losses(leaf, against).sum(), leaf)
    return gradient


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.inf if above else 0.0


def _angle(product: float, one: float, other: float) -> float:
    return math.degrees(math.acos(min(1.0, max(-1.0, product / (one * other)))))
