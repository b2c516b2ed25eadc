"""Stored classes of the teacher: values and gradients, compared with sums over classes in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftlab.distillation import losses
from peftlab.distillation.losses import divergence, sparse_divergence
from peftlab.distillation.targets import TAILS, SparseTarget
from peftlab.errors import RecipeError


def truth(z: Tensor, target: SparseTarget, T: float) -> tuple[Tensor, Tensor]:
    """Losses and their gradients with respect to the student's logits, row by row and class by class, from the definition."""
    N, V = z.shape
    q = torch.exp((z.double() - z.double().amax(-1, keepdim=True)) / T)
    q = q / q.sum(-1, keepdim=True)
    loss, gradient = torch.zeros(N, dtype=torch.float64), torch.zeros(N, V, dtype=torch.float64)
    for n in range(N):
        w = torch.zeros(V, dtype=torch.float64)
        for i, p in zip(target.ids[n].tolist(), target.probs[n].tolist(), strict=True):
            w[i] += p
        stored = [i for i in range(V) if i in target.ids[n].tolist()]
        others = [i for i in range(V) if i not in stored]
        if target.tail == "renormalized":
            stored = [i for i in stored if w[i] > 0]
            sum_w, sum_q = sum(w[i] for i in stored), sum(q[n, i] for i in stored)
            for i in stored:
                p, own = w[i] / sum_w, q[n, i] / sum_q
                loss[n] += p * math.log(p / own)
                gradient[n, i] = (own - p) / T
            continue
        for i in stored:
            loss[n] += w[i] * math.log(w[i] / q[n, i]) if w[i] > 0 else 0.0
        gradient[n] = (w.sum() * q[n] - w) / T
        if target.tail == "bucket" and others:
            rest_p, rest_q = max(0.0, float(1 - w.sum())), sum(q[n, i] for i in others)
            loss[n] += rest_p * math.log(rest_p / rest_q) if rest_p > 0 else 0.0
            gradient[n] = (q[n] - w) / T
            for i in others:
                gradient[n, i] = (q[n, i] - rest_p * q[n, i] / rest_q) / T
            for i in stored:
                gradient[n, i] = (q[n, i] * (w.sum() + rest_p) - w[i]) / T
    return T**2 * loss, T**2 * gradient


def logits(N: int, V: int, *, seed: int = 0, std: float = 2.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, V, generator=g, dtype=torch.float64) * std, torch.randn(
        N, V, generator=g, dtype=torch.float64
    ) * std


def sampled(z: Tensor, draws: int, T: float, *, seed: int = 0) -> SparseTarget:
    """Weights count / draws of classes drawn with replacement. A repeated id at weight 0 fills up the rows."""
    p = (z / T).softmax(-1)
    drawn = torch.multinomial(p, draws, replacement=True, generator=torch.Generator().manual_seed(seed))
    ids = torch.zeros(len(z), draws, dtype=torch.int64)
    weights = torch.zeros(len(z), draws, dtype=torch.float64)
    for n, row in enumerate(drawn):
        unique, counts = row.unique(return_counts=True)
        ids[n] = unique[0]
        ids[n, : len(unique)], weights[n, : len(unique)] = unique, counts / draws
    return SparseTarget(ids, weights, T, "none")


def loss_and_grad(function: Callable[..., Tensor], z: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    leaf = z.detach().clone().requires_grad_()
    loss = function(leaf, *args, **kwargs)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def check(
    function: Callable[..., Tensor], tail: str, *, T: float = 2.0, k: int = 4, V: int = 11, seed: int = 0
) -> None:
    student, teacher = logits(5, V, seed=seed)
    target = (
        sampled(teacher, k, T, seed=seed)
        if tail == "none"
        else SparseTarget.from_logits(teacher, k, temperature=T, tail=tail)
    )
    loss, gradient = loss_and_grad(function, student, target, temperature=T)
    want, want_gradient = truth(student, target, T)
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-9, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), T=st.floats(0.5, 6.0), V=st.integers(1, 30), seed=st.integers(0, 999))
def test_sparse_divergence_equals_the_definition(data: st.DataObject, T: float, V: int, seed: int) -> None:
    tail = data.draw(st.sampled_from(TAILS))
    check(sparse_divergence, tail, T=T, k=data.draw(st.integers(1, V)), V=V, seed=seed)


@pytest.mark.parametrize("tail", TAILS)
def test_sparse_divergence_in_float32_equals_float64(tail: str) -> None:
    student, teacher = logits(6, 3000)
    exact = sampled(teacher, 50, 1.0) if tail == "none" else SparseTarget.from_logits(teacher, 50, tail=tail)
    target = SparseTarget(exact.ids, exact.probs.float(), 1.0, exact.tail)
    loss, gradient = loss_and_grad(sparse_divergence, student.float(), target, temperature=1.0)
    want, want_gradient = loss_and_grad(sparse_divergence, student, exact, temperature=1.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=1e-4, atol=1e-6)
    half, _ = loss_and_grad(sparse_divergence, student.bfloat16(), target, temperature=1.0)
    assert torch.equal(half, sparse_divergence(student.bfloat16().float(), target, temperature=1.0))


