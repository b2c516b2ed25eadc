"""LoRA linear as one autograd node: checks, choice of path, launches.

Eager calls use ``torch.autograd.Function``. Inside ``torch.compile`` registered operators call the same two functions.
(Their dispatch costs about as much as a small matrix product on a CPU.)
"""

# Shape suffixes: M rows of x, N out features, K in features, R rank, P packed bytes of a mask row (ceil(K / 8)).

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftlab_kernels import runtime
from peftlab_kernels.lora_linear import cpu_products, passes, plan
from peftlab_kernels.lora_linear.base import (
    BaseWeight,
    DenseWeight,
    Int8Weight,
    as_float,
    kind_of,
    library_linear,
)
from peftlab_kernels.lora_linear.reference import keep_threshold
from peftlab_kernels.nf4_dequant import NF4Weight


@dataclass(frozen=True)
class _Call:
    """The arguments of a call, without the tensors that autograd tracks."""

    base: BaseWeight
    scale: float
    dropout: float
    requested: str
    """The caller's backend: a kernel without matrix products may run on Triton where others cannot."""
    backend: str
    """The backend of the kernels with matrix products."""
    plan: plan.Plan
    operands: str | None
    """Type of the operands in ``cpu_products``; None: the type of x."""


def lora_linear(
    x: Tensor,
    base: BaseWeight,
    A_RK: Tensor,
    B_NR: Tensor,
    *,
    scale: float,
    bias_N: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``x W^T + bias + scale * dropout(x) A^T B^T`` over a frozen W, with gradients for x, A, B and the bias.

    The op saves x, with dropout also one bit per element, and nothing else of that size. It overwrites no input.
    Differentiable once.

    Args:
        x: [..., K] float32, float16 or bfloat16 (and float64 without Triton). base: the frozen [N, K] weight.
        A_RK, B_NR: any of these types; their gradients have the same types. dropout: probability of a zero.
        seed: [] int64, best on the device of x (``new_seed(x.device)``). Required with dropout: one seed gives one mask per
            shape.
        backend: auto (Triton on CUDA), triton or torch. For float32 on a CPU also cpu-bf16 (the products with W, in y and
            in dX, round their operands to bfloat16) and, over an ``Int8Weight``, cpu-int8 (the product in y rounds them).
    Returns: [..., N] in the type of x.
    Raises: ValueError on shapes that do not match, a dropout outside [0, 1), or a backend that cannot run.
    """
    N, K = base.shape
    R = A_RK.shape[0]
    if x.shape[-1] != K or A_RK.shape != (R, K) or B_NR.shape != (N, R):
        raise ValueError(
            f"expected x [..., {K}], A [R, {K}] and B [{N}, R] for a weight [{N}, {K}], found {list(x.shape)}, "
            f"{list(A_RK.shape)} and {list(B_NR.shape)}"
        )
    if bias_N is not None and bias_N.shape != (N,):
        raise ValueError(f"expected a bias [{N}], found {list(bias_N.shape)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"expected a dropout in [0, 1), found {dropout}")
    if dropout and seed is None:
        raise ValueError("dropout needs a seed: pass new_seed(x.device)")
    if torch.compiler.is_compiling():
        return _compiled(x, base, A_RK, B_NR, bias_N, scale, dropout, seed, backend)
    x_MK = x.reshape(-1, K)
    call = _call_of(x_MK, base, float(scale), float(dropout), backend)
    y_MN = _LoraLinear.apply(x_MK, A_RK, B_NR, bias_N, seed, call)  # type: ignore[no-untyped-call]
    result: Tensor = y_MN.view(*x.shape[:-1], N)
    return result


@torch.no_grad()
def dropout_mask(x: Tensor, dropout: float, seed: Tensor, *, backend: str = "auto") -> tuple[Tensor, float]:
    """The keep mask [..., K] bool that ``lora_linear`` draws for ``x`` from ``seed``, and 1 / (share kept)."""
    x_MK = x.reshape(-1, x.shape[-1])
    mask_MP = passes.draw_mask(x_MK, dropout, seed, backend)
    return passes.unpack_mask(mask_MP, x.shape[-1]).view(x.shape), keep_threshold(dropout)[1]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MK: Tensor,
        A_RK: Tensor,
        B_NR: Tensor,
        bias_N: Tensor | None,
        seed: Tensor | None,
        call: _Call,
    ) -> Tensor:
        ctx.call = call
        y_MN, S_MR, mask_MP = _forward(x_MK, A_RK, B_NR, bias_N, seed, call)
        ctx.save_for_backward(x_MK, A_RK, B_NR, S_MR, mask_MP)
        ctx.bias_dtype = bias_N.dtype if bias_N is not None else None
        return y_MN

    @staticmethod
    def backward(ctx: Any, dY_MN: Tensor) -> tuple[Tensor | None, ...]:
        x_MK, A_RK, B_NR, S_MR, mask_MP = ctx.saved_tensors
        need_x, need_a, need_b, need_bias = ctx.needs_input_grad[:4]
        with torch.no_grad():
            dX, dA, dB = _backward(dY_MN, x_MK, A_RK, B_NR, S_MR, mask_MP, ctx.call, need_x, need_a or need_b)
            bias = dY_MN.sum(0, dtype=ctx.bias_dtype) if need_bias else None
        gradients = [dX, dA if need_a else None, dB if need_b else None, bias]
        if torch.is_grad_enabled():  # create_graph=True
            once: Any = runtime.DifferentiableOnce.apply
            gradients = [g if g is None else once("lora_linear", g, dY_MN, x_MK, A_RK, B_NR) for g in gradients]
        return *gradients, None, None


def _forward(
    x_MK: Tensor,
    A_RK: Tensor,
    B_NR: Tensor,
    bias_N: Tensor | None,
    seed: Tensor | None,
    call: _Call,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, S and the mask. S is None if y does not need it: activation checkpointing discards what a first forward computes for
    backward."""
    dtype, how = x_MK.dtype, call.plan.forward
    mask_MP = None
    bias_N = bias_N.to(dtype) if bias_N is not None else None
    if call.dropout:
        assert seed is not None
        S_MR, mask_MP = passes.dropout_down(x_MK, A_RK, call.dropout, seed, call.requested)
    elif how == "merged":
        W_NK = as_float(call.base, dtype, low_rank=(A_RK, B_NR, call.scale), backend=call.requested)
        return torch.nn.functional.linear(x_MK, W_NK, bias_N), None, None
    else:
        S_MR = _down(x_MK, A_RK)
    if how == "library":
        y_MN = library_linear(x_MK, call.base, bias_N)
        y_MN.addmm_(S_MR, B_NR.t().to(dtype), alpha=call.scale)
    else:
        # The small part comes first: the product is then added to it before the single rounding. In the other order the
        # product is already on the 16-bit grid, and an adapter below half its step is lost.
        y_MN = torch.nn.functional.linear(S_MR, (call.scale * B_NR).to(dtype), bias_N)
        if call.operands:
            cpu_products.add_product(y_MN, x_MK, call.base, call.operands)
        else:
            y_MN.addmm_(x_MK, as_float(call.base, dtype, backend=call.requested).t())
    return y_MN, S_MR, mask_MP


def _down(x_MK: Tensor, A_RK: Tensor) -> Tensor:
    """S [M, R] without dropout."""
    return x_MK @ A_RK.t().to(x_MK.dtype)


def _backward(
    dY_MN: Tensor,
    x_MK: Tensor,
    A_RK: Tensor,
    B_NR: Tensor,
    S_MR: Tensor | None,
    mask_MP: Tensor | None,
    call: _Call,
    need_x: bool,
    need_adapter: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dX_MK = dA_RK = dB_NR = dS_MR = None
    dtype = x_MK.dtype
    merged = call.plan.backward == "merged"
    if need_adapter or (need_x and not merged):
        S_MR = _down(x_MK, A_RK) if S_MR is None else S_MR
        dS_MR, dB_NR = passes.up_backward(dY_MN, B_NR, S_MR, call.scale, call.backend)
    if dS_MR is not None and dB_NR is not None:
        dX_MK, dA_RK = passes.down_backward(
            x_MK, A_RK, dS_MR, mask_MP, call.dropout, call.backend,
            need_dX=need_x and not merged, need_dA=need_adapter,
        )  # fmt: skip
        dA_RK = dA_RK.to(A_RK.dtype) if dA_RK is not None else None
        dB_NR = dB_NR.to(B_NR.dtype)
    if dX_MK is not None and call.operands:
        cpu_products.add_gradient(dX_MK, dY_MN, call.base, call.operands)
    elif dX_MK is not None:
        dX_MK.addmm_(dY_MN, as_float(call.base, dtype, backend=call.requested))
    elif need_x:
        dX_MK = dY_MN @ as_float(call.base, dtype, low_rank=(A_RK, B_NR, call.scale), backend=call.requested)
    return dX_MK, dA_RK, dB_NR


def _pack(base: BaseWeight) -> tuple[list[Tensor], str, list[int], float]:
    """A base weight as the plain values that an operator schema accepts."""
    numbers = [*base.shape]
    threshold = 0.0
    if isinstance(base, NF4Weight):
        numbers += [base.blocksize, base.nested_blocksize]
    if isinstance(base, Int8Weight):
        threshold = base.threshold
    return base.tensors(), kind_of(base), numbers, threshold


def _unpack(tensors: list[Tensor], kind: str, numbers: list[int], threshold: float) -> BaseWeight:
    if kind == "dense":
        return DenseWeight(tensors[0])
    if kind == "int8":
        return Int8Weight(tensors[0], tensors[1], threshold)
    nested = (tensors[3], tensors[4], tensors[5]) if len(tensors) > 3 else None
    return NF4Weight(
        tensors[0], tensors[1], tensors[2], (numbers[0], numbers[1]), numbers[2], nested, numbers[3]
    )  # fmt: skip


def _call_of(
    x_MK: Tensor, base: BaseWeight, scale: float, dropout: float, backend: str
) -> _Call:  # fmt: skip
    operands = runtime.CPU_OPERANDS.get(backend) if x_MK.dtype == torch.float32 else None
    if operands:
        problem = f"x is on {x_MK.device}" if x_MK.device.type != "cpu" else runtime.operands_problem(backend)
        if problem is None and operands == "int8" and not isinstance(base, Int8Weight):
            problem = f"the weight is not stored in int8 but as {type(base).__name__}"
        if problem:
            raise ValueError(f"backend {backend} cannot run: {problem}")
    requested, backend = backend, runtime.choose_backend(backend, x_MK, products=True)
    (M, K), N = x_MK.shape, base.shape[0]
    on_grid = isinstance(base, DenseWeight) and base.weight.dtype == x_MK.dtype and x_MK.dtype.itemsize == 2
    chosen = plan.choose(
        kind_of(base), x_MK.device, M=M, N=N, K=K, dropout=dropout > 0, on_grid=on_grid, backend=backend
    )  # fmt: skip
    return _Call(base, scale, dropout, requested, backend, plan.UNMERGED if operands else chosen, operands)


@torch.library.custom_op("peftlab::lora_linear", mutates_args=())
def lora_linear_forward(
    x_MK: Tensor,
    A_RK: Tensor,
    B_NR: Tensor,
    bias_N: Tensor | None,
    seed: Tensor | None,
    base: list[Tensor],
    kind: str,
    numbers: list[int],
    threshold: float,
    scale: float,
    dropout: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Operator behind ``lora_linear``. Returns y [M, N], S [M, R], mask [M, ceil(K / 8)] uint8 (no columns without dropout)."""
    call = _call_of(x_MK, _unpack(base, kind, numbers, threshold), scale, dropout, backend)
    y_MN, S_MR, mask_MP = _forward(x_MK, A_RK, B_NR, bias_N, seed, call)
    # The size of S must not depend on the plan, which a trace cannot know.
    S_MR = _down(x_MK, A_RK) if S_MR is None else S_MR
    if mask_MP is None:
        mask_MP = torch.empty((x_MK.shape[0], 0), dtype=torch.uint8, device=x_MK.device)
    return y_MN, S_MR, mask_MP


@lora_linear_forward.register_fake
def _(x_MK, A_RK, B_NR, bias_N, seed, base, kind, numbers, threshold, scale, dropout, backend):  # type: ignore[no-untyped-def]
    width = -(-x_MK.shape[1] // 8) if dropout else 0
    return (
        x_MK.new_empty((x_MK.shape[0], numbers[0])),
        x_MK.new_empty((x_MK.shape[0], A_RK.shape[0])),
        x_MK.new_empty((x_MK.shape[0], width), dtype=torch.uint8),
    )


@torch.library.custom_op("peftlab::lora_linear_backward", mutates_args=())
def lora_linear_backward(
    dY_MN: Tensor,
    x_MK: Tensor,
    A_RK: Tensor,
    B_NR: Tensor,
    S_MR: Tensor,
    mask_MP: Tensor,
    base: list[Tensor],
    kind: str,
    numbers: list[int],
    threshold: float,
    scale: float,
    dropout: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Operator behind the gradient of ``lora_linear``. Returns dX [M, K], dA [R, K], dB [N, R]."""
    call = _call_of(x_MK, _unpack(base, kind, numbers, threshold), scale, dropout, backend)
    mask = mask_MP if dropout else None
    dX, dA, dB = _backward(dY_MN.contiguous(), x_MK, A_RK, B_NR, S_MR, mask, call, True, True)
    assert dX is not None and dA is not None and dB is not None
    return dX, dA, dB


@lora_linear_backward.register_fake
def _(dY_MN, x_MK, A_RK, B_NR, S_MR, mask_MP, base, kind, numbers, threshold, scale, dropout, backend):  # type: ignore[no-untyped-def]
    return (
        x_MK.new_empty(x_MK.shape),
        A_RK.new_empty(A_RK.shape),
        B_NR.new_empty(B_NR.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_MK, A_RK, B_NR, bias_N, _, base, *ctx.rest = inputs
    ctx.num_base = len(base)
    ctx.bias_dtype = bias_N.dtype if bias_N is not None else None
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(x_MK, A_RK, B_NR, output[1], output[2], *base)


def _op_backward(ctx: Any, dY_MN: Tensor, dS: Tensor | None, dmask: Tensor | None) -> tuple[Any, ...]:
    x_MK, A_RK, B_NR, S_MR, mask_MP, *base = ctx.saved_tensors
    dX, dA, dB = lora_linear_backward(dY_MN, x_MK, A_RK, B_NR, S_MR, mask_MP, base, *ctx.rest)
    bias = dY_MN.sum(0, dtype=ctx.bias_dtype) if ctx.bias_dtype is not None and ctx.needs_input_grad[3] else None
    return (dX, dA, dB, bias, None, [None] * ctx.num_base, *[None] * len(ctx.rest))


lora_linear_forward.register_autograd(_op_backward, setup_context=_setup_context)


def _compiled(
    x: Tensor,
    base: BaseWeight,
    A_RK: Tensor,
    B_NR: Tensor,
    bias_N: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    backend: str,
) -> Tensor:
    tensors, kind, numbers, threshold = _pack(base)
    x_MK = x.reshape(-1, base.shape[1]).contiguous()
    y_MN, _, _ = lora_linear_forward(
        x_MK, A_RK, B_NR, bias_N, seed, tensors, kind, numbers, threshold, scale, dropout, backend
    )
    result: Tensor = y_MN.view(*x.shape[:-1], base.shape[0])
    return result
