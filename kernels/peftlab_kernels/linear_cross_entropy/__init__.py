"""Cross-entropy of an output head, without holding the logits of all tokens in memory."""

from peftlab_kernels.linear_cross_entropy.op import LinearLoss, linear_cross_entropy
from peftlab_kernels.linear_cross_entropy.reference import head_logits_reference, linear_cross_entropy_reference

__all__ = ["LinearLoss", "head_logits_reference", "linear_cross_entropy", "linear_cross_entropy_reference"]
