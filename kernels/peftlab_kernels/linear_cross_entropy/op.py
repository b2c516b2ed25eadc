"""Checks, chunking and autograd of ``linear_cross_entropy``."""

# Shape suffixes: N tokens, H hidden, V vocabulary, C tokens of one chunk.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftlab_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

# Logits of one chunk in float32: 64 MiB keeps a 49k vocabulary at 341 tokens, far beyond where the GEMM is efficient.
_CHUNK_BYTES = 64 * 2**20


def linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Per-token cross-entropy of a linear head, in nats.

    Equals ``F.cross_entropy(softcap * tanh(scale * F.linear(h, w, b).float() / softcap), target, reduction="none")``
    (without ``softcap``: ``scale * F.linear(...)``), but holds the logits of ``chunk`` tokens at a time: the gradient
    for ``hidden`` is computed in the forward pass, so no ``[N, V]`` tensor outlives its chunk. A head that is trained
    itself takes the reference path.

    Args:
        hidden_NH: [N, H] float. weight_VH: [V, H], same dtype. target_N: [N] int64 in [0, V). bias_V: [V] or None.
        softcap: > 0 or None. scale: factor on the logits before the cap. chunk: tokens per chunk, default by size.
    Returns: [N] float32.
    Raises: ValueError on shapes that do not fit together.
    """
    if hidden_NH.dim() != 2 or weight_VH.dim() != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"expected hidden [N, H] and weight [V, H], found {list(hidden_NH.shape)} and {list(weight_VH.shape)}"
        )
    if target_N.shape != hidden_NH.shape[:1]:
        raise ValueError(f"expected targets [{hidden_NH.shape[0]}], found {list(target_N.shape)}")
    if weight_VH.requires_grad or (bias_V is not None and bias_V.requires_grad):
        return linear_cross_entropy_reference(hidden_NH, weight_VH, target_N, bias_V, softcap=softcap, scale=scale)
    if chunk is None:
        chunk = max(1, _CHUNK_BYTES // (4 * weight_VH.shape[0]))
    result: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, target_N, bias_V, softcap, scale, chunk
    )
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        target_N: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
        scale: float,
        chunk: int,
    ) -> Tensor:
        needs_grad = hidden_NH.requires_grad
        loss_N = torch.empty(hidden_NH.shape[0], dtype=torch.float32, device=hidden_NH.device)
        grad_NH = torch.empty_like(hidden_NH) if needs_grad else None
        for start in range(0, hidden_NH.shape[0], chunk):
            part = slice(start, start + chunk)
            logits_CV = F.linear(hidden_NH[part], weight_VH, bias_V).float()
            if scale != 1.0:
                logits_CV.mul_(scale)
            if softcap is not None:
                logits_CV.div_(softcap).tanh_()
                slope_CV = 1 - logits_CV.square()
                logits_CV.mul_(softcap)
            index_C1 = target_N[part, None]
            # Relative to the largest logit, so that a small loss is not the difference of two large numbers.
            logits_CV.sub_(logits_CV.amax(dim=-1, keepdim=True))
            target_C = logits_CV.gather(1, index_C1).squeeze(1)
            probs_CV = logits_CV.exp_()
            sum_C = probs_CV.sum(dim=-1)
            loss_N[part] = sum_C.log() - target_C
            if grad_NH is not None:
                probs_CV.div_(sum_C[:, None])
                probs_CV.scatter_add_(1, index_C1, probs_CV.new_full(index_C1.shape, -1.0))
                if softcap is not None:
                    probs_CV.mul_(slope_CV)
                if scale != 1.0:
                    probs_CV.mul_(scale)
                grad_NH[part] = probs_CV.to(weight_VH.dtype) @ weight_VH
        ctx.save_for_backward(*([] if grad_NH is None else [grad_NH]))
        return loss_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NH,) = ctx.saved_tensors
        return (grad_NH * grad_N[:, None].to(grad_NH.dtype), None, None, None, None, None, None)
