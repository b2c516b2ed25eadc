"""The only door to ``peftlab_kernels``: the rest of the engine imports its ops from here."""

from __future__ import annotations

from peftlab_kernels.linear_cross_entropy import linear_cross_entropy
from peftlab_kernels.lora_linear import (
    BaseWeight,
    DenseWeight,
    Int8Weight,
    dropout_mask,
    lora_linear,
    planned_for,
)
from peftlab_kernels.nf4_dequant import NF4Weight
from peftlab_kernels.runtime import new_seed, release_scratch, triton_problem

__all__ = [
    "BaseWeight",
    "DenseWeight",
    "Int8Weight",
    "NF4Weight",
    "dropout_mask",
    "linear_cross_entropy",
    "lora_linear",
    "new_seed",
    "planned_for",
    "release_scratch",
    "triton_problem",
]
