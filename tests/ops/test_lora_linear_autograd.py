"""lora_linear in autograd: which gradients it gives, what it saves and recomputes, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peftlab_kernels import runtime
from peftlab_kernels.lora_linear import lora_linear, op
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.ops.lora_linear_examples import (
    EACH_BACKEND,
    EACH_DROPOUT,
    EACH_KIND,
    EACH_WAY,
    KINDS,
    NAMES,
    SCALE,
    SEED,
    TOLERANCE,
    Case,
    call,
    check,
    problem,
    run_op,
    truth,
)


@EACH_WAY
def test_lora_linear_passes_gradcheck(force_plan: Any, how: str, dropout: float) -> None:
    force_plan(how, how)
    case = problem("dense", (5, 10, 7, 2), torch.float64, torch.device("cpu"), dropout=dropout)
    leaves = [t.clone().requires_grad_() for t in case.inputs()]
    assert torch.autograd.gradcheck(lambda *leaves: call(case, leaves, "torch"), leaves)


def _columns_apart(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1).flatten(-2)[..., ::2]


def _transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


@pytest.mark.parametrize("layout", [_columns_apart, _transposed])
@EACH_WAY
@EACH_BACKEND
def test_lora_linear_takes_strided_inputs_and_gradients(
    device: torch.device, force_plan: Any, backend: str, how: str, dropout: float, layout: Callable[[Tensor], Tensor]
) -> None:
    force_plan(how, how)
    case = problem("int8", (63, 50, 130, 8), torch.float32, device, backend=backend, dropout=dropout)
    strided = replace(case, grad=layout(case.grad))
    leaves = [layout(t).detach().requires_grad_() for t in case.inputs()[:3]] + [case.bias.clone().requires_grad_()]
    assert not any(t.is_contiguous() for t in (*leaves[:3], strided.grad))
    y = call(case, leaves, backend)
    grads = torch.autograd.grad(y, leaves, strided.grad)
    check(dict(zip(NAMES, (y.detach(), *grads), strict=True)), truth(case), TOLERANCE[torch.float32])


@EACH_DROPOUT
@EACH_BACKEND
def test_lora_linear_gradient_of_a_sum(device: torch.device, backend: str, dropout: float) -> None:
    """``sum`` sends back one number as a matrix with strides of 0."""
    case = problem("nf4", (63, 50, 130, 8), torch.float32, device, backend=backend, dropout=dropout)
    case = replace(case, grad=torch.ones(1, 1, device=device).expand(63, 130))
    leaves = [t.clone().requires_grad_() for t in case.inputs()]
    y = call(case, leaves, backend)
    y.sum().backward()
    want = truth(case)
    check(dict(zip(NAMES, (y.detach(), *(t.grad for t in leaves)), strict=True)), want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 2), (0, 3)])
@EACH_WAY
@EACH_BACKEND
def test_lora_linear_gives_only_the_gradients_asked_for(
    device: torch.device, force_plan: Any, backend: str, how: str, dropout: float, wanted: tuple[int, ...]
) -> None:
    force_plan(how, how)
    case = problem("nf4", (20, 50, 33, 8), torch.float32, device, backend=backend, dropout=dropout)
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(case.inputs())]
    y = call(case, leaves, backend)
    y.backward(case.grad)
    want = truth(case)
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in wanted)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), want[NAMES[i + 1]], rtol=0, atol=1e-4)


@EACH_KIND
@EACH_WAY
@EACH_BACKEND
def test_lora_linear_second_backward_gives_the_same_gradients(
    device: torch.device, force_plan: Any, backend: str, how: str, dropout: float, kind: str
) -> None:
    """This holds after another call has used the same scratch memory."""
    force_plan(how, how)
    case = problem(kind, (63, 50, 130, 8), torch.float32, device, backend=backend, dropout=dropout)
    other = problem(kind, (7, 50, 130, 4), torch.float32, device)
    leaves = [t.clone().requires_grad_() for t in case.inputs()]
    y = call(case, leaves, backend)
    first = torch.autograd.grad(y, leaves, case.grad, retain_graph=True)
    run_op(other, backend, scale=-3.0, dropout=0.0)
    second = torch.autograd.grad(y, leaves, case.grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("loss", [lambda y: y.square().sum(), torch.sum], ids=["square", "sum"])
@EACH_DROPOUT
@EACH_BACKEND
def test_lora_linear_refuses_double_backward(
    device: torch.device, backend: str, dropout: float, loss: Callable[[Tensor], Tensor]
) -> None:
    """A gradient penalty does this. The gradient from ``sum`` needs no gradient itself, but the result depends on A."""
    case = problem("dense", (5, 10, 7, 2), torch.float32, device, backend=backend, dropout=dropout)
    leaves = [t.clone().requires_grad_() for t in case.inputs()]
    y = call(case, leaves, backend)
    (gradient,) = torch.autograd.grad(loss(y), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        (loss(y) + gradient.square().sum()).backward()


@pytest.mark.parametrize(
    ("how", "dropout", "kind"),
    [
        *((how, dropout, kind) for how, dropout in [("merged", 0.0), ("split", 0.0), ("split", 0.3)] for kind in KINDS),
        *(("library", 0.0, kind) for kind in KINDS if kind != "dense"),
    ],
)
@EACH_BACKEND
def test_lora_linear_does_not_change_its_inputs(
    device: torch.device, force_plan: Any, backend: str, how: str, dropout: float, kind: str
) -> None:
    force_plan(how, "merged" if how == "merged" else "split")
    case = problem(kind, (63, 128, 130, 8), torch.float16, device, backend=backend, dropout=dropout)
    leaves = [t.clone().requires_grad_() for t in case.inputs()]
    seed = torch.tensor(SEED)
    watched = [*leaves, case.grad, seed, *case.base.tensors()]
    before = [t.detach().clone() for t in watched]
    versions = [t._version for t in watched]
    y = call(case, leaves, backend, seed=seed)
    y.backward(case.grad)
    assert all(torch.equal(a, b) for a, b in zip(watched, before, strict=True))
    assert versions == [t._version for t in watched]


def _saved_bytes(case: Case, backend: str) -> int:
    """Bytes that autograd holds for backward, without the inputs."""
    leaves = [t.clone().requires_grad_() for t in case.inputs()]
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(case, leaves, backend)
    own = {t.untyped_storage().data_ptr() for t in leaves}
    assert leaves[0].untyped_storage().data_ptr() in held, "the measure must see x"
    return sum(size for pointer, size in held.items() if pointer not in own)


@EACH_KIND
@EACH_WAY
@EACH_BACKEND
def test_lora_linear_saves_only_s_and_the_mask(
    device: torch.device, force_plan: Any, backend: str, how: str, dropout: float, kind: str
) -> None:
    """It saves x A^T if the output needs it, and with dropout one bit per element of x."""
    M, K, R = 63, 130, 4
    force_plan(how, how)
    case = problem(kind, (M, K, 50, R), torch.float16, device, backend=backend, dropout=dropout)
    S_bytes, mask_bytes = 2 * M * R if how == "split" else 0, M * -(-K // 8) if dropout else 0
    assert _saved_bytes(case, backend) == S_bytes + mask_bytes


@pytest.mark.parametrize(("how", "wanted"), [("merged", 1), ("split", 2)])
def test_lora_linear_under_checkpointing_makes_s_once(
    device: torch.device, force_plan: Any, monkeypatch: pytest.MonkeyPatch, how: str, wanted: int
) -> None:
    """Activation checkpointing discards what the first forward saves. If the output needs no S, backward makes it."""
    force_plan(how, how)
    case = problem("nf4", (63, 50, 130, 8), torch.float32, device)
    made: list[Tensor] = []
    down = op._down
    monkeypatch.setattr(op, "_down", lambda x, A: (made.append(x), down(x, A))[1])
    leaves = [t.clone().requires_grad_() for t in case.inputs()]

    def layer(*tensors: Tensor) -> Tensor:
        return torch.tanh(call(case, tensors, "torch"))

    recomputed = torch.autograd.grad(checkpoint(layer, *leaves, use_reentrant=False), leaves, case.grad)
    assert len(made) == wanted
    plain = torch.autograd.grad(layer(*leaves), leaves, case.grad)
    assert all(torch.equal(a, b) for a, b in zip(recomputed, plain, strict=True))
    made.clear()
    with torch.no_grad():
        layer(*leaves)
    assert len(made) == wanted - 1, "without backward only what the output needs"


@EACH_KIND
@EACH_WAY
@EACH_BACKEND
def test_lora_linear_trains_after_inference_mode(
    device: torch.device, force_plan: Any, backend: str, how: str, dropout: float, kind: str
) -> None:
    """An evaluation under inference mode comes first. The memory that it allocated must serve training too."""
    force_plan(how, how)
    case = problem(kind, (63, 50, 130, 8), torch.float32, device, backend=backend, dropout=dropout)
    runtime.release_scratch()
    try:
        with torch.inference_mode():
            lora_linear(case.x, case.base, case.A, case.B, scale=SCALE, backend=backend)
        check(run_op(case, backend), truth(case), TOLERANCE[torch.float32])
    finally:
        runtime.release_scratch()
