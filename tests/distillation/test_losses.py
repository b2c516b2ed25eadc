"""Per-token losses on logits, compared with formulas in probabilities, in float64: values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftlab.distillation.losses import cross_entropy, divergence
from peftlab.ops import DIVERGENCES

Loss = Callable[..., Tensor]
# float32 sums of V terms of order 1. The rounding of z / T in float32 is multiplied by at most |log p - log q|.
RTOL, ATOL = 2e-5, 2e-6
CASES = [
    ("forward_kl", 0.5),
    ("reverse_kl", 0.5),
    ("skew_forward_kl", 0.1),
    ("skew_forward_kl", 0.0),
    ("skew_reverse_kl", 0.1),
    ("skew_reverse_kl", 0.0),
    ("jsd", 0.5),
    ("jsd", 0.1),
    ("jsd", 0.0),
    ("jsd", 1.0),
    ("tvd", 0.5),
]


def probabilities(z: Tensor, temperature: float) -> Tensor:
    e = torch.exp((z.double() - z.double().amax(-1, keepdim=True)) / temperature)
    return e / e.sum(-1, keepdim=True)


def truth(z_s: Tensor, z_t: Tensor, kind: str, temperature: float, share: float, t2: bool) -> tuple[Tensor, Tensor]:
    """Losses and their gradients with respect to the student's logits, both in closed form.

    With c = dD/dq the gradient is q (c - sum q c) / T.
    """
    q, p = probabilities(z_s, temperature), probabilities(z_t, temperature)
    if kind == "jsd" and share in (0.0, 1.0):
        kind = {0.0: "forward_kl", 1.0: "reverse_kl"}[share]
    if kind == "forward_kl":
        loss, c = (p * torch.log(p / q)).sum(-1), -p / q
    elif kind == "reverse_kl":
        loss, c = (q * torch.log(q / p)).sum(-1), torch.log(q / p)
    elif kind == "skew_forward_kl":
        m = share * p + (1 - share) * q
        loss, c = (p * torch.log(p / m)).sum(-1), -(1 - share) * p / m
    elif kind == "skew_reverse_kl":
        m = (1 - share) * p + share * q
        loss, c = (q * torch.log(q / m)).sum(-1), torch.log(q / m) - share * q / m
    elif kind == "jsd":
        m = share * p + (1 - share) * q
        loss = (share * p * torch.log(p / m) + (1 - share) * q * torch.log(q / m)).sum(-1)
        c = (1 - share) * torch.log(q / m)
    else:
        loss, c = (p - q).abs().sum(-1) / 2, torch.sign(q - p) / 2
    factor = temperature**2 if t2 else 1.0
    return factor * loss, factor * q * (c - (q * c).sum(-1, keepdim=True)) / temperature


def logits(
    N: int, V: int, *, seed: int = 0, std: float = 2.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(N, V, generator=g) * std).to(dtype), (torch.randn(N, V, generator=g) * std).to(dtype)


def loss_and_grad(function: Loss, student: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    loss = function(leaf, *args, **kwargs)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def check(
    function: Loss, kind: str, share: float, temperature: float, *, t2: bool = True, V: int = 37, **inputs: Any
) -> None:
    student, teacher = logits(5, V, **inputs)
    loss, gradient = loss_and_grad(
        function, student, teacher, kind=kind, share=share, temperature=temperature, scale_by_t2=t2
    )
    want, want_gradient = truth(student, teacher, kind, temperature, share, t2)
    exact = student.dtype == torch.float64
    rtol, atol = (1e-10, 1e-12) if exact else (RTOL, RTOL * float(want.abs().max()) if len(want) else 0.0)
    assert loss.shape == want.shape and loss.dtype == (torch.float64 if exact else torch.float32)
    torch.testing.assert_close(loss.double(), want, rtol=rtol, atol=atol)
    rounding = 2**-8 if student.dtype == torch.bfloat16 else 0.0
    scale = float(want_gradient.abs().max()) if want_gradient.numel() else 0.0
    # A gradient is a difference of probabilities, near 1 if one class has all mass, so it has at least their rounding.
    least = 8 * torch.finfo(torch.float64).eps * (temperature if t2 else 1 / temperature)
    torch.testing.assert_close(
        gradient.double(), want_gradient, rtol=rtol + rounding, atol=(1e-12 if exact else RTOL) * scale + least
    )


@pytest.mark.parametrize("t2", [True, False], ids=["T2", "no T2"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize(("kind", "share"), CASES)
def test_divergence_equals_the_formula(kind: str, share: float, temperature: float, t2: bool) -> None:
    check(divergence, kind, share, temperature, t2=t2)
    check(divergence, kind, share, temperature, t2=t2, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(CASES),
    temperature=st.floats(0.3, 10.0),
    V=st.integers(1, 60),
    seed=st.integers(0, 999),
    std=st.floats(0.1, 8.0),
    t2=st.booleans(),
)
def test_divergence_equals_the_formula_at_any_shape(
    case: tuple[str, float], temperature: float, V: int, seed: int, std: float, t2: bool
) -> None:
    check(divergence, *case, temperature, t2=t2, V=V, seed=seed, std=std, dtype=torch.float64)


@pytest.mark.parametrize(("kind", "share"), CASES)
def test_divergence_sums_16_bit_logits_in_float32(kind: str, share: float) -> None:
    """The bug is a bfloat16 log-softmax. The loss of bfloat16 logits equals that of the same numbers in float32."""
    student, teacher = logits(4, 500, dtype=torch.bfloat16)
    loss = divergence(student, teacher, kind=kind, share=share)
    assert torch.equal(loss, divergence(student.float(), teacher.float(), kind=kind, share=share))
    check(divergence, kind, share, 1.0, V=500, dtype=torch.bfloat16)


def _mean_over_classes(s: Tensor, t: Tensor, **settings: Any) -> Tensor:
    return divergence(s, t, **settings) / s.shape[-1]


def _batchmean_of_one_token(s: Tensor, t: Tensor, **settings: Any) -> Tensor:
    return divergence(s, t, **settings) / len(s)


def _only_the_student_at_t(s: Tensor, t: Tensor, *, temperature: float, **settings: Any) -> Tensor:
    return divergence(s, t * temperature, temperature=temperature, **settings)


def _only_the_teacher_at_t(s: Tensor, t: Tensor, *, temperature: float, **settings: Any) -> Tensor:
    return divergence(s * temperature, t, temperature=temperature, **settings)


def _without_t2(s: Tensor, t: Tensor, *, scale_by_t2: bool, **settings: Any) -> Tensor:
    return divergence(s, t, scale_by_t2=False, **settings)


def _factor_t(s: Tensor, t: Tensor, *, temperature: float, scale_by_t2: bool, **settings: Any) -> Tensor:
    return temperature * divergence(s, t, temperature=temperature, scale_by_t2=False, **settings)


def _temperature_ignored(s: Tensor, t: Tensor, *, temperature: float, **settings: Any) -> Tensor:
    return divergence(s, t, temperature=1.0, **settings)


def _sides_swapped(s: Tensor, t: Tensor, **settings: Any) -> Tensor:
    from peftlab.ops import token_divergence

    settings.pop("scale_by_t2")
    return token_divergence(t, s, **settings) * settings["temperature"] ** 2


def _bfloat16_softmax(s: Tensor, t: Tensor, *, temperature: float, **settings: Any) -> Tensor:
    log_q, log_p = ((z.bfloat16() / temperature).log_softmax(-1) for z in (s, t))
    return divergence(log_q * temperature, log_p * temperature, temperature=temperature, **settings).float()


FAULTS = [
    _mean_over_classes,
    _batchmean_of_one_token,
    _only_the_student_at_t,
    _only_the_teacher_at_t,
    _without_t2,
    _factor_t,
    _temperature_ignored,
    _sides_swapped,
    _bfloat16_softmax,
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("kind", "share"), [CASES[0], CASES[1], CASES[2], CASES[4], CASES[7]])
def test_divergence_comparison_catches_faults(fault: Loss, kind: str, share: float) -> None:
    with pytest.raises(AssertionError):
        check(fault, kind, share, 2.0)


def test_divergence_comparison_catches_a_missing_teacher_entropy() -> None:
    """A 'forward KL' that is a cross-entropy has the right gradient, but its value never reaches 0."""

    def soft_cross_entropy(s: Tensor, t: Tensor, *, temperature: float, **_: Any) -> Tensor:
        p = probabilities(t, temperature).float()
        return -(temperature**2) * (p * (s / temperature).log_softmax(-1)).sum(-1)

    with pytest.raises(AssertionError):
        check(soft_cross_entropy, "forward_kl", 0.5, 2.0)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_divergence_comparison_catches_jsd_ends_by_the_formula(share: float) -> None:
    """At both ends m is one of the two distributions, and the formula gives 0 for all models."""

    def by_the_formula(s: Tensor, t: Tensor, **settings: Any) -> Tensor:
        return 0.0 * divergence(s, t, **settings)

    with pytest.raises(AssertionError):
        check(by_the_formula, "jsd", share, 1.0)


@settings(max_examples=40, deadline=None)
@given(case=st.sampled_from(CASES), temperature=st.floats(0.3, 10.0), seed=st.integers(0, 99), shift=st.floats(-50, 50))
def test_divergence_of_a_perfect_student_has_no_loss_and_no_gradient(
    case: tuple[str, float], temperature: float, seed: int, shift: float
) -> None:
    student, _ = logits(3, 20, seed=seed, dtype=torch.float64)
    kind, share = case
    loss, gradient = loss_and_grad(
        divergence, student, student + shift, kind=kind, share=share, temperature=temperature
    )
    # Total variation grows with |p - q|, not with its square, and its gradient has the sign of rounding.
    assert loss.abs().max() <= (1e-12 if kind != "tvd" else 1e-12 * temperature**2)
    if kind != "tvd":
        assert gradient.abs().max() <= 1e-12


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "tvd"])
def test_divergence_of_a_perfect_student_is_0_to_the_bit_in_float32(kind: str) -> None:
    student, _ = logits(7, 1000)
    loss, gradient = loss_and_grad(divergence, student, student.clone(), kind=kind)
    assert not loss.any()
    assert gradient.abs().max() <= 1e-7


def test_divergence_gives_the_teacher_no_gradient() -> None:
    student, teacher = logits(3, 8)
    student.requires_grad_(), teacher.requires_grad_()
    for kind in DIVERGENCES:
        divergence(student, teacher, kind=kind).sum().backward()
    assert student.grad is not None and teacher.grad is None


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_ignores_classes_that_do_not_exist(kind: str) -> None:
    """Columns of -inf on both sides equal absent columns. Columns of zeros do not."""
    student, teacher = logits(4, 9, dtype=torch.float64)
    minus = torch.full((4, 3), -math.inf, dtype=torch.float64)
    want, want_gradient = loss_and_grad(divergence, student, teacher, kind=kind, share=0.3)
    wide = [torch.cat([z, minus], -1) for z in (student, teacher)]
    loss, gradient = loss_and_grad(divergence, *wide, kind=kind, share=0.3)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient[:, :9], want_gradient, rtol=1e-12, atol=1e-14)
    assert not gradient[:, 9:].any()
    zeros = [torch.cat([z, torch.zeros(4, 3, dtype=torch.float64)], -1) for z in (student, teacher)]
    assert (divergence(*zeros, kind=kind, share=0.3) - want).abs().max() > 1e-3


def test_cross_entropy_equals_torch_to_the_bit() -> None:
    student, _ = logits(6, 11, dtype=torch.bfloat16)
    targets = torch.arange(6)
    want = torch.nn.functional.cross_entropy(student.float(), targets, reduction="none")
    assert torch.equal(cross_entropy(student, targets), want)
    plain = -torch.log(probabilities(student, 1.0)[torch.arange(6), targets])
    torch.testing.assert_close(want.double(), plain, rtol=1e-6, atol=1e-6)


def test_divergence_of_no_rows_and_of_one_class() -> None:
    empty = torch.zeros(0, 5, requires_grad=True)
    divergence(empty, torch.zeros(0, 5)).sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 5)
    assert not divergence(torch.ones(2, 1), torch.zeros(2, 1)).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: divergence(torch.zeros(2, 5), torch.zeros(2, 6)), r"found \[2, 5\] and \[2, 6\]"),
        (lambda: divergence(torch.zeros(1, 2, 5), torch.zeros(1, 2, 5)), r"found \[1, 2, 5\]"),
        (lambda: divergence(torch.zeros(2, 5), torch.zeros(2, 5), kind="kl"), "found 'kl'"),
        (lambda: divergence(torch.zeros(2, 5), torch.zeros(2, 5), temperature=0.0), "temperature above 0"),
        (lambda: divergence(torch.zeros(2, 5), torch.zeros(2, 5), kind="jsd", share=1.1), "share in"),
        (lambda: cross_entropy(torch.zeros(2, 5), torch.zeros(3, dtype=torch.int64)), r"found \[2, 5\] and \[3\]"),
    ],
)
def test_losses_refuse_wrong_input(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
