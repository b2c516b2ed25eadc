"""linear_cross_entropy and linear_kl in autograd: frozen and tied heads, second backward, rounding, compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peftlab_kernels import heads
from peftlab_kernels.heads import Head
from peftlab_kernels.linear_cross_entropy import linear_cross_entropy
from peftlab_kernels.linear_cross_entropy import op as ce_op
from peftlab_kernels.linear_kl import DenseTeacher, linear_kl
from peftlab_kernels.linear_kl import op as kl_op
from peftlab_kernels.lora_linear import DenseWeight
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.ops.linear_losses_examples import DEVICE, Case, H, N, V, ce, distilled, gradients, make_case, make_teacher


def test_linear_losses_of_a_frozen_head_compute_only_the_gradient_of_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    right = heads.HeadPass.__init__
    monkeypatch.setattr(
        heads.HeadPass,
        "__init__",
        lambda self, *args, **kwargs: (passes.append(self), right(self, *args, **kwargs))[0] and None,
    )
    case = make_case("dense+bias", torch.float32)
    case.hidden.requires_grad_()
    ce(replace(case)).total.backward()
    (walk,) = passes
    assert walk.dH_NH is not None
    assert walk.dW_VH is walk.dbias_V is walk.dA_RH is walk.dB_VR is None


def test_linear_losses_without_gradient_compute_no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("dense+trained", torch.float32)
    case.head.weight.weight.requires_grad_()
    try:
        monkeypatch.setattr(heads.HeadPass, "backward", None)
        with torch.no_grad():
            assert not ce(case).total.requires_grad
            assert not distilled(case, make_teacher(case, "online")).total.requires_grad
    finally:
        case.head.weight.weight.requires_grad_(False)


@pytest.mark.parametrize("way", ["cross-entropy", "online"])
def test_linear_losses_add_up_both_uses_of_a_tied_head(way: str) -> None:
    """Both uses of one matrix add up, also over two micro-batches."""
    g = torch.Generator().manual_seed(0)
    E = torch.randn(V, H, generator=g, dtype=torch.float64).to(DEVICE).requires_grad_()
    ids, target = (torch.randint(V, (8,), generator=g).to(DEVICE) for _ in range(2))
    teacher = torch.randn(8, V, generator=g, dtype=torch.float64).to(DEVICE)

    def total(part: slice) -> Tensor:
        hidden, head = E[ids[part]].tanh(), Head(DenseWeight(E))
        if way == "online":
            return linear_kl(hidden, head, DenseTeacher(teacher[part])).total
        return linear_cross_entropy(hidden, head, target[part]).total

    logits = E[ids].tanh() @ E.T
    want = F.cross_entropy(logits, target, reduction="sum")
    if way == "online":
        log_p = teacher.log_softmax(-1)
        want = (log_p.exp() * (log_p - logits.log_softmax(-1))).sum()
    (expected,) = torch.autograd.grad(want, E)
    for part in (slice(0, 5), slice(5, 8)):
        total(part).backward()
    torch.testing.assert_close(E.grad, expected, rtol=1e-12, atol=1e-12)


def test_linear_losses_second_backward_is_equal_and_second_derivatives_refused() -> None:
    case = make_case("dense+softcap", torch.float32)
    case.hidden.requires_grad_()
    for loss in (ce(case).total, distilled(case, make_teacher(case, "online")).total):
        (first,) = torch.autograd.grad(loss, case.hidden, retain_graph=True)
        (second,) = torch.autograd.grad(loss, case.hidden, retain_graph=True)
        assert torch.equal(first, second)
        (first,) = torch.autograd.grad(loss, case.hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(first.square().sum(), case.hidden)


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("way", ["cross-entropy", "online"])
def test_linear_losses_do_not_round_the_incoming_gradient_to_16_bits(way: str, chunk: int | None) -> None:
    """A third, rounded to bfloat16, is off by 2 in a thousand in every element."""
    case = make_case("dense+trained", torch.bfloat16)

    def total(c: Case) -> Tensor:
        return (
            ce(c, chunk=chunk).total
            if way == "cross-entropy"
            else distilled(c, make_teacher(c, way), chunk=chunk).total
        )

    whole, third = (gradients(case, lambda c, factor=factor: factor * total(c)) for factor in (1.0, 1 / 3))
    for name, gradient in whole.items():
        ratio = float((third[name].double() * gradient.double()).sum() / gradient.double().square().sum())
        assert ratio == pytest.approx(1 / 3, rel=5e-4), name


def test_linear_losses_with_loss_scale_do_not_overflow_float16() -> None:
    """Hidden states of 500 times 65536 exceed float16. The gradient of the weight does not."""
    g = torch.Generator().manual_seed(0)
    hidden, target = (
        (500 * torch.randn(N, H, generator=g)).half().to(DEVICE),
        torch.randint(V, (N,), generator=g).to(DEVICE),
    )
    weight = (1e-4 * torch.randn(V, H, generator=g)).to(DEVICE).requires_grad_()
    (grad,) = torch.autograd.grad(
        65536.0 / N * linear_cross_entropy(hidden, Head(DenseWeight(weight)), target).total, weight
    )
    wide = weight.detach().double().requires_grad_()
    logits = F.linear(hidden.double(), weight.detach().half().double() + 0 * wide + wide - wide.detach())
    (want,) = torch.autograd.grad(65536.0 / N * F.cross_entropy(logits, target, reduction="sum"), wide)
    assert torch.isfinite(grad).all()
    assert float((grad.double() - want).norm() / want.norm()) < 5e-3


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_losses_of_a_trained_head_use_products_that_cuda_supports(
    monkeypatch: pytest.MonkeyPatch, hidden_dtype: torch.dtype, weight_dtype: torch.dtype, chunk: int | None
) -> None:
    """For every pair of types, CUDA's mm writes the type of its factors, or float32 for 16 bits. The gradient is as
    exact as its type allows."""
    asked: list[tuple[torch.dtype, torch.dtype]] = []
    right = heads.product
    monkeypatch.setattr(
        heads, "product", lambda one, other, **o: (asked.append((one.dtype, o["dtype"])), right(one, other, **o))[1]
    )
    g = torch.Generator().manual_seed(0)
    hidden, target = torch.randn(N, H, generator=g).to(hidden_dtype), torch.randint(V, (N,), generator=g)
    weight = (torch.randn(V, H, generator=g) / H**0.5).to(weight_dtype).requires_grad_()
    (grad,) = torch.autograd.grad(
        0.3 * linear_cross_entropy(hidden, Head(DenseWeight(weight)), target, chunk=chunk).total, weight
    )
    assert grad.dtype == weight_dtype and asked
    for factors, product in asked:
        assert product == factors or (product == torch.float32 and factors.itemsize == 2), (factors, product)
    wide = weight.detach().to(hidden_dtype).double().requires_grad_()
    (want,) = torch.autograd.grad(0.3 * F.cross_entropy(F.linear(hidden.double(), wide), target, reduction="sum"), wide)
    coarsest = max((hidden_dtype, weight_dtype), key=lambda dtype: torch.finfo(dtype).eps)
    assert float((grad.double() - want).norm() / want.norm()) < 2 * torch.finfo(coarsest).eps


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_losses_trained_head_with_create_graph(dtype: torch.dtype, chunk: int | None) -> None:
    """The first derivative does not change with create_graph. The second is refused."""
    case = make_case("dense+trained", dtype)
    hidden, weight = case.hidden.clone().requires_grad_(), case.head.weight.weight.detach().clone().requires_grad_()
    head = replace(case.head, weight=DenseWeight(weight))

    def total() -> Tensor:
        return 0.3 * linear_cross_entropy(hidden, head, case.target, chunk=chunk).total

    want = torch.autograd.grad(total(), (hidden, weight))
    grads = torch.autograd.grad(total(), (hidden, weight), create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(grads[1].float().square().sum(), hidden)


def _options(case: Case) -> list[tuple[Any, tuple[Any, ...]]]:
    """Each operator with the arguments of a call."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    def recorder(op: Any) -> Callable[..., Any]:
        return lambda *args: (calls.append((op, args)), op(*args))[1]

    ce_right, kl_right = ce_op.linear_cross_entropy_op, kl_op.linear_kl_op
    try:
        ce_op.linear_cross_entropy_op, kl_op.linear_kl_op = recorder(ce_right), recorder(kl_right)
        ce(case, chunk=5)
        for way in ("online", "dense", "sparse"):
            distilled(case, make_teacher(case, way), hard_weight=0.3, chunk=5)
    finally:
        ce_op.linear_cross_entropy_op, kl_op.linear_kl_op = ce_right, kl_right
    return calls


