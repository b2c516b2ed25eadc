"""Divergences between a teacher's and a student's distribution over the vocabulary, in plain PyTorch."""

# Shape suffixes: N tokens, V vocabulary, k stored classes of a sparse target.

from __future__ import annotations

import math

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "jsd", "tvd")
_WITH_SHARE = ("skew_forward_kl", "skew_reverse_kl", "jsd")


def check_divergence(kind: str, share: float, temperature: float) -> None:
    """Raises: ValueError on an unknown ``kind``, a ``share`` outside [0, 1] (skewed: [0, 1)) or a temperature <= 0."""
    if kind not in DIVERGENCES:
        raise ValueError(f"expected a divergence out of {', '.join(DIVERGENCES)}, found {kind!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"expected a temperature above 0, found {temperature}")
    if kind in _WITH_SHARE and not (0 <= share < 1 or (share == 1 and kind == "jsd")):
        raise ValueError(f"expected a share in [0, 1{']' if kind == 'jsd' else ')'} for {kind}, found {share}")


def token_divergence(
    student_NV: Tensor, teacher_NV: Tensor, *, kind: str, temperature: float = 1.0, share: float = 0.5
) -> Tensor:
    """Per-token divergence [N] in nats, without the factor T^2, of ``p = softmax(teacher / T)`` and ``q = softmax(student / T)``.

    forward_kl       KL(p || q)
    reverse_kl       KL(q || p)
    skew_forward_kl  KL(p || a p + (1 - a) q)
    skew_reverse_kl  KL(q || (1 - a) p + a q)
    jsd              b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q; b = 0 and b = 1 are forward and reverse KL,
                     where the formula gives 0 (Agarwal et al., GKD, ICLR 2024)
    tvd              half the sum of |p - q|

    Args: share: a or b. Logits of -inf are classes that do not exist: they are ignored where both sides have them.
    Computes in float32, or in float64 for float64 inputs. Differentiable in both inputs.
    """
    check_divergence(kind, share, temperature)
    dtype = torch.float64 if torch.float64 in (student_NV.dtype, teacher_NV.dtype) else torch.float32
    log_q, log_p = ((z.to(dtype) / temperature).log_softmax(-1) for z in (student_NV, teacher_NV))
    if kind == "jsd" and share in (0, 1):
        kind = "reverse_kl" if share else "forward_kl"
    if kind in ("skew_forward_kl", "skew_reverse_kl") and share == 0:
        kind = kind.removeprefix("skew_")
    if kind == "forward_kl":
        return _kl(log_p, log_q)
    if kind == "reverse_kl":
        return _kl(log_q, log_p)
    if kind == "tvd":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    if kind == "skew_forward_kl":
        return _kl(log_p, _mix(log_p, log_q, share))
    if kind == "skew_reverse_kl":
        return _kl(log_q, _mix(log_q, log_p, share))
    log_m = _mix(log_p, log_q, share)
    return share * _kl(log_p, log_m) + (1 - share) * _kl(log_q, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    exists = log_p > -math.inf  # 0 log 0 = 0; masking a NaN afterwards would still let it reach the gradient
    difference = torch.where(exists, log_p, 0.0) - torch.where(exists, log_q, 0.0)
    return (log_p.exp() * difference).sum(-1)


def _mix(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    lowest = torch.finfo(log_p.dtype).min / 4  # the gradient of two -inf would be NaN
    return torch.logaddexp(log_p.clamp_min(lowest) + math.log(share), log_q.clamp_min(lowest) + math.log1p(-share))
