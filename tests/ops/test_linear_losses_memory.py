"""Memory of linear_cross_entropy and linear_kl: logits of one chunk, one gradient of a trained head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peftlab_kernels.heads import Head
from peftlab_kernels.linear_cross_entropy import linear_cross_entropy
from peftlab_kernels.linear_cross_entropy import op as ce_op
from peftlab_kernels.linear_kl import OnlineTeacher, linear_kl
from peftlab_kernels.linear_kl import op as kl_op
from peftlab_kernels.lora_linear import DenseWeight
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.linear_losses_examples import ON_CPU, H, V, ce, distilled, make_case, make_teacher


class LargestOutput(TorchDispatchMode):
    """Number of elements of the largest tensor any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_linear_losses_make_no_tensor_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test looks inside the operators, because from outside each is one call."""
    for module in (ce_op, kl_op):
        name = "linear_cross_entropy_op" if module is ce_op else "linear_kl_op"
        monkeypatch.setattr(module, name, torch.no_grad()(getattr(module, name)._init_fn))
    case = make_case("dense", torch.float32, n=64)
    case.hidden.requires_grad_()
    taught = make_teacher(case, "online")
    for total in (ce, lambda c, **o: distilled(c, taught, **o)):
        with LargestOutput() as largest:
            total(case, chunk=8)
        assert largest.numel == max(8 * V, V * H)
        with LargestOutput() as largest:
            total(case, chunk=64)
        assert largest.numel == 64 * V, "the measure must see the logits"


def _large_allocations(step: Callable[[], Any], numel: int) -> list[int]:
    """Bytes of each allocation of at least ``numel`` float32, in order; a negative number where it is freed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return [e.nbytes() for e in events if e.name() == "[memory]" and abs(e.nbytes()) >= 4 * numel]


def _trained_loss(way: str, dtype: torch.dtype, *, chunk: int | None) -> tuple[Tensor, Callable[[], Tensor]]:
    """The weight of a trained head, large compared with the logits of its 8 tokens, and their loss."""
    classes, width = 4096, 64
    weight = torch.randn(classes, width).to(dtype).requires_grad_()
    head = Head(DenseWeight(weight))
    hidden, target = torch.randn(8, width).to(dtype), torch.randint(classes, (8,))
    teacher = OnlineTeacher(torch.randn(8, 16).to(dtype), Head(DenseWeight(torch.randn(classes, 16).to(dtype))))

    def total() -> Tensor:
        if way == "online":
            return linear_kl(hidden, head, teacher, chunk=chunk).total
        return linear_cross_entropy(hidden, head, target, chunk=chunk).total

    return weight, total


@ON_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["cross-entropy", "online"])
def test_linear_losses_hold_the_gradient_of_a_trained_head_once(way: str, dtype: torch.dtype) -> None:
    """In float32 there is one allocation: no zeros for the operator's outputs, no product with the incoming gradient,
    none per chunk."""
    weight, total = _trained_loss(way, dtype, chunk=2)
    (expected,) = torch.autograd.grad(total(), weight)
    grads: list[Tensor] = []
    sizes = _large_allocations(lambda: grads.extend(torch.autograd.grad(0.5 * total(), weight)), weight.numel())
    size = 4 * weight.numel()
    assert sizes == ([size] if dtype == torch.float32 else [size, -size])
    assert torch.equal(grads[0], 0.5 * expected)
    loss = total()
    kept = torch.autograd.grad(loss, weight, retain_graph=True)[0].clone()
    assert torch.equal(kept, torch.autograd.grad(2.0 * loss, weight)[0] / 2)


@ON_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["cross-entropy", "online"])
def test_linear_losses_of_one_chunk_make_the_head_gradient_in_one_product(way: str, dtype: torch.dtype) -> None:
    """Backward makes it in the type of the weight, without a sum over chunks and without a later product."""
    weight, total = _trained_loss(way, dtype, chunk=None)
    held = weight.numel() * dtype.itemsize
    loss: list[Tensor] = []
    assert _large_allocations(lambda: loss.append(total()), held // 4) == []
    grads: list[Tensor] = []
    sizes = _large_allocations(lambda: grads.extend(torch.autograd.grad(0.5 * loss[0], weight)), held // 4)
    assert sizes == [held] and grads[0].dtype == dtype
    (whole,) = torch.autograd.grad(total(), weight)
    assert torch.equal(grads[0], 0.5 * whole)
    again = total()
    kept = torch.autograd.grad(again, weight, retain_graph=True)[0].clone()
    assert torch.equal(kept, torch.autograd.grad(again, weight)[0])


@ON_CPU
def test_linear_losses_hold_the_logits_of_one_chunk_at_a_time() -> None:
    classes, width, chunk = 8192, 8, 4
    head = Head(DenseWeight(torch.randn(classes, width)))
    hidden = torch.randn(16, width).requires_grad_()
    sizes = _large_allocations(
        lambda: linear_cross_entropy(hidden, head, torch.randint(classes, (16,)), chunk=chunk), chunk * classes
    )
    held = torch.tensor(sizes).cumsum(0)
    assert len(sizes) >= 8 and held.max() == 4 * chunk * classes
