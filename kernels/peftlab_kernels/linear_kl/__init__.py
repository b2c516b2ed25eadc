"""Divergence of a student's output head from a teacher, without holding the logits of all tokens in memory."""

from peftlab_kernels.linear_kl.op import (
    TAILS,
    DenseTeacher,
    DistilledLoss,
    OnlineTeacher,
    SparseTeacher,
    Teacher,
    linear_kl,
)
from peftlab_kernels.linear_kl.reference import DIVERGENCES, check_divergence, token_divergence

__all__ = [
    "DIVERGENCES",
    "TAILS",
    "DenseTeacher",
    "DistilledLoss",
    "OnlineTeacher",
    "SparseTeacher",
    "Teacher",
    "check_divergence",
    "linear_kl",
    "token_divergence",
]
