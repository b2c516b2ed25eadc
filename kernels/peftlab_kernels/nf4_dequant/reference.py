"""NF4 dequantization in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def nf4_dequant_reference(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: tuple[int, int],
    *,
    blocksize: int = 64,
    nested: tuple[Tensor, Tensor, Tensor] | None = None,
    nested_blocksize: int = 256,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See ``nf4_dequant``; float64 ``code`` and scales give the float64 result."""
    numel = shape[0] * shape[1]
    byte = packed.reshape(-1).long()
    values = code[torch.stack([byte >> 4, byte & 15], dim=1).reshape(-1)[:numel]]
    scales = absmax
    if nested is not None:
        code2, absmax2, offset = nested
        blocks = torch.arange(absmax.numel(), device=absmax.device)
        scales = code2[absmax.long()] * absmax2[blocks // nested_blocksize] + offset
    return (values * scales.repeat_interleave(blocksize)[:numel]).reshape(shape).to(dtype)
