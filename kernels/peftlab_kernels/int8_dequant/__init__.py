"""LLM.int8 weights to floating point in one pass, optionally with a low-rank product added."""

from peftlab_kernels.int8_dequant.op import int8_dequant
from peftlab_kernels.int8_dequant.reference import int8_dequant_reference

__all__ = ["int8_dequant", "int8_dequant_reference"]
