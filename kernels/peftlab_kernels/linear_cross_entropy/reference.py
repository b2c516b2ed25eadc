"""The definition of ``linear_cross_entropy`` in plain PyTorch."""

# Shape suffixes: N tokens, H hidden, V vocabulary, R rank.

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def head_logits_reference(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor, float] | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    adapter_hidden: Tensor | None = None,
) -> Tensor:
    """[N, V] logits of a head in float32 (float64 for float64 inputs). See ``heads.Head`` for the arguments."""
    logits_NV = F.linear(hidden_NH, weight_VH, bias_V)
    if low_rank is not None:
        A_RH, B_VR, low_rank_scale = low_rank
        adapter_NH = hidden_NH if adapter_hidden is None else adapter_hidden
        dtype = hidden_NH.dtype
        logits_NV = logits_NV + F.linear(F.linear(adapter_NH, A_RH.to(dtype)), B_VR.to(dtype)) * low_rank_scale
    logits_NV = (logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()) * scale
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


def linear_cross_entropy_reference(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor, float] | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    adapter_hidden: Tensor | None = None,
) -> Tensor:
    """Per-token cross-entropy in nats, [N] float32. See ``op.linear_cross_entropy`` for the arguments."""
    logits_NV = head_logits_reference(
        hidden_NH, weight_VH, bias_V, low_rank, softcap=softcap, scale=scale, adapter_hidden=adapter_hidden
    )
    return F.cross_entropy(logits_NV, target_N, reduction="none")
