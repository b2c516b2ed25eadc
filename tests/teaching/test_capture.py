"""A teacher's targets from disk: a student learns the same from them as from the live teacher."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from run_examples import contents, recipe, write_data

from peftlab.api.teach import teach
from peftlab.assembly import Assembly
from peftlab.assembly.accelerator import run_accelerator
from peftlab.assembly.prepare import prepare
from peftlab.distillation.cache import CachedSplit
from peftlab.errors import ArtifactError, ResourceError
from peftlab.recipe import load_recipe
from peftlab.teaching import capture
from peftlab.teaching.teachers import Teachers
from peftlab.training.progress import SilentProgress

TASKS = ["causal_lm", "seq_cls"]


@pytest.fixture(scope="module")
def taught(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a teacher for each task."""
    folder = tmp_path_factory.mktemp("taught")
    write_data(folder)
    for task in TASKS:
        shutil.copytree(trained(recipe(task), write_data) / "run", folder / f"teacher-{task}")
    return folder


@pytest.fixture
def here(taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(taught, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lesson(task: str, **distill: Any) -> dict[str, Any]:
    document = recipe(task, distill={"teacher": f"teacher-{task}", "hard_weight": 0.3, **distill})
    document["adapter"]["dropout"] = 0.0
    return document


def step_of(document: dict[str, Any], folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first micro-batch of the recipe's student."""
    assembly = Assembly(load_recipe(document), transfer=True)
    with run_accelerator(assembly, folder) as accelerator:
        parts = prepare(assembly, accelerator, SilentProgress(), make_loss=Teachers(assembly, SilentProgress()).loss)
        assert parts.loss is not None
        examples = [parts.train.examples[i] for i in parts.plan.step(0).micro_batches[0]]
        parts.model.train()
        loss = parts.loss(parts.model, parts.task.collate(examples, accelerator.device))
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in parts.model.named_parameters() if p.grad is not None}
        return float(loss.detach()), gradients


def assert_same_step(got: Any, want: Any, tolerance: float) -> None:
    assert got[0] == pytest.approx(want[0], rel=tolerance)
    assert got[1].keys() == want[1].keys()
    largest = max(float(g.abs().max()) for g in want[1].values())
    assert largest > 0
    for name, gradient in want[1].items():
        assert float((got[1][name] - gradient).abs().max()) <= tolerance * largest, name


EXACT = [
    ("causal_lm", {"k": 260, "values": "float32"}),
    ("causal_lm", {"fill": "hidden", "states": "float32"}),
    ("seq_cls", {"k": 2, "values": "float32"}),
    ("seq_cls", {"fill": "hidden", "states": "float32"}),
]


@pytest.mark.parametrize(("task", "targets"), EXACT, ids=str)
def test_cache_of_all_classes_or_hidden_states_equals_the_live_teacher(here: Path, task: str, targets: Any) -> None:
    document = lesson(task, temperature=2.0, cache="cache", targets=targets)
    teach(document, progress=SilentProgress())
    stored = step_of(document, here)
    live = step_of(lesson(task, temperature=2.0), here)
    assert_same_step(stored, live, 1e-6)


def test_cache_of_routed_teachers_equals_the_live_teachers(here: Path) -> None:
    two = [
        {"name": "teacher-causal_lm", "weight": 2.0, "rows": {"kind": "animal"}},
        {"name": "tiny:llama", "weight": 1.0},
    ]
    options = {"teacher": None, "teachers": two}
    document = lesson("causal_lm", cache="cache", targets={"k": 260, "values": "float32"}, **options)
    report = teach(document, progress=SilentProgress())
    assert [Path(t["folder"]).name for t in report["teachers"]] == ["teacher-0", "teacher-1"]
    assert_same_step(step_of(document, here), step_of(lesson("causal_lm", **options), here), 1e-6)


def test_cache_records_of_other_examples_are_caught(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault: the cache is read by the position in the batch, not by the example."""
    document = lesson("causal_lm", cache="cache", targets={"k": 260, "values": "float32"})
    teach(document, progress=SilentProgress())
    right = CachedSplit.read
    monkeypatch.setattr(CachedSplit, "read", lambda self, indices: right(self, range(len(indices))))
    with pytest.raises((AssertionError, ValueError)):
        assert_same_step(step_of(document, here), step_of(lesson("causal_lm"), here), 1e-6)


def test_cached_teacher_is_not_loaded_while_a_student_trains(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = lesson("causal_lm", cache="cache")
    teach(document, progress=SilentProgress())
    monkeypatch.setattr(Teachers, "model", lambda *args: pytest.fail("the teacher was loaded"))
    step_of(document, here)


@pytest.mark.parametrize(
    ("task", "targets", "tolerance"),
    [
        ("causal_lm", {}, 0.02),
        ("causal_lm", {"k": 8, "values": "float32"}, 0.02),
        ("causal_lm", {"fill": "hidden"}, 0.02),
        ("causal_lm", {"fill": "hidden", "states": "int8"}, 0.02),
        ("causal_lm", {"fill": "sampled", "draws": 20}, None),
        ("causal_lm", {"fill": "mixed", "k": 8, "draws": 20}, None),
        ("seq_cls", {"k": 2}, 0.02),
        ("seq_cls", {"fill": "hidden"}, 0.02),
    ],
    ids=str,
)
def test_teach_plan_equals_what_a_capture_takes(here: Path, task: str, targets: Any, tolerance: float | None) -> None:
    """Several draws may give one class, so the plan of sampled targets is an upper bound."""
    document = lesson(task, cache="cache", targets=targets)
    before = contents(here)
    (planned,) = teach(document, plan=True, progress=SilentProgress())["teachers"]
    assert contents(here) == before, "a plan writes nothing"
    (done,) = teach(document, progress=SilentProgress())["teachers"]
    files = [p for p in (here / "cache").iterdir() if p.name.split(".")[-1] in ("bin", "index", "safetensors")]
    size = sum(p.stat().st_size for p in files)
    assert (planned["examples"], planned["positions"]) == (done["examples"], done["positions"])
    assert planned["fill"] == done["fill"]
    if tolerance is None:
        assert size <= planned["bytes"]
    else:
        assert planned["bytes"] == pytest.approx(size, rel=tolerance)
    assert planned["seconds"] > 0 and planned["free_bytes"] > size


class StopAt(SilentProgress):
    """Presses Ctrl-C once ``at`` examples are stored."""

    def __init__(self, at: int) -> None:
        self._at = at

    def step(self, step: int, values: Any) -> None:
        if step >= self._at:
            raise KeyboardInterrupt


def test_teach_resumes_a_stopped_capture(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_WINDOW", 5)
    document = lesson("causal_lm", cache="cache", targets={"fill": "sampled"})
    with pytest.raises(KeyboardInterrupt):
        teach(document, progress=StopAt(12))
    with pytest.raises(ArtifactError, match=r"expected a complete teacher cache in cache, found 15 of 36 examples"):
        step_of(document, here)
    teach(document, progress=SilentProgress())
    whole = lesson("causal_lm", cache="whole", targets={"fill": "sampled"})
    teach(whole, progress=SilentProgress())
    assert contents(here / "cache") == contents(here / "whole")
    notes: list[str] = []
    progress = SilentProgress()
    progress.note = notes.append  # type: ignore[method-assign]
    teach(document, progress=progress)
    assert notes[-1] == "cache is already complete"


def test_teach_on_a_full_disk_keeps_what_is_stored(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftlab.distillation.cache.writer import SplitWriter

    document = lesson("causal_lm", cache="cache")
    right = SplitWriter.add

    def full(self: Any, key: int, target: Any) -> None:
        if self.done == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        right(self, key, target)

    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "add", full)
        with pytest.raises(
            ResourceError, match=r"^`distill.cache`: the disk is full.* run the same command again to resume"
        ):
            teach(document, progress=SilentProgress())
    teach(document, progress=SilentProgress())
    teach(lesson("causal_lm", cache="whole"), progress=SilentProgress())
    assert contents(here / "cache") == contents(here / "whole")


def test_teach_refuses_too_little_disk_space(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ResourceError, match=r"`distill.cache`: the targets need about .* MiB in cache"):
        teach(lesson("causal_lm", cache="cache"), progress=SilentProgress())
    assert not (here / "cache").exists()
