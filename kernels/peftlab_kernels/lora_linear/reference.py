"""The LoRA linear in plain PyTorch, and the dropout mask of the Triton kernels in NumPy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

MASK_ROUNDS = 7  # of Philox; the fewest that pass BigCrush (Salmon et al., SC 2011)


def lora_linear_reference(
    x: Tensor,
    weight_NK: Tensor,
    A_RK: Tensor,
    B_NR: Tensor,
    bias_N: Tensor | None = None,
    *,
    scale: float,
    keep: Tensor | None = None,
    keep_scale: float = 1.0,
) -> Tensor:
    """``x W^T + bias + scale * (keep * x * keep_scale) A^T B^T``; any float dtype, differentiable twice.

    Args:
        x: [..., K]. keep: [..., K] bool dropout mask, or None. keep_scale: 1 / (share kept).
    Returns: [..., N].
    """
    dropped = x if keep is None else x * keep * keep_scale
    return F.linear(x, weight_NK, bias_N) + F.linear(F.linear(dropped, A_RK), B_NR) * scale


def keep_threshold(dropout: float) -> tuple[int, float]:
    """(16-bit threshold, 1 / share kept): a lane is kept if it is at least the threshold."""
    threshold = min(65535, max(0, round(dropout * 65536)))
    return threshold, 65536 / (65536 - threshold)


def philox_mask_reference(seed: int, M: int, K: int, dropout: float, *, rounds: int = MASK_ROUNDS) -> Tensor:
    """[M, ceil(K / 8)] uint8: the bits that ``dropout_down_kernel`` draws, by Philox-4x32 (Salmon et al., SC 2011)."""
    width = -(-K // 8)
    counter = np.arange(M * width, dtype=np.uint64)
    low32 = np.uint64(0xFFFFFFFF)
    c = [counter & low32, *(np.zeros_like(counter) for _ in range(3))]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)]
    for _ in range(rounds):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ key[0], p1 & low32, (p0 >> np.uint64(32)) ^ c[3] ^ key[1], p0 & low32]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low32, (key[1] + np.uint64(0xBB67AE85)) & low32]
    threshold, _ = keep_threshold(dropout)
    lanes = [half for word in c for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))]
    byte = sum((lane >= threshold).astype(np.uint8) << i for i, lane in enumerate(lanes))
    return torch.from_numpy(np.asarray(byte, dtype=np.uint8).reshape(M, width))
