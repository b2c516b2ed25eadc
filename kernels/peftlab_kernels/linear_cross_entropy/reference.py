"""The plain PyTorch program that ``linear_cross_entropy`` equals."""

# Shape suffixes: N tokens, H hidden, V vocabulary.

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_cross_entropy_reference(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Per-token cross-entropy in nats, [N] float32. See ``op.linear_cross_entropy`` for the arguments."""
    logits_NV = F.linear(hidden_NH, weight_VH, bias_V).float() * scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return F.cross_entropy(logits_NV, target_N, reduction="none")
