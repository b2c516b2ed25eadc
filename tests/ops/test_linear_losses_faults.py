"""Deliberate faults in linear_cross_entropy and linear_kl turn their checks red."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peftlab_kernels import heads
from peftlab_kernels.linear_cross_entropy import op as ce_op
from peftlab_kernels.linear_kl import DenseTeacher, SparseTeacher
from peftlab_kernels.linear_kl import op as kl_op
from torch import Tensor

from tests.ops.linear_losses_examples import (
    EACH_BACKEND,
    EACH_DIVERGENCE,
    Budget,
    Case,
    N,
    R,
    Taught,
    ce,
    ce_formula,
    check,
    distilled,
    kl_formula,
    make_case,
    make_teacher,
)


def assert_caught(
    budget: Budget, case: Case, op: Callable[[Case], Tensor], formula: Callable[[Case, torch.dtype | None], Tensor]
) -> None:
    with pytest.raises(AssertionError, match="error"):
        check(budget, case, op, formula)


FAULTS: dict[str, Callable[[Case, Taught, dict[str, Any]], Any]] = {
    "scale dropped": lambda c, t, o: distilled(replace(c, head=replace(c.head, scale=1.0)), t, **o),
    "softcap dropped": lambda c, t, o: distilled(replace(c, head=replace(c.head, softcap=None)), t, **o),
    "weights dropped": lambda c, t, o: distilled(replace(c, weights=None), t, **o),
    "no T^2": lambda c, t, o: distilled(c, t, scale_by_t2=False, **o),
    "T on the student alone": lambda c, t, o: distilled(
        c, replace(t, teacher=replace(t.teacher, head=replace(t.teacher.head, scale=0.8 * o["temperature"]))), **o
    ),
    "reversed": lambda c, t, o: distilled(c, t, **{**o, "divergence": "reverse_kl"}),
    "targets shifted": lambda c, t, o: distilled(replace(c, target=c.target.roll(1)), t, **o),
    "teacher shifted": lambda c, t, o: distilled(
        c, replace(t, teacher=replace(t.teacher, hidden=t.teacher.hidden.roll(1, 0))), **o
    ),
    "padding counted": lambda c, t, o: distilled(
        replace(c, head=replace(c.head, num_classes=None)),
        replace(t, teacher=replace(t.teacher, head=replace(t.teacher.head, num_classes=None))),
        **o,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@EACH_BACKEND
def test_linear_losses_deliberate_faults_are_caught(
    assert_within_budget: Budget, fault: str, backend: str, dtype: torch.dtype
) -> None:
    case = make_case("dense+softcap+padded", dtype)
    taught = make_teacher(case, "online")
    options: dict[str, Any] = {"temperature": 2.0, "hard_weight": 0.4}

    def formula(c: Case, d: torch.dtype | None) -> Tensor:
        return kl_formula(c, d, taught, **options)

    assert_caught(
        assert_within_budget,
        case,
        lambda c: FAULTS[fault](c, taught, {**options, "backend": backend}).total,
        formula,
    )


CE_FAULTS: dict[str, Callable[[Case], Case]] = {
    "targets shifted": lambda c: replace(c, target=c.target.roll(1)),
    "softcap dropped": lambda c: replace(c, head=replace(c.head, softcap=None)),
    "weights dropped": lambda c: replace(c, weights=None),
    "padding counted": lambda c: replace(c, head=replace(c.head, num_classes=None)),
}


@pytest.mark.parametrize("fault", CE_FAULTS)
@EACH_BACKEND
def test_linear_cross_entropy_deliberate_faults_are_caught(
    assert_within_budget: Budget, fault: str, backend: str, dtype: torch.dtype
) -> None:
    case = make_case("dense+softcap+padded", dtype)
    assert_caught(assert_within_budget, case, lambda c: ce(CE_FAULTS[fault](c), backend=backend).total, ce_formula)


@EACH_DIVERGENCE
@EACH_BACKEND
def test_linear_losses_shifted_teacher_is_caught_in_every_divergence(
    assert_within_budget: Budget, divergence: str, backend: str, dtype: torch.dtype
) -> None:
    case = make_case("dense+softcap", dtype)
    taught = make_teacher(case, "dense")
    shifted = replace(taught, teacher=DenseTeacher(taught.teacher.logits.roll(1, 0)))
    options: dict[str, Any] = {"divergence": divergence, "share": 0.3}
    assert_caught(
        assert_within_budget,
        case,
        lambda c: distilled(c, shifted, backend=backend, **options).total,
        lambda c, d: kl_formula(c, d, taught, **options),
    )


SPARSE_FAULTS: dict[str, Callable[[SparseTeacher], SparseTeacher]] = {
    "tail dropped": lambda t: replace(t, tail="renormalized"),
    "tail of another kind": lambda t: replace(t, tail="none"),
    "classes shifted": lambda t: replace(t, ids=t.ids.roll(1, 1)),
    "one class lost": lambda t: replace(t, ids=t.ids[:, :-1], probs=t.probs[:, :-1]),
}


@pytest.mark.parametrize("fault", SPARSE_FAULTS)
@EACH_BACKEND
def test_linear_losses_deliberate_faults_of_stored_classes_are_caught(
    assert_within_budget: Budget, fault: str, backend: str, dtype: torch.dtype
) -> None:
    case = make_case("dense+softcap", dtype)
    taught = make_teacher(case, "sparse")
    wrong = replace(taught, teacher=SPARSE_FAULTS[fault](taught.teacher))
    assert_caught(
        assert_within_budget,
        case,
        lambda c: distilled(c, wrong, backend=backend).total,
        lambda c, d: kl_formula(c, d, taught),
    )


def _gradient_without_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ce_op.write_gradient
    for module in (ce_op, kl_op):
        monkeypatch.setattr(module, "write_gradient", lambda out, dz, slope, head: right(out, dz, None, head))


def _adapter_gradient_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    right = heads.HeadPass.gradients
    monkeypatch.setattr(
        heads.HeadPass, "gradients", lambda self, head: [g * (g.shape[-1] != R) for g in right(self, head)]
    )


def _last_chunk_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    right = heads.HeadPass.backward
    monkeypatch.setattr(
        heads.HeadPass, "backward", lambda self, part, dz: right(self, part, dz if part.stop < N else dz * 0)
    )


@pytest.mark.parametrize("fault", [_gradient_without_slope, _adapter_gradient_lost, _last_chunk_lost])
def test_linear_losses_deliberate_faults_inside_are_caught(
    assert_within_budget: Budget, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    case = make_case("dense+lora+softcap", torch.float32)
    check(assert_within_budget, case, lambda c: ce(c, chunk=5).total, ce_formula)
    fault(monkeypatch)
    assert_caught(assert_within_budget, case, lambda c: ce(c, chunk=5).total, ce_formula)
