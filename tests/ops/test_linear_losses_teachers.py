"""linear_kl with each kind of teacher: online, dense, stored classes with a tail, mixtures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peftlab_kernels import linear_kl as kl
from peftlab_kernels.heads import Head
from peftlab_kernels.linear_kl import DenseTeacher, OnlineTeacher, SparseTeacher, linear_kl
from peftlab_kernels.lora_linear import DenseWeight

from tests.ops.linear_losses_examples import (
    DEVICE,
    EACH_BACKEND,
    EACH_DIVERGENCE,
    NEEDS_TRITON,
    Budget,
    N,
    Taught,
    V,
    ce,
    check,
    distilled,
    gradients,
    kl_formula,
    make_case,
    make_teacher,
    sparse_formula,
)


@pytest.mark.parametrize("tail", kl.TAILS)
@pytest.mark.parametrize(("k", "temperature", "hard_weight"), [(5, 1.0, 0.0), (1, 2.0, 0.3), (V, 1.0, 0.3)])
@EACH_BACKEND
def test_linear_kl_of_sparse_teachers_equals_the_formula(
    assert_within_budget: Budget, tail: str, k: int, temperature: float, hard_weight: float, backend: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    case = make_case("dense+bias+softcap" if k == 5 else "dense+trained", dtype)
    taught = make_teacher(case, "sparse", temperature=temperature, k=k, tail=tail)
    options: dict[str, Any] = {"temperature": temperature, "hard_weight": hard_weight, "chunk": 5}
    check(
        assert_within_budget,
        case,
        lambda c: distilled(c, taught, backend=backend, **options).total,
        lambda c, d: kl_formula(c, d, taught, **options),
    )


@EACH_DIVERGENCE
@EACH_BACKEND
def test_linear_kl_of_a_perfect_student_is_zero(divergence: str, backend: str, dtype: torch.dtype) -> None:
    case = make_case("dense+softcap", dtype)
    taught = Taught(OnlineTeacher(case.hidden, case.head), case.logits(torch.float64))
    for share in (0.3, 0.0, *([1.0] if divergence == "jsd" else [])):
        options = {"divergence": divergence, "share": share, "temperature": 2.0, "backend": backend}
        grads = gradients(case, lambda c, o=options: distilled(c, taught, **o).total)
        assert float(grads["total"].abs()) <= 2e-6 * N
        assert float(grads["hidden"].abs().max()) <= 2e-6


@EACH_BACKEND
def test_linear_kl_with_hard_weight_one_equals_cross_entropy(backend: str, dtype: torch.dtype) -> None:
    case = make_case("dense+trained+softcap", dtype)
    one = gradients(case, lambda c: distilled(c, make_teacher(c, "online"), hard_weight=1, backend=backend).total)
    other = gradients(case, lambda c: ce(c, backend=backend).total)
    assert all(torch.equal(one[name], other[name]) for name in other)


@EACH_BACKEND
def test_linear_kl_with_every_class_stored_equals_a_dense_teacher(backend: str, dtype: torch.dtype) -> None:
    case = make_case("dense", dtype)
    dense = gradients(case, lambda c: distilled(c, make_teacher(c, "dense"), backend=backend).total)
    for tail in kl.TAILS:
        taught = make_teacher(case, "sparse", k=V, tail=tail)
        grads = gradients(case, lambda c, t=taught: distilled(c, t, backend=backend).total)
        for name, want in dense.items():
            slack = {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(dtype, 1e-5)  # the dense logits are rounded
            torch.testing.assert_close(grads[name], want, rtol=slack, atol=slack * float(want.abs().max()))


@pytest.mark.parametrize("tail", kl.TAILS)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
def test_linear_kl_ignores_filler_classes_of_probability_zero(tail: str, backend: str) -> None:
    """Sampling gives rows of fewer classes. The rest of the row repeats a class that it has already."""
    case = make_case("dense+softcap", torch.float32)
    teacher = make_teacher(case, "sparse", k=4, tail=tail).teacher
    filled = SparseTeacher(
        torch.cat([teacher.ids, teacher.ids[:, 1:2], teacher.ids[:, :1]], 1),
        torch.cat([teacher.probs, torch.zeros(N, 2, device=DEVICE)], 1),
        tail,
    )
    want, grads = (
        gradients(case, lambda c, t=t: distilled(c, Taught(t, t.probs), hard_weight=0.2, backend=backend).total)
        for t in (teacher, filled)
    )
    for name in want:
        torch.testing.assert_close(grads[name], want[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
def test_linear_kl_tail_of_a_confident_student_is_precise(backend: str) -> None:
    """The student's tail mass is about 1e-9. In float32, 1 minus the mass of the stored classes would be 0."""
    case = make_case("dense", torch.float32, n=4)
    logits = torch.full((4, V), -25.0)
    logits[:, :3] = torch.tensor([3.0, 2.0, 1.0])
    head = Head(DenseWeight(logits[0][:, None].to(DEVICE)))
    case = replace(case, head=head, W=logits[0][:, None].double().to(DEVICE), hidden=torch.ones(4, 1, device=DEVICE))
    probs = torch.tensor([[0.5, 0.3, 0.1]]).expand(4, 3).to(DEVICE)
    ids = torch.tensor([[0, 1, 2]]).expand(4, 3).to(DEVICE)
    taught = Taught(SparseTeacher(ids, probs, "bucket"), logits.double())
    soft = distilled(case, taught, backend=backend).soft
    want = sparse_formula(case.logits(torch.float64).softmax(-1), taught.teacher)
    torch.testing.assert_close(soft.double(), want, rtol=1e-6, atol=0)
    short, mass = (1 - case.logits(d).softmax(-1)[0, :3].sum() for d in (torch.float32, torch.float64))
    assert abs(float(short / mass) - 1) > 0.5, "the case must need it"


def test_linear_kl_gives_the_teacher_no_gradient() -> None:
    case = make_case("dense", torch.float32)
    taught = make_teacher(case, "dense")
    taught.teacher.logits.requires_grad_()
    case.hidden.requires_grad_()
    distilled(case, taught).total.backward()
    assert taught.teacher.logits.grad is None
    assert case.hidden.grad is not None


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("divergence", "share", "allowed"),
    [("jsd", 0.1, 2e-7), ("jsd", 0.5, 3e-7), ("skew_forward_kl", 0.5, 5e-7), ("skew_reverse_kl", 0.5, 5e-7)],
)
def test_linear_kl_mixtures_are_as_exact_as_with_a_logarithm(divergence: str, share: float, allowed: float) -> None:
    """Two classes at every ratio of the probabilities, including equal ones. Exchanged, they give the same values.

    ``tl.log`` in place of the polynomial errs by 1.7e-7, 2.7e-7 and 4.3e-7; two degrees less would add 1e-6.
    """
    steps = torch.linspace(-12, 12, 25, dtype=torch.float64)
    student, teacher = (
        torch.stack([t.flatten(), torch.zeros(325, dtype=torch.float64)], 1)
        for t in torch.meshgrid(steps[12:], steps, indexing="ij")
    )
    head = Head(DenseWeight(torch.eye(2, device=DEVICE)))
    soft = linear_kl(
        student.float().to(DEVICE), head, DenseTeacher(teacher.float().to(DEVICE)), divergence=divergence, share=share,
        backend="triton",
    ).soft  # fmt: skip
    want = kl.token_divergence(student, teacher, kind=divergence, share=share)
    assert float((soft.cpu().double() - want).abs().max()) < allowed
    assert float(soft.view(13, 25).diagonal(12).abs().max()) < 1e-7, "a perfect student"
