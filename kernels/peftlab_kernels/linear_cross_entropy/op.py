"""Checks, chunks and autograd of ``linear_cross_entropy``."""

# Shape suffixes: N tokens, C of a chunk, H hidden, V vocabulary.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftlab_kernels import runtime
from peftlab_kernels.heads import (
    Finish,
    Head,
    HeadPass,
    NeedsGrad,
    chunks,
    empty_gradients,
    needs_grad_of,
    pack_head,
    scaled,
    size_where_nothing_is_deferred,
    spread_gradients,
    unpack_head,
    walk_of,
    wide_logits,
)

_PIECE_BYTES = 2**20  # of float32 logits that a CPU processes at a time, so that they stay in cache


class LinearLoss(NamedTuple):
    """total: [] float32, the weighted sum, differentiable. per_token: [N] float32 nats, unweighted, not differentiable."""

    total: Tensor
    per_token: Tensor


def linear_cross_entropy(
    hidden_NH: Tensor,
    head: Head,
    target_N: Tensor,
    *,
    weights: Tensor | None = None,
    adapter_hidden: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> LinearLoss:
    """Cross-entropy of an output head, summed over tokens, without holding the logits of all tokens in memory.

    ``F.cross_entropy(logits.float(), target, reduction="none")`` with the head's logits, times ``weights``. The forward
    pass computes the gradient of the hidden states and of the trained parts of the head, and none for a frozen head.
    Differentiable once.

    Args:
        hidden_NH: [N, H] float32, float16 or bfloat16 (float64 without Triton); products run in this type.
        target_N: [N] int64 in [0, number of classes). weights: [N] factors, known beforehand; None: ones.
        adapter_hidden: [N, H] input of the head's adapter (after dropout); None: ``hidden_NH``.
        chunk: tokens whose logits exist at a time; the default depends on the device's memory.
        backend: auto (Triton on CUDA), triton or torch.
    Raises: ValueError on shapes that do not match, or a backend that cannot run.
    """
    head.check(hidden_NH)
    N = hidden_NH.shape[0]
    for name, tensor in (("targets", target_N), ("weights", weights)):
        if tensor is not None and tensor.shape != (N,):
            raise ValueError(f"expected {name} [{N}], found {list(tensor.shape)}")
    if adapter_hidden is not None and adapter_hidden.shape != hidden_NH.shape:
        raise ValueError(f"expected adapter_hidden {list(hidden_NH.shape)}, found {list(adapter_hidden.shape)}")
    needs = needs_grad_of(head, hidden_NH, adapter_hidden)
    total, per_token, _ = linear_cross_entropy_op(
        hidden_NH, adapter_hidden, *pack_head(head), target_N, weights, needs.flags(),
        *walk_of(head, hidden_NH, needs, chunk), backend,
    )  # fmt: skip
    return LinearLoss(total, per_token)


@torch.library.custom_op("peftlab::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden_NH: Tensor,
    adapter_NH: Tensor | None,
    tensors: list[Tensor],
    kind: str,
    numbers: list[int],
    factors: list[float],
    target_N: Tensor,
    weight_N: Tensor | None,
    needs: list[bool],
    chunk: int | None,
    deferred: bool,
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Operator behind ``linear_cross_entropy``. Returns the sum, the loss of each token and the gradients of the sum."""
    head = unpack_head(tensors, kind, numbers, factors)
    backend = runtime.choose_backend(backend, hidden_NH, products=False)
    N, device = hidden_NH.shape[0], hidden_NH.device
    wide = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
    loss_N = torch.empty(N, dtype=wide, device=device)
    size = chunk or size_where_nothing_is_deferred(head, hidden_NH, NeedsGrad(*needs))
    with torch.autocast(device.type, enabled=False):
        walk = HeadPass(head, hidden_NH, adapter_NH, NeedsGrad(*needs), backend, deferred=deferred)
        for part in chunks(N, size):
            logits_CV = walk.logits(part)
            weight_C = weight_N[part] if weight_N is not None else None
            cross_entropy_rows(logits_CV, target_N[part], weight_C, loss_N[part], head, any(needs), backend)
            if any(needs):
                walk.backward(part, logits_CV)
            del logits_CV  # before the next chunk allocates its own
    total = loss_N.sum() if weight_N is None else torch.dot(loss_N, weight_N.to(wide))
    return total, loss_N, walk.gradients(head)


def cross_entropy_rows(
    logits_CV: Tensor,
    target_C: Tensor,
    weight_C: Tensor | None,
    loss_C: Tensor,
    head: Head,
    gradient: bool,
    backend: str,
) -> None:
    """Fills ``loss_C``. With ``gradient`` it overwrites the logits (before scale and cap) with weight * their gradient."""
    if backend == "triton":
        from peftlab_kernels.linear_cross_entropy.kernel import cross_entropy_rows_kernel

        C, V = logits_CV.shape
        runtime.launch(
            cross_entropy_rows_kernel, (C,), logits_CV, target_C, weight_C if weight_C is not None else loss_C, loss_C,
            V, logits_CV.stride(0), head.scale, head.softcap or 1.0,
            HAS_WEIGHT=weight_C is not None, HAS_CAP=head.softcap is not None, HAS_GRAD=gradient, **rows_options(V),
        )  # fmt: skip
        return
    for rows in row_pieces(logits_CV):
        z_CV, slope_CV = wide_logits(logits_CV[rows], head, slope=gradient)
        index_C1 = target_C[rows, None]
        # Relative to the largest logit, so that a small loss is not the difference of two large numbers.
        z_CV.sub_(z_CV.amax(dim=-1, keepdim=True))
        at_target_C = z_CV.gather(1, index_C1).squeeze(1)
        probs_CV = z_CV.exp_()
        sum_C = probs_CV.sum(dim=-1)
        loss_C[rows] = sum_C.log() - at_target_C
        if not gradient:
            continue
        weight = probs_CV.new_ones(len(sum_C)) if weight_C is None else weight_C[rows].to(probs_CV.dtype)
        probs_CV.mul_((weight / sum_C)[:, None]).scatter_add_(1, index_C1, -weight[:, None])
        write_gradient(logits_CV[rows], probs_CV, slope_CV, head)


def rows_options(V: int) -> dict[str, Any]:
    """Compile-time values and launch options of the kernels over rows of logits. A thread takes 8 values, one load in 16 bits.
    With 16 values, or without a register limit (ptxas then aims at 64), some kernels spill registers."""
    return {"BLOCK": min(1024, max(16, runtime.next_power_of_2(V))), "num_warps": 4, "maxnreg": 128}


def row_pieces(logits_CV: Tensor) -> Any:
    """Slices of rows that fit a CPU's cache in float32; on a GPU one slice of all rows."""
    C, V = logits_CV.shape
    threads = torch.get_num_threads()
    step = C if logits_CV.is_cuda else max(threads, _PIECE_BYTES // (4 * V) // threads * threads)
    return chunks(C, max(1, step))


def write_gradient(out_CV: Tensor, dz_CV: Tensor, slope_CV: Tensor | None, head: Head) -> None:
    """Writes the gradient before scale and cap to ``out_CV``. Overwrites ``dz_CV``."""
    if slope_CV is not None:
        dz_CV.mul_(slope_CV)
    if head.scale != 1.0:
        dz_CV.mul_(head.scale)
    if out_CV.data_ptr() != dz_CV.data_ptr() or out_CV.dtype != dz_CV.dtype:
        out_CV.copy_(dz_CV)


@linear_cross_entropy_op.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden_NH, adapter_NH, tensors, kind, numbers, factors, target_N, weight_N, needs, chunk, deferred, backend
):  # fmt: skip
    wide = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
    return (
        hidden_NH.new_empty((), dtype=wide),
        hidden_NH.new_empty((hidden_NH.shape[0],), dtype=wide),
        empty_gradients(NeedsGrad(*needs), hidden_NH, adapter_NH, tensors, numbers, deferred=deferred),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    hidden_NH, _, tensors, _, ctx.numbers, _, _, _, needs, _, deferred, _ = inputs
    ctx.finish = Finish(len(tensors[0]), tensors[0].dtype, deferred)
    ctx.needs, ctx.num_tensors, ctx.num_inputs = NeedsGrad(*needs), len(tensors), len(inputs)
    ctx.set_materialize_grads(False)  # else autograd makes zeros as large as dW for outputs that are not differentiable
    ctx.mark_non_differentiable(output[1], *output[2])
    ctx.save_for_backward(hidden_NH, *output[2])


def backward_of_sum(ctx: Any, dtotal: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """The gradients of a sum, which its forward pass computed, times the upstream gradient."""
    if dtotal is None:
        return (None, None, [None] * ctx.num_tensors, *[None] * (ctx.num_inputs - 3))
    hidden_NH, *gradients = ctx.saved_tensors
    # In place if this is the last use; otherwise a trained head's dW would be in memory twice.
    last = not torch.is_grad_enabled() and not torch._C._autograd._get_current_graph_task_keep_graph()
    at_weight = ctx.needs.hidden + ctx.needs.adapter_hidden if ctx.needs.weight else None
    with torch.no_grad():
        gradients = [
            ctx.finish.weight(g, dtotal, hidden_NH, last=last) if place == at_weight else scaled(g, dtotal)
            for place, g in enumerate(gradients)
        ]
    if torch.is_grad_enabled():  # create_graph=True
        once: Any = runtime.DifferentiableOnce.apply
        gradients = [once("the fused losses", g, dtotal, hidden_NH) for g in gradients]
    dhidden, dadapter, dhead = spread_gradients(gradients, ctx.needs, ctx.num_tensors, ctx.numbers)
    return (dhidden, dadapter, dhead, *[None] * (ctx.num_inputs - 3))


linear_cross_entropy_op.register_autograd(backward_of_sum, setup_context=_setup_context)