@pytest.mark.parametrize("name", ["dense+trained+bias+lora+dropped+softcap", "nf4+lora"])
def test_linear_losses_pass_opcheck(name: str) -> None:
    case = make_case(name, torch.float32)
    case = case.with_leaves({k: t.detach().clone().requires_grad_() for k, t in case.leaves().items()})
    calls = _options(case)
    assert len(calls) == 4
    for op, args in calls:
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("name", ["dense+softcap", "dense+trained+bias", "nf4+lora"])
def test_linear_losses_compile_into_one_graph(name: str) -> None:
    case = make_case(name, torch.float32)
    taught = make_teacher(case, "online")

    def both(c: Case) -> Tensor:
        return ce(c).total + distilled(c, taught, hard_weight=0.3, temperature=2.0).total

    leaves = {k: t.detach().clone().requires_grad_() for k, t in case.leaves().items()}
    want = torch.autograd.grad(both(case.with_leaves(leaves)), list(leaves.values()))
    compiled = torch.compile(
        lambda *ts: both(case.with_leaves(dict(zip(leaves, ts, strict=True)))), fullgraph=True, backend="aot_eager"
    )
    grads = torch.autograd.grad(compiled(*leaves.values()), list(leaves.values()))
    for got, wanted in zip(grads, want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
    torch._dynamo.reset()


def test_linear_losses_under_checkpointing_have_the_same_gradient() -> None:
    case = make_case("dense+softcap", torch.float32)
    case.hidden.requires_grad_()
    (want,) = torch.autograd.grad(ce(case).total, case.hidden)
    (recomputed,) = torch.autograd.grad(
        checkpoint(lambda h: ce(replace(case, hidden=h)).total, case.hidden, use_reentrant=False), case.hidden
    )
    assert torch.equal(recomputed, want)


def test_linear_losses_do_not_change_under_autocast() -> None:
    case = make_case("dense+lora", torch.float32)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = gradients(case, lambda c: ce(c).total)
    outside = gradients(case, lambda c: ce(c).total)
    assert all(torch.equal(inside[name], outside[name]) for name in outside)
