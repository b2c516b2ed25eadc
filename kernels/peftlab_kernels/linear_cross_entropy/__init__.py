"""Cross-entropy of a linear head, without the logits of all tokens in memory."""

from peftlab_kernels.linear_cross_entropy.op import linear_cross_entropy
from peftlab_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]
