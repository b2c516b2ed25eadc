"""The only door to ``peftlab_kernels``: the rest of the engine imports its ops from here."""

from __future__ import annotations

from peftlab_kernels.linear_cross_entropy import linear_cross_entropy
from peftlab_kernels.lora_linear import (
    BaseWeight,
    DenseWeight,
    Int8Weight,
    dropout_mask,
    lora_linear,
    lora_linear_reference,
    planned_for,
)
from peftlab_kernels.nf4_dequant import NF4Weight
from peftlab_kernels.runtime import new_seed, release_scratch, triton_problem

_TRITON_OPS = ("int8_dequant", "lora_linear", "nf4_dequant")


def kernel_paths(device_type: str) -> dict[str, tuple[str, str]]:
    """Per operation what runs on this kind of device with ``run.kernels: auto``, and why not something faster."""
    problem = triton_problem(device_type) or (None if device_type == "cuda" else "run.kernels=triton asks for it")
    fused = ("Triton", "") if problem is None else ("PyTorch, fused", problem)
    return {
        **dict.fromkeys(_TRITON_OPS, fused),
        "linear_cross_entropy": ("PyTorch, in chunks", "it has no Triton kernel in this release"),
    }


__all__ = [
    "BaseWeight",
    "DenseWeight",
    "Int8Weight",
    "NF4Weight",
    "dropout_mask",
    "kernel_paths",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linear_reference",
    "new_seed",
    "planned_for",
    "release_scratch",
    "triton_problem",
]
