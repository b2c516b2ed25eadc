"""The gradient doctor, compared with closed forms in float64, and its warnings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftlab.distillation import gradients as gradients_module
from peftlab.distillation.gradients import gradient_report
from peftlab.distillation.targets import SparseTarget
from peftlab.errors import RecipeError


def models(
    N: int = 64, V: int = 3000, *, noise: float = 0.5, peak: float = 4.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits like a language model's, with a few likely tokens and a long tail. The student is the teacher plus noise."""
    g = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(V, generator=g) for _ in range(N)])
    teacher = torch.zeros(N, V).scatter(1, order, -peak * torch.log(torch.arange(1.0, V + 1)).expand(N, V) / 2)
    teacher = teacher + 0.5 * torch.randn(N, V, generator=g)
    student = teacher + noise * torch.randn(N, V, generator=g)
    return student, teacher, torch.multinomial(teacher.softmax(-1), 1, generator=g)[:, 0]


def softmax(z: Tensor, T: float) -> Tensor:
    e = torch.exp((z.double() - z.double().amax(-1, keepdim=True)) / T)
    return e / e.sum(-1, keepdim=True)


def gradients(
    student: Tensor, teacher: Tensor, targets: Tensor, T: float, k: int, tail: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of T^2 KL, of CE and of T^2 times the sparse KL, in closed form, summed over tokens."""
    q, p = softmax(student, T), softmax(teacher, T)
    hard = softmax(student, 1.0)
    hard[torch.arange(len(targets)), targets] -= 1
    stored = torch.zeros_like(p).scatter(1, p.topk(k).indices, 1.0)
    if tail == "renormalized":
        sparse = stored * (q / (stored * q).sum(-1, keepdim=True) - p / (stored * p).sum(-1, keepdim=True))
    else:
        rest_q, rest_p = (((1 - stored) * x).sum(-1, keepdim=True) for x in (q, p))
        sparse = q - stored * p - (1 - stored) * q * rest_p / rest_q
    return T * (q - p), hard, T * sparse


@pytest.mark.parametrize("tail", ["bucket", "renormalized"])
@pytest.mark.parametrize("T", [1.0, 2.0])
def test_gradient_report_equals_the_closed_forms(T: float, tail: Any) -> None:
    student, teacher, targets = models(N=17, V=300)
    kd, ce, sparse = gradients(student, teacher, targets, T, 12, tail)
    cosine = float((kd * sparse).sum() / (kd.norm() * sparse.norm()))
    at_t1 = gradients(student, teacher, targets, 1.0, 12, tail)[0]
    for chunk_bytes in (2**26, 4 * 300 * 5, 1):
        report = gradient_report(
            student, teacher, targets, temperature=T, hard_weight=0.25, k=12, tail=tail, chunk_bytes=chunk_bytes
        )
        assert report.kd_norm == pytest.approx(float(kd.norm()) / 17, rel=1e-4)
        assert report.ce_norm == pytest.approx(float(ce.norm()) / 17, rel=1e-4)
        assert report.ratio == pytest.approx(float(kd.norm() / ce.norm()), rel=1e-4)
        assert report.weighted_ratio == pytest.approx(0.75 / 0.25 * float(kd.norm() / ce.norm()), rel=1e-4)
        assert report.kd_norm_at_t1 == pytest.approx(float(at_t1.norm()) / 17, rel=1e-4)
        assert report.angle_deg == pytest.approx(math.degrees(math.acos(cosine)), abs=0.02)
        assert report.norm_ratio == pytest.approx(float(sparse.norm() / kd.norm()), rel=1e-4)
        assert (report.k, report.tail, report.num_tokens) == (12, tail, 17)


@pytest.mark.parametrize("width", [8, 500])
def test_gradient_report_of_the_head_equals_the_closed_forms(width: int) -> None:
    """Exact for narrow hidden states. For wide ones, random directions give norms and angles within a few percent."""
    student, teacher, targets = models(N=40, V=300)
    hidden = torch.randn(40, width, generator=torch.Generator().manual_seed(1)) + 1.0
    kd, ce, sparse = (g.T @ hidden.double() for g in gradients(student, teacher, targets, 2.0, 12, "renormalized"))
    cosine = float((kd * sparse).sum() / (kd.norm() * sparse.norm()))
    report = gradient_report(
        student, teacher, targets, temperature=2.0, k=12, tail="renormalized", hidden=hidden, chunk_bytes=4 * 300 * 7
    )
    near = 1e-4 if width == 8 else 0.1
    assert report.of == "head"
    assert report.kd_norm == pytest.approx(float(kd.norm()) / 40, rel=near)
    assert report.ce_norm == pytest.approx(float(ce.norm()) / 40, rel=near)
    assert report.norm_ratio == pytest.approx(float(sparse.norm() / kd.norm()), rel=near)
    assert report.angle_deg == pytest.approx(math.degrees(math.acos(cosine)), rel=near)


def test_gradient_report_on_stored_classes_equals_the_closed_form() -> None:
    student, teacher, targets = models(N=9, V=300)
    _, _, sparse = gradients(student, teacher, targets, 2.0, 12, "bucket")
    report = gradient_report(student, SparseTarget.from_logits(teacher, 12, temperature=2.0), targets, temperature=2.0)
    assert report.kd_norm == pytest.approx(float(sparse.norm()) / 9, rel=1e-4)
    assert report.angle_deg is report.norm_ratio is report.kd_norm_at_t1 is report.weighted_ratio is None
    assert (report.k, report.tail, report.warnings) == (12, "bucket", [])


def test_gradient_report_has_no_warning_for_a_sound_choice() -> None:
    student, teacher, targets = models()
    report = gradient_report(student, teacher, targets, hard_weight=0.5, k=50)
    assert not report.warnings, report
    assert str(report).startswith("gradients of the logits at step 0 over 64 tokens: KD / CE = ")
    assert "50 classes (bucket) against all" in str(report)


@pytest.mark.parametrize(("scale_by_t2", "message"), [(True, "T\\^2 = 16 is applied"), (False, "T\\^2 is not applied")])
def test_gradient_report_warns_of_a_temperature_that_shrinks_the_term(scale_by_t2: bool, message: str) -> None:
    student, teacher, targets = models(noise=2.0)
    report = gradient_report(student, teacher, targets, temperature=4.0, scale_by_t2=scale_by_t2)
    (warning,) = report.warnings
    assert report.kd_norm_at_t1 is not None
    times = f"{report.kd_norm_at_t1 / report.kd_norm:.1f}"
    assert f"temperature 4 makes the teacher's gradient {times} x smaller than temperature 1" in warning
    assert message.replace("\\", "") in warning


def test_gradient_report_accepts_a_higher_temperature_for_few_classes() -> None:
    """With ten classes and logits small against T, the factor T^2 keeps the gradient."""
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(50, 10, generator=g), torch.randn(50, 10, generator=g)
    assert not gradient_report(student, teacher, torch.zeros(50, dtype=torch.int64), temperature=4.0).warnings
    assert gradient_report(
        student, teacher, torch.zeros(50, dtype=torch.int64), temperature=4.0, scale_by_t2=False
    ).warnings


def test_gradient_report_warns_of_a_hard_weight_that_leaves_noise() -> None:
    student, teacher, targets = models(noise=0.1)
    report = gradient_report(student, teacher, targets, hard_weight=0.9)
    (warning,) = report.warnings
    assert f"the teacher's term is {report.weighted_ratio:.3g} of the labels' term with hard_weight 0.9" in warning


def test_gradient_report_warns_of_renormalized_classes() -> None:
    student, teacher, targets = models(noise=0.1, peak=2.0)
    report = gradient_report(student, teacher, targets, k=12, tail="renormalized")
    (warning,) = report.warnings
    assert report.angle_deg is not None and report.angle_deg > 15
    assert f"12 classes per token (renormalized) give a gradient {report.angle_deg:.0f} degrees away" in warning
    assert "use tail: bucket" in warning
    bucket = gradient_report(student, teacher, targets, k=12)
    assert bucket.angle_deg is not None and bucket.angle_deg < 0.7 * report.angle_deg
    assert not gradient_report(student, teacher, targets, k=50).warnings
    stored = SparseTarget.from_logits(teacher, 12, tail="renormalized")
    (unmeasured,) = gradient_report(student, stored, targets).warnings
    assert "the error cannot be measured" in unmeasured


def test_gradient_report_of_a_perfect_student() -> None:
    _, teacher, targets = models(N=4, V=50)
    for student in (teacher, teacher + 3.0):
        report = gradient_report(student, teacher, targets, k=3, temperature=2.0, hard_weight=0.5)
        assert report.kd_norm == 0 and report.angle_deg is None
        assert report.warnings == [
            "the teacher's term has no gradient: the student already has the teacher's probabilities"
        ]


class LargestOutput(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            # A view of the inputs allocates nothing.
            if isinstance(value, Tensor) and not value._is_view():
                self.numel = max(self.numel, value.numel())
        return out


def test_gradient_report_makes_only_chunks_of_float32_logits() -> None:
    student, teacher, targets = (x.bfloat16() if x.is_floating_point() else x for x in models(N=40, V=100))
    with LargestOutput() as largest:
        gradient_report(student, teacher, targets, temperature=2.0, k=10, chunk_bytes=4 * 100 * 8)
    assert largest.numel == 8 * 100


def test_gradient_report_comparison_catches_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, targets = models(N=5, V=40)
    kd, ce, _ = gradients(student, teacher, targets, 2.0, 5, "bucket")
    right = gradients_module._gradient
    monkeypatch.setattr(
        gradients_module, "_gradient", lambda losses, logits, against: right(losses, logits * 0.9, against)
    )
    report = gradient_report(student, teacher, targets, temperature=2.0)
    assert report.kd_norm != pytest.approx(float(kd.norm()) / 5, rel=1e-4)
    assert report.ce_norm != pytest.approx(float(ce.norm()) / 5, rel=1e-4)


def test_gradient_report_keeps_its_inputs_and_builds_no_graph() -> None:
    student, teacher, targets = models(N=4, V=30)
    student.requires_grad_()
    before = student.detach().clone()
    with torch.no_grad():
        gradient_report(student, teacher, targets, k=3)
    assert torch.equal(student.detach(), before) and student.grad is None


def test_gradient_report_refuses_wrong_input() -> None:
    student, teacher, targets = models(N=3, V=20)
    with pytest.raises(ValueError, match="at least one token"):
        gradient_report(student[:0], teacher[:0], targets[:0])
    with pytest.raises(ValueError, match=r"hidden states \[3, H\], found \[2, 4\]"):
        gradient_report(student, teacher, targets, hidden=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="dense teacher logits and forward_kl"):
        gradient_report(student, teacher, targets, kind="jsd", k=3)
    with pytest.raises(ValueError, match="dense teacher logits"):
        gradient_report(student, SparseTarget.from_logits(teacher, 3), targets, k=3)
    with pytest.raises(RecipeError, match="stored at temperature 1"):
        gradient_report(student, SparseTarget.from_logits(teacher, 3), targets, temperature=2.0)
