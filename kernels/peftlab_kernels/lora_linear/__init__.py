"""A LoRA adapter on a frozen dense, NF4 or int8 linear as one operation."""

from peftlab_kernels.lora_linear.base import BaseWeight, DenseWeight, Int8Weight, kind_of
from peftlab_kernels.lora_linear.op import dropout_mask, lora_linear
from peftlab_kernels.lora_linear.plan import Plan, planned_for
from peftlab_kernels.lora_linear.reference import lora_linear_reference

__all__ = [
    "BaseWeight",
    "DenseWeight",
    "Int8Weight",
    "Plan",
    "dropout_mask",
    "kind_of",
    "lora_linear",
    "lora_linear_reference",
    "planned_for",
]
