"""NF4 weights to floating point in one launch, optionally with a low-rank product added."""

from peftlab_kernels.nf4_dequant.op import NF4Weight, nf4_dequant
from peftlab_kernels.nf4_dequant.reference import nf4_dequant_reference

__all__ = ["NF4Weight", "nf4_dequant", "nf4_dequant_reference"]
