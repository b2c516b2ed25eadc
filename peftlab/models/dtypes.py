"""Resolves the ``auto`` dtype of weights and matmuls for a device."""

from __future__ import annotations

from typing import Any


def resolve_dtype(name: str, device: str) -> Any:
    """torch dtype for a recipe's dtype name; ``auto`` is bfloat16 (else float16) on CUDA and float32 on the CPU."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def resolve_precision(name: str, device: str) -> Any:
    """torch dtype of the matmuls: ``auto`` is bfloat16 on a GPU that supports it, else float32.

    CPUs with AMX get float32 too: oneDNN compiles its bfloat16 kernels per shape, and with changing batch lengths that costs
    more than the tiles save (measured: a tiny model 30 x slower over its first 60 steps, SmolLM2-135M no faster).
    """
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.float32
