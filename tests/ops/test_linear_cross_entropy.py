"""linear_cross_entropy against log_softmax in float64: values, gradients, shapes, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peftlab_kernels.linear_cross_entropy import linear_cross_entropy_reference
from peftlab_kernels.linear_cross_entropy import op as op_module
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftlab.ops import linear_cross_entropy

Budget = Callable[..., None]
VARIANTS = [
    pytest.param(False, None, 1.0, id="plain"),
    pytest.param(True, None, 1.0, id="bias"),
    pytest.param(False, 30.0, 1.0, id="softcap"),
    pytest.param(True, 5.0, 0.125, id="bias-softcap-scale"),
    pytest.param(True, None, 3.0, id="bias-scale"),
]
# Beyond the eager error: float32 rounds the softmax in another order; bfloat16 rounds the finished gradient once more.
SLACK = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def truth(h: Tensor, w: Tensor, t: Tensor, b: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    """-log softmax(cap(scale * (h w' + b)))[t], written out in float64."""
    logits = h.double() @ w.double().T
    if b is not None:
        logits = logits + b.double()
    logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return -torch.log_softmax(logits, dim=-1)[torch.arange(len(t)), t]


def inputs(
    N: int, H: int, V: int, *, dtype: torch.dtype, bias: bool, std: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    h = (torch.randn(N, H, generator=g) * std).to(dtype)
    w = torch.randn(V, H, generator=g).to(dtype)
    t = torch.randint(V, (N,), generator=g)
    return h, w, t, torch.randn(V, generator=g).to(dtype) if bias else None


def loss_and_grad(function: Callable[..., Tensor], h: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of a weighted sum of them, so that a wrong factor per token shows."""
    h = h.detach().clone().requires_grad_()
    loss = function(h, *args, **kwargs)
    factors = torch.linspace(0.5, 2.0, max(1, len(h)))[: len(h)].to(loss.dtype)
    (loss * factors).sum().backward()
    assert h.grad is not None
    return loss.detach(), h.grad


def check(budget: Budget, function: Callable[..., Tensor], case: Any, softcap: float | None, scale: float) -> None:
    h, w, t, b = case
    slack = SLACK[h.dtype]
    loss, grad = loss_and_grad(function, h, w, t, b, softcap=softcap, scale=scale)
    eager_loss, eager_grad = loss_and_grad(linear_cross_entropy_reference, h, w, t, b, softcap=softcap, scale=scale)
    true_loss, true_grad = loss_and_grad(truth, h.double(), w, t, b, softcap=softcap, scale=scale)
    assert loss.dtype == torch.float32
    assert grad.dtype == h.dtype
    budget(loss, eager_loss, true_loss, slack=slack)
    # The gradient is a weighted mean of rows of w less one of them: where they cancel, the rounding is that of the rows.
    largest = float(true_grad.abs().max()) if true_grad.numel() else 1.0
    rows = 2.0 * abs(scale) * float(w.abs().max())
    budget(grad, eager_grad, true_grad, slack=slack * max(1.0, rows / max(largest, 1e-30)))


@pytest.mark.parametrize(("bias", "softcap", "scale"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [1, 3, 37, 1000, None])
def test_agrees_with_the_formula(
    assert_within_budget: Budget,
    bias: bool,
    softcap: float | None,
    scale: float,
    dtype: torch.dtype,
    chunk: int | None,
) -> None:
    def op(*args: Any, **kwargs: Any) -> Tensor:
        return linear_cross_entropy(*args, chunk=chunk, **kwargs)

    check(assert_within_budget, op, inputs(37, 24, 131, dtype=dtype, bias=bias), softcap, scale)


@settings(max_examples=40, deadline=None)
@example(N=1, H=1, V=30, chunk=1, seed=3, variant=(False, None, 1.0))
@example(N=1, H=3, V=2, chunk=1, seed=0, variant=(False, None, 1.0))
@given(
    N=st.integers(0, 9),
    H=st.integers(1, 17),
    V=st.integers(1, 33),
    chunk=st.integers(1, 10),
    seed=st.integers(0, 99),
    variant=st.sampled_from([(False, None, 1.0), (True, 3.0, 0.5), (True, None, 2.0)]),
)
def test_agrees_at_odd_shapes(
    assert_within_budget: Budget,
    N: int,
    H: int,
    V: int,
    chunk: int,
    seed: int,
    variant: tuple[bool, float | None, float],
) -> None:
    bias, softcap, scale = variant
    case = inputs(N, H, V, dtype=torch.float32, bias=bias, seed=seed)
    check(
        assert_within_budget,
        lambda *args, **kwargs: linear_cross_entropy(*args, chunk=chunk, **kwargs),
        case,
        softcap,
        scale,
    )


@pytest.mark.parametrize("N", [0, 1])
def test_few_tokens(N: int) -> None:
    h, w, t, b = inputs(N, 8, 11, dtype=torch.float32, bias=True)
    loss, grad = loss_and_grad(linear_cross_entropy, h, w, t, b)
    assert loss.shape == (N,)
    assert grad.shape == (N, 8)
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_extreme_logits_stay_finite_and_right(
    assert_within_budget: Budget, dtype: torch.dtype, softcap: float | None
) -> None:
    h, w, t, b = inputs(9, 24, 50, dtype=dtype, bias=False, std=2000.0)
    assert float((h.float() @ w.float().T).abs().max()) > 1e4
    check(assert_within_budget, linear_cross_entropy, (h, w, t, b), softcap, 1.0)


def test_non_contiguous_inputs(assert_within_budget: Budget) -> None:
    h, w, t, _ = inputs(20, 24, 31, dtype=torch.float32, bias=False)
    wide = torch.stack([h, h * 0], dim=-1)[..., 0]
    transposed = w.T.contiguous().T
    assert not wide.is_contiguous() and not transposed.is_contiguous()
    check(assert_within_budget, linear_cross_entropy, (wide, transposed, t, None), None, 1.0)


def _halved(*args: Any, **kwargs: Any) -> Tensor:
    return 0.5 * linear_cross_entropy(*args, **kwargs)


def _without_scale(*args: Any, scale: float, **kwargs: Any) -> Tensor:
    return linear_cross_entropy(*args, **kwargs)


def _without_softcap(*args: Any, softcap: float | None, **kwargs: Any) -> Tensor:
    return linear_cross_entropy(*args, **kwargs)


def _without_bias(h: Tensor, w: Tensor, t: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
    return linear_cross_entropy(h, w, t, None, **kwargs)


def _gradient_without_target(h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The right losses with the softmax as gradient, the one-hot part forgotten."""
    right = linear_cross_entropy(h.detach(), *args, **kwargs)
    w, _, b = args
    logits = torch.nn.functional.linear(h, w, b).float()
    wrong = torch.logsumexp(logits, -1)
    return right + wrong - wrong.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fault", [_halved, _without_scale, _without_softcap, _without_bias, _gradient_without_target])
def test_deliberate_faults_are_caught(
    assert_within_budget: Budget, fault: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    case = inputs(37, 24, 131, dtype=dtype, bias=True)
    with pytest.raises(AssertionError, match="error"):
        check(assert_within_budget, fault, case, 5.0, 0.5)


def test_dropped_softcap_slope_is_caught(monkeypatch: pytest.MonkeyPatch, assert_within_budget: Budget) -> None:
    """The gradient written without the derivative of tanh."""

    case = inputs(37, 24, 131, dtype=torch.float32, bias=False)
    check(assert_within_budget, linear_cross_entropy, case, 5.0, 1.0)
    square = Tensor.square
    monkeypatch.setattr(Tensor, "square", lambda self: square(self) * 0)
    with pytest.raises(AssertionError, match="error"):
        check(assert_within_budget, linear_cross_entropy, case, 5.0, 1.0)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_gradient_equals_finite_differences(softcap: float | None) -> None:
    """Central differences of the float64 formula; the op's logits are float32, so its own differences would be noise."""
    h, w, t, b = inputs(3, 5, 7, dtype=torch.float32, bias=True)
    _, grad = loss_and_grad(linear_cross_entropy, h, w, t, b, softcap=softcap, scale=0.7)
    factors, step = torch.linspace(0.5, 2.0, 3).double(), 1e-5
    numeric = torch.empty_like(h, dtype=torch.float64)
    for i in range(3):
        for j in range(5):
            moved = [h.double() for _ in range(2)]
            moved[0][i, j] += step
            moved[1][i, j] -= step
            up, down = ((truth(x, w, t, b, softcap, 0.7) * factors).sum() for x in moved)
            numeric[i, j] = (up - down) / (2 * step)
    torch.testing.assert_close(grad.double(), numeric, rtol=1e-5, atol=1e-6)


def test_second_backward_gives_the_same_gradient() -> None:
    h, w, t, b = inputs(10, 8, 11, dtype=torch.float32, bias=True)
    h.requires_grad_()
    loss = linear_cross_entropy(h, w, t, b, softcap=3.0, scale=2.0, chunk=3).sum()
    loss.backward(retain_graph=True)
    first = h.grad.clone()
    h.grad = None
    loss.backward()
    assert torch.equal(h.grad, first)


def test_inputs_are_left_alone() -> None:
    case = inputs(10, 8, 11, dtype=torch.float32, bias=True)
    before = [x.clone() for x in case]
    loss_and_grad(linear_cross_entropy, *case, softcap=3.0, scale=2.0)
    assert all(torch.equal(a, b) for a, b in zip(case, before, strict=True))


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_trained_head_gets_its_gradient(trained: str) -> None:
    h, w, t, b = inputs(10, 8, 11, dtype=torch.float32, bias=True)
    (w if trained == "weight" else b).requires_grad_()
    h.requires_grad_()
    linear_cross_entropy(h, w, t, b, softcap=3.0, chunk=2).sum().backward()
    wd, bd, hd = (x.detach().double().requires_grad_() for x in (w, b, h))
    truth(hd, wd, t, bd, 3.0, 1.0).sum().backward()
    got, want = (w.grad, wd.grad) if trained == "weight" else (b.grad, bd.grad)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(h.grad.double(), hd.grad, rtol=1e-5, atol=1e-6)


def test_a_trained_head_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def reference(*args: Any, **kwargs: Any) -> Tensor:
        taken.append(1)
        return linear_cross_entropy_reference(*args, **kwargs)

    monkeypatch.setattr(op_module, "linear_cross_entropy_reference", reference)
    h, w, t, b = inputs(4, 8, 11, dtype=torch.float32, bias=True)
    linear_cross_entropy(h.requires_grad_(), w, t, b)
    assert not taken
    linear_cross_entropy(h, w.requires_grad_(), t, b)
    assert taken


def test_nothing_is_kept_for_backward_without_gradient() -> None:
    h, w, t, b = inputs(4, 8, 11, dtype=torch.float32, bias=True)
    assert not linear_cross_entropy(h, w, t, b).requires_grad


@pytest.mark.parametrize(
    ("hidden", "weight", "target", "found"),
    [
        ((4, 8), (11, 7), (4,), r"found \[4, 8\] and \[11, 7\]"),
        ((2, 4, 8), (11, 8), (4,), r"found \[2, 4, 8\]"),
        ((4, 8), (8,), (4,), r"and \[8\]"),
        ((4, 8), (11, 8), (5,), r"expected targets \[4\], found \[5\]"),
        ((4, 8), (11, 8), (4, 1), r"expected targets \[4\], found \[4, 1\]"),
    ],
)
def test_shapes_that_do_not_fit(hidden: Any, weight: Any, target: Any, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        linear_cross_entropy(torch.zeros(hidden), torch.zeros(weight), torch.zeros(target, dtype=torch.int64))


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


def _largest(function: Callable[..., Tensor], case: Any, **kwargs: Any) -> int:
    with LargestOutput() as largest:
        loss_and_grad(function, *case, softcap=3.0, scale=2.0, **kwargs)
    return largest.numel


def test_no_tensor_of_all_logits_is_made() -> None:
    N, H, V, chunk = 64, 4, 200, 8
    case = inputs(N, H, V, dtype=torch.float32, bias=True)
    assert _largest(linear_cross_entropy, case, chunk=chunk) == chunk * V
    assert _largest(linear_cross_entropy_reference, case) == N * V, (
        "the measure must see the full logits of the eager path"
    )


def test_default_chunk_bounds_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_module, "_CHUNK_BYTES", 4 * 200 * 5)
    case = inputs(64, 4, 200, dtype=torch.float32, bias=True)
    assert _largest(linear_cross_entropy, case) == 5 * 200
