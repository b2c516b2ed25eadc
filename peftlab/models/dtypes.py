"""The types of weights and matmuls that ``auto`` stands for on a device."""

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
    """torch dtype of the matmuls: ``auto`` is bfloat16 on a GPU that has it, else float32.

    Also on CPUs with AMX: oneDNN compiles its bfloat16 kernels per shape, and in batches of ever new lengths that costs
    more than the tiles save (measured: a tiny model 30 x slower over its first 60 steps, SmolLM2-135M no faster).
    """
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.float32
