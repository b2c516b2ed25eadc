"""LLM.int8 dequantization in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def int8_dequant_reference(weight: Tensor, row_absmax: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """See ``int8_dequant``; a float64 ``row_absmax`` gives the float64 result."""
    return (weight.to(row_absmax.dtype) * row_absmax[:, None] * (1 / 127)).to(dtype)