@settings(max_examples=40, deadline=None)
@given(
    V=st.integers(1, 40),
    T=st.floats(0.5, 8.0),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@pytest.mark.parametrize("tail", ["bucket", "renormalized"])
def test_sparse_divergence_with_all_classes_stored_is_dense(
    tail: str, V: int, T: float, seed: int, dtype: torch.dtype
) -> None:
    student, teacher = (z.to(dtype) for z in logits(3, V, seed=seed))
    target = SparseTarget.from_logits(teacher, V, temperature=T, tail=tail)
    loss, gradient = loss_and_grad(sparse_divergence, student, target, temperature=T)
    dense, dense_gradient = loss_and_grad(divergence, student, teacher, temperature=T)
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(loss, dense, rtol=rounding, atol=rounding * T**2)
    torch.testing.assert_close(gradient, dense_gradient, rtol=rounding, atol=rounding * T)


def test_sparse_divergence_with_all_classes_stored_and_absent_columns() -> None:
    student, teacher = logits(3, 8)
    for z in (student, teacher):
        z[:, 6:] = -math.inf
    target = SparseTarget.from_logits(teacher, 8)
    loss, gradient = loss_and_grad(sparse_divergence, student, target, temperature=1.0)
    dense, dense_gradient = loss_and_grad(divergence, student, teacher)
    torch.testing.assert_close(loss, dense)
    torch.testing.assert_close(gradient, dense_gradient)


@pytest.mark.parametrize("tail", ["bucket", "renormalized"])
@pytest.mark.parametrize("k", [1, 3, 11])
def test_sparse_divergence_of_a_perfect_student_is_0_without_gradient(tail: str, k: int) -> None:
    _, teacher = logits(4, 11)
    target = SparseTarget.from_logits(teacher, k, temperature=2.0, tail=tail)
    loss, gradient = loss_and_grad(sparse_divergence, teacher, target, temperature=2.0)
    assert loss.abs().max() < 1e-14
    assert gradient.abs().max() < 1e-14


def test_tail_bucket_never_exceeds_the_dense_divergence() -> None:
    """Merging classes loses information (log sum inequality), and the loss is never negative."""
    student, teacher = logits(20, 50)
    dense = divergence(student, teacher)
    before = torch.zeros(20, dtype=torch.float64)
    for k in (1, 5, 20, 49):
        loss = sparse_divergence(student, SparseTarget.from_logits(teacher, k), temperature=1.0)
        assert (loss >= before - 1e-12).all() and (loss <= dense + 1e-12).all()
        before = loss


def test_sampled_targets_are_unbiased() -> None:
    student, teacher = logits(1, 9, std=1.0)
    many = [sampled(teacher, 4, 1.0, seed=seed) for seed in range(600)]
    gradients = torch.stack([loss_and_grad(sparse_divergence, student, t, temperature=1.0)[1] for t in many])
    _, dense = loss_and_grad(divergence, student, teacher)
    spread = gradients.std(0) / math.sqrt(len(many))
    assert ((gradients.mean(0) - dense).abs() < 4 * spread + 1e-12).all()


def test_renormalized_classes_are_biased() -> None:
    """Probability that the student moves to classes not stored costs nothing. So the tail bucket is the default."""
    _, teacher = logits(1, 9)
    target = SparseTarget.from_logits(teacher, 3, tail="renormalized")
    student = teacher.clone()
    others = [i for i in range(9) if i not in target.ids[0].tolist()]
    student[0, others] += 5.0
    assert float(sparse_divergence(student, target, temperature=1.0)) < 1e-12
    assert float(divergence(student, teacher)) > 0.5
    assert float(sparse_divergence(student, SparseTarget.from_logits(teacher, 3), temperature=1.0)) > 0.5


def test_tail_bucket_rest_of_the_student_is_not_one_minus_a_sum() -> None:
    """A student's rest of 2e-9 has the logarithm -20. 1 - sum q is 0 in float32, so the loss is inf and its gradient NaN."""
    student = torch.tensor([[20.0, 0.0, 0.0, 0.0]])
    target = SparseTarget(torch.tensor([[0]]), torch.tensor([[0.9]]), 1.0, "bucket")
    rest = 3 * math.exp(-20) / (1 + 3 * math.exp(-20))
    want = 0.9 * math.log(0.9 / (1 - rest)) + 0.1 * math.log(0.1 / rest)
    loss, gradient = loss_and_grad(sparse_divergence, student, target, temperature=1.0)
    assert float(loss) == pytest.approx(want, rel=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([[0.1, -0.1 / 3, -0.1 / 3, -0.1 / 3]]))

    def by_subtraction(z: Tensor) -> Tensor:
        q = z.softmax(-1)[:, 0]
        return 0.9 * (math.log(0.9) - q.log()) + 0.1 * (math.log(0.1) - (1 - q).log())

    wrong, wrong_gradient = loss_and_grad(by_subtraction, student)
    assert float(wrong) == math.inf
    assert not torch.isfinite(wrong_gradient).all()


@pytest.mark.parametrize("k", [1, 3])
def test_sparse_target_rows_of_fewer_classes_are_filled_up(k: int) -> None:
    student, _ = logits(1, 7)
    for tail in TAILS:
        short = SparseTarget(torch.tensor([[5, 2]]), torch.tensor([[0.6, 0.3]], dtype=torch.float64), 1.0, tail)
        filled = SparseTarget(
            torch.tensor([[5, 2, *[5] * k]]), torch.tensor([[0.6, 0.3, *[0.0] * k]], dtype=torch.float64), 1.0, tail
        )
        for a, b in zip(
            *(loss_and_grad(sparse_divergence, student, t, temperature=1.0) for t in (short, filled)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_sparse_divergence_refuses_another_temperature() -> None:
    """The bug applies a temperature to log-probabilities of some classes that were normalised at another temperature."""
    student, teacher = logits(3, 9)
    target = SparseTarget.from_logits(teacher, 4, temperature=1.0)
    with pytest.raises(RecipeError, match="stored at temperature 1, but the loss needs 2"):
        sparse_divergence(student, target, temperature=2.0)
    again = (target.probs.log() / 2.0).exp()
    true = SparseTarget.from_logits(teacher, 4, temperature=2.0).probs
    assert (again - true).abs().max() > 0.05, "the error prevents this difference"


def _only_one_side_renormalized(z: Tensor, target: SparseTarget, *, temperature: float) -> Tensor:
    whole = SparseTarget(target.ids, target.probs / target.probs.sum(-1, keepdim=True), target.temperature, "none")
    return sparse_divergence(z, whole, temperature=temperature)


def _without_tail(z: Tensor, target: SparseTarget, *, temperature: float) -> Tensor:
    return sparse_divergence(
        z, SparseTarget(target.ids, target.probs, target.temperature, "none"), temperature=temperature
    )


def _student_softmax_over_stored(z: Tensor, target: SparseTarget, *, temperature: float) -> Tensor:
    return sparse_divergence(
        z, SparseTarget(target.ids, target.probs, target.temperature, "renormalized"), temperature=temperature
    )


def _clamped_at_0(z: Tensor, target: SparseTarget, *, temperature: float) -> Tensor:
    return _without_tail(z, target, temperature=temperature).clamp_min(0.0)


def _offset_by_one(z: Tensor, target: SparseTarget, *, temperature: float) -> Tensor:
    moved = SparseTarget(target.ids.roll(1, 0), target.probs.roll(1, 0), target.temperature, target.tail)
    return sparse_divergence(z, moved, temperature=temperature)


@pytest.mark.parametrize(
    "fault", [_only_one_side_renormalized, _without_tail, _student_softmax_over_stored, _clamped_at_0, _offset_by_one]
)
def test_sparse_divergence_comparison_catches_faults(fault: Callable[..., Tensor]) -> None:
    with pytest.raises(AssertionError):
        check(fault, "bucket")


def test_sparse_divergence_comparison_catches_a_dropped_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    check(sparse_divergence, "bucket")
    monkeypatch.setattr(losses, "_rest", lambda logits, log_sum, target: logits.sum() * 0)
    with pytest.raises(AssertionError):
        check(sparse_divergence, "bucket")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseTarget(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4)), r"found \[2, 3\] and \[2, 4\]"),
        (lambda: SparseTarget(torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3)), "found torch.int32"),
        (lambda: SparseTarget(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), 1.0, "x"), "found 'x'"),
        (lambda: SparseTarget(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), 0.0), "temperature above 0"),
        (lambda: SparseTarget.from_logits(torch.zeros(2, 3), 4), "keep 1 to 3 classes per token, found 4"),
        (lambda: SparseTarget.from_logits(torch.zeros(2, 3), 2, tail="none"), "sum to less than 1"),
        (
            lambda: sparse_divergence(
                torch.zeros(3, 5), SparseTarget.from_logits(torch.zeros(2, 5), 2), temperature=1.0
            ),
            "belongs to other positions",
        ),
    ],
)
def test_sparse_target_refuses_wrong_input(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
