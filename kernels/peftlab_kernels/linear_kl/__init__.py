"""Divergence of a student's linear head from a teacher, without the logits of all tokens in memory."""

from peftlab_kernels.linear_kl.reference import DIVERGENCES, check_divergence, token_divergence

__all__ = ["DIVERGENCES", "check_divergence", "token_divergence"]
