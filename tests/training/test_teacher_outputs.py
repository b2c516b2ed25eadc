"""Teachers restore the student: modes, adapters, requires_grad, gradients; also after an exception."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distill_loss import Texts, moved, voice
from torch import Tensor

from peftlab.adapters import add_adapter, save_adapter
from peftlab.distillation import Objective
from peftlab.training import teacher_outputs
from peftlab.training.distill_loss import DistillLoss, Share
from peftlab.training.teacher_outputs import BackboneTeacher, ModelTeacher

TARGETS = ["q_proj", "v_proj", "down_proj"]


def state(model: Any) -> dict[str, Any]:
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "trained": {name for name, p in model.named_parameters() if p.requires_grad},
        "adapter": model.active_adapter,
        "off": {n: m.disable_adapters for n, m in model.named_modules() if hasattr(m, "disable_adapters")},
    }


@pytest.fixture
def bench(tiny: Any, tokenizer_of: Any) -> Texts:
    """A student whose adapter has dropout, in training mode."""
    bench = Texts(tiny("tiny:llama", dtype="float64", dropout=0.5, targets=TARGETS), tokenizer_of("tiny:llama"))
    bench.student.train()
    return bench


@pytest.fixture
def second(bench: Texts, tiny: Any, tmp_path: Path) -> Any:
    """Adds another adapter to the student; returns the model that has only that one."""
    other = moved(tiny("tiny:llama", dtype="float64", seed=5, targets=TARGETS), 0, scale=0.0)
    save_adapter(other, tmp_path / "other")
    add_adapter(bench.student, tmp_path / "other", name="teacher")
    bench.student.train()
    return other


def rows_of(bench: Texts, say: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """[N, V], computed for each row alone."""
    logits = [bench.row(lambda ids: say(bench.student, ids), example)[0] for example in bench.examples]
    return torch.cat(logits).detach()


def without_dropout_and_adapter(student: Any, ids: Tensor) -> Tensor:
    student.eval()
    with student.disable_adapter():
        logits = student(input_ids=ids).logits
    student.train()
    return logits


def check_backbone(bench: Texts) -> None:
    teacher = BackboneTeacher(bench.task, kernels="reference")
    want = rows_of(bench, without_dropout_and_adapter)
    before = state(bench.student)
    logits = teacher(bench.student, bench.batch())
    assert isinstance(logits, Tensor) and not logits.requires_grad
    torch.testing.assert_close(logits, want, rtol=1e-9, atol=1e-9)
    assert state(bench.student) == before


def check_second(bench: Texts, second: Any) -> None:
    teacher = BackboneTeacher(bench.task, adapter="teacher", kernels="reference")
    before = state(bench.student)
    assert not any(".teacher." in name for name in before["trained"])
    logits = teacher(bench.student, bench.batch())
    torch.testing.assert_close(logits, rows_of(bench, voice(second)[0]), rtol=1e-9, atol=1e-9)
    assert state(bench.student) == before


def test_teacher_that_is_the_backbone_without_its_adapter(bench: Texts) -> None:
    check_backbone(bench)


def test_teacher_that_is_another_adapter_on_the_backbone(bench: Texts, second: Any) -> None:
    check_second(bench, second)


@pytest.mark.parametrize("adapter", [None, "teacher"])
def test_teacher_restores_the_student_after_an_exception(
    bench: Texts, second: Any, adapter: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(bench.student)

    def broken(*args: Any) -> Any:
        assert state(bench.student) != before
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.task, "outputs", broken)
    with pytest.raises(KeyboardInterrupt):
        BackboneTeacher(bench.task, adapter=adapter)(bench.student, bench.batch())
    assert state(bench.student) == before


@pytest.mark.parametrize("adapter", [None, "teacher"])
def test_teacher_gets_no_gradients(bench: Texts, second: Any, adapter: str | None, tmp_path: Path) -> None:
    loss = DistillLoss(bench.task, [(1.0, Objective())], [Share(BackboneTeacher(bench.task, adapter=adapter))])
    loss(bench.student, bench.batch()).backward()
    with_gradient = {name for name, p in bench.student.named_parameters() if p.grad is not None}
    assert with_gradient == state(bench.student)["trained"]
    assert with_gradient and all(".default." in name for name in with_gradient)
    save_adapter(bench.student, tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("*teacher*"))


def test_teacher_model_answers_in_eval_mode_and_keeps_its_mode(bench: Texts, tiny: Any) -> None:
    model = tiny("tiny:llama", dtype="float64", dropout=0.5, seed=7, targets=TARGETS).train()
    before = state(model)
    logits = ModelTeacher(model, bench.task, device="cpu", kernels="reference")(bench.student, bench.batch())
    assert not logits.requires_grad  # type: ignore[union-attr]
    assert state(model) == before
    model.eval()
    torch.testing.assert_close(logits, rows_of(bench, voice(model)[0]), rtol=1e-6, atol=1e-6)  # norms in float32


def no_restoring(patch: Any) -> None:
    @contextlib.contextmanager
    def switched(self: Any, student: Any) -> Any:
        student.set_adapter("teacher")
        yield

    patch.setattr(BackboneTeacher, "_switched", switched)


def flags_not_restored(patch: Any) -> None:
    """The state that PEFT leaves by itself."""

    @contextlib.contextmanager
    def switched(self: Any, student: Any) -> Any:
        student.set_adapter("teacher")
        yield
        for module in student.modules():
            if hasattr(module, "_active_adapter"):
                module._active_adapter = "default"
        student.active_adapter = "default"

    patch.setattr(BackboneTeacher, "_switched", switched)


def eval_for_good(patch: Any) -> None:
    @contextlib.contextmanager
    def as_teacher(model: Any) -> Any:
        model.eval()
        with torch.no_grad():
            yield

    patch.setattr(teacher_outputs, "as_teacher", as_teacher)


def with_a_graph(patch: Any) -> None:
    @contextlib.contextmanager
    def as_teacher(model: Any) -> Any:
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        yield
        for module, training in modes:
            module.training = training

    patch.setattr(teacher_outputs, "as_teacher", as_teacher)


def with_dropout(patch: Any) -> None:
    patch.setattr(teacher_outputs, "as_teacher", lambda model: torch.no_grad())
    patch.setattr(BackboneTeacher, "_switched", lambda self, student: contextlib.nullcontext())


@pytest.mark.parametrize(
    "fault", [no_restoring, flags_not_restored, eval_for_good, with_dropout], ids=lambda f: f.__name__
)
def test_teacher_deliberate_faults_are_caught(
    bench: Texts, second: Any, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check_second(bench, second)


def check_no_graph(bench: Texts, patch: pytest.MonkeyPatch) -> None:
    """A graph of the teacher would stay in memory until it is detached."""
    graphs: list[bool] = []
    right = bench.task.outputs
    patch.setattr(bench.task, "outputs", lambda *args: (graphs.append(torch.is_grad_enabled()), right(*args))[1])
    BackboneTeacher(bench.task)(bench.student, bench.batch())
    assert graphs == [False]


def test_teacher_builds_no_graph(bench: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    check_no_graph(bench, monkeypatch)


def test_teacher_that_builds_a_graph_is_caught(bench: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    with_a_graph(monkeypatch)
    with pytest.raises(AssertionError):
        check_no_graph(bench, monkeypatch)
