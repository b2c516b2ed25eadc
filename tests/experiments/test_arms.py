"""``distill`` end to end on tiny models: its files, its repetition, and its resume after any stop."""

from __future__ import annotations

import errno
import functools
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import distill_child
import pytest
import torch
from run_examples import Stopper, contents, recipe, write_data

import peftlab
from peftlab.api.distill import distill
from peftlab.assembly import fit as fit_module
from peftlab.errors import ArtifactError, Interrupted, PeftlabError, RecipeError, ResourceError, VerificationError
from peftlab.experiments import arms as distilling
from peftlab.experiments import card_figures as comparing
from peftlab.training.progress import SilentProgress

TEXTS = ["red 9", "cat 9", "cow 1", "blue 3"]


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    warn = note


@pytest.fixture(scope="module", autouse=True)
def short_timing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "_TIMED_SECONDS", 0.05)
        yield


def lesson(task: str, **sections: Any) -> dict[str, Any]:
    """causal_lm: an adapter on a cut student, from a cache. seq_cls: all weights, on rows without labels, two seeds."""
    own: dict[str, Any] = {
        "causal_lm": {
            "distill": {"student_init": {"layers": [0]}, "cache": "cache"},
            "run": {"save_every": 2, "device": "cpu"},
        },
        "seq_cls": {"distill": {"transfer": "transfer.csv", "seeds": 2, "temperature": 2.0}},
    }[task]
    document = recipe(task, **{"train": {"max_steps": 4, "lr": 3e-3}, "eval": {"before": False}, **own})
    document["distill"]["teacher"] = f"teacher-{task}"
    if task == "seq_cls":
        document["adapter"] = {"method": "none"}
    for name, changes in sections.items():
        document[name] = {**document.get(name, {}), **changes}
    return document


@pytest.fixture(scope="module")
def lessons(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, rows without labels, and a teacher for each task."""
    folder = tmp_path_factory.mktemp("lessons")
    write_data(folder)
    (folder / "transfer.csv").write_text(
        "text\n" + "".join(f"{w} {i}\n" for i in range(20, 26) for w in ("red", "cow"))
    )
    for task in ("causal_lm", "seq_cls"):
        teacher = recipe(task, eval={"before": False}, train={"max_steps": 12, "lr": 3e-2})
        shutil.copytree(trained(teacher, write_data) / "run", folder / f"teacher-{task}")
    return folder


class Done(NamedTuple):
    folder: Path
    run: Any
    task: str
    notes: list[str]


def finished(lessons: Path, folder: Path, task: str) -> Done:
    shutil.copytree(lessons, folder, dirs_exist_ok=True)
    notes = Notes()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return Done(folder, distill(lesson(task), progress=notes), task, notes.lines)


@pytest.fixture(scope="module")
def texts(lessons: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    return finished(lessons, tmp_path_factory.mktemp("texts"), "causal_lm")


@pytest.fixture(scope="module")
def classes(lessons: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    return finished(lessons, tmp_path_factory.mktemp("classes"), "seq_cls")


@pytest.fixture(params=["texts", "classes"])
def done(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Done:
    result: Done = request.getfixturevalue(request.param)
    monkeypatch.chdir(result.folder)
    return result


@pytest.fixture
def here(lessons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(lessons, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(run: Path) -> dict[str, bytes]:
    """The student's files, without the lock that names folders."""
    return {name: data for name, data in contents(run / "student").items() if not name.endswith(".yaml")}


def test_distill_run_folder_is_complete(done: Done) -> None:
    names = {str(p.relative_to("run")) for p in Path("run").rglob("*") if p.is_file()}
    model = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    model |= {"recipe.lock.yaml"} | ({"generation_config.json"} if done.task == "causal_lm" else set())
    arm = {"metrics.jsonl", "recipe.lock.yaml", "run.json", "witness.safetensors"}
    if done.task == "causal_lm":
        arm |= {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "merge.json"}
        arm |= {f"merged/{name}" for name in model}
        want = {f"init/{name}" for name in (model - {"recipe.lock.yaml"}) | {"student.json"}}
    else:
        arm |= {f"model/{name}" for name in model}
        want = set()
    seeds = [0] if done.task == "causal_lm" else [0, 1]
    want |= {f"seed-{seed}/{kind}/{name}" for seed in seeds for kind in ("student", "labels") for name in arm}
    checkpoints = {name for name in names if "/checkpoints/" in name}
    assert names - checkpoints == want | {"recipe.lock.yaml", "run.json", "witness.safetensors"} | {
        f"student/{name}" for name in model
    }
    assert bool(checkpoints) == (done.task == "causal_lm")
    summary = json.loads(Path("run/run.json").read_text())
    assert (summary["status"], summary["kind"]) == ("finished", "distill")
    assert summary["card"]["num_rows"] == 12 and summary["card"]["num_seeds"] == len(seeds)


def test_distill_card_has_the_metrics_of_the_files(done: Done) -> None:
    """Evaluates student and baseline again from their files, for each seed."""
    card = done.run.summary["card"]
    for who, kind in (("student", "student"), ("baseline", "labels")):
        evaluations = [
            peftlab.evaluate(folder / ("merged" if done.task == "causal_lm" else "model"), progress=SilentProgress())
            for folder in sorted(Path("run").glob(f"seed-*/{kind}"))
        ]
        for row in card["metrics"]:
            values = [f["metrics"].get(row["name"]) for f in evaluations]
            if None not in values and row[who] is not None:
                mean = sum(values) / len(values)
                assert row[who]["value"] == pytest.approx(mean, rel=1e-4, abs=1e-6), (who, row["name"])
    whole = peftlab.evaluate("run", progress=SilentProgress())["metrics"]
    assert whole["loss"] == pytest.approx(done.run.summary["seeds"][0]["student"]["metrics"]["loss"]["value"], rel=1e-4)
    assert {"accuracy", "loss"} <= {row["name"] for row in card["metrics"]}


def test_distill_card_has_the_metrics_of_the_teacher(done: Done) -> None:
    rows = {row["name"]: row for row in done.run.summary["card"]["metrics"]}
    alone = peftlab.evaluate(f"teacher-{done.task}", progress=SilentProgress())["metrics"]
    for name in ("accuracy", "loss"):
        assert rows[name]["teacher"]["value"] == pytest.approx(alone[name], rel=1e-4), name


def test_distill_student_and_baseline_have_the_same_budget(done: Done) -> None:
    costs = done.run.summary["card"]["costs"]
    assert costs["student"]["steps"] == costs["baseline"]["steps"] == 4
    assert costs["student"]["num_parameters"] == costs["baseline"]["num_parameters"]
    runs = [peftlab.open_run(p) for p in sorted(Path("run").glob("seed-*/*"))]
    assert len({json.dumps(run.summary["ledger"]["held_out"]) for run in runs}) == 1, "one split for all"
    trained = {"student": 12, "labels": 36} if done.task == "seq_cls" else {"student": 36, "labels": 36}
    assert all(run.summary["train_rows"] == trained[run.folder.name] for run in runs)
    student = [(run.folder / "metrics.jsonl").read_text() for run in runs]
    assert len(set(student)) == len(student), "the trainings differ"


def test_distill_student_loads_in_plain_transformers(done: Done) -> None:
    import transformers

    name = "AutoModelForCausalLM" if done.task == "causal_lm" else "AutoModelForSequenceClassification"
    model = getattr(transformers, name).from_pretrained("run/student").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("run/student")
    predictions = list(peftlab.predict("run", TEXTS, progress=SilentProgress()))
    assert len(predictions) == len(TEXTS)
    if done.task == "seq_cls":
        for text, answer in zip(TEXTS, predictions, strict=True):
            with torch.no_grad():
                probs = model(torch.tensor([tokenizer(text)["input_ids"]])).logits.softmax(-1)[0]
            assert model.config.id2label[int(probs.argmax())] == answer["label"]
            assert float(probs.max()) == pytest.approx(answer["probability"], rel=1e-5)
    else:
        assert model.config.num_hidden_layers == 1


def test_distill_makes_the_cache_first_and_needs_no_labels(texts: Done, classes: Done) -> None:
    assert any("is incomplete: caching the missing teacher targets first" in note for note in texts.notes)
    assert texts.run.summary["teach"][0]["examples"] == 36
    assert (texts.folder / "cache/manifest.json").is_file()
    assert "label" not in (classes.folder / "transfer.csv").read_text()


def test_distill_lock_file_repeats_the_student_byte_by_byte(done: Done) -> None:
    torch.rand(7)
    again = distill("run/recipe.lock.yaml", ["run.dir=again", "distill.seeds=1"], progress=SilentProgress())
    assert weights(again.folder) == weights(Path("run"))
    shutil.rmtree("again")


def test_distill_new_head_of_a_cut_student_is_repeatable(here: Path) -> None:
    """The fault: the head was drawn from the current state of the generator."""
    from transformers import BertModel

    from peftlab.models.tiny import tiny_config, tiny_tokenizer

    BertModel(tiny_config("tiny:bert")).save_pretrained("headless")
    tiny_tokenizer().save_pretrained("headless")
    changes = {"transfer": None, "seeds": 1, "baseline": False, "student_init": {"layers": [0]}}
    document = lesson("seq_cls", model={"name": "headless"}, distill=changes)
    first = distill(document, progress=SilentProgress())
    torch.rand(7)
    again = distill(document, ["run.dir=again"], progress=SilentProgress())
    assert weights(again.folder) == weights(first.folder)


def test_distill_resume_refuses_changed_data_and_teacher(here: Path) -> None:
    document = lesson("seq_cls", distill={"seeds": 1, "baseline": False})
    with pytest.raises(Interrupted):
        distill(document, progress=Stopper(2))
    text = (here / "transfer.csv").read_text()
    (here / "transfer.csv").write_text(text + "green 1\n")
    for again in (("run", {"resume": True}), ("run/recipe.lock.yaml", {}), (document, {"resume": True})):
        with pytest.raises(ArtifactError, match="the transfer data has changed"):
            distill(again[0], progress=SilentProgress(), **again[1])
    (here / "transfer.csv").write_text(text)
    shutil.copytree("teacher-seq_cls", "old")
    path = here / "teacher-seq_cls/adapter/adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"the teacher has changed: (\w+) when the run was made, (?!\1)\w+ now"):
        distill("run", resume=True, progress=SilentProgress())


def test_distill_replace_with_a_mistake_keeps_the_earlier_run(here: Path) -> None:
    document = lesson("seq_cls", distill={"seeds": 1, "baseline": False})
    distill(document, progress=SilentProgress())
    before = contents(here / "run")
    for wrong in ("distill.teacher=nowhere", "distill.teacher=teacher-causal_lm", "distill.transfer=absent.csv"):
        with pytest.raises(PeftlabError):
            distill(document, [wrong], replace=True, progress=SilentProgress())
        assert contents(here / "run") == before
    with pytest.raises(RecipeError, match="contains another run"):
        distill(document, progress=SilentProgress())


def test_distill_killed_at_every_moment_ends_with_the_same_student(process: Any, here: Path, texts: Done) -> None:
    for number, moment in enumerate(distill_child.MOMENTS):
        arguments = (here, lesson("causal_lm"), moment)
        with process.start(functools.partial(distill_child.run, *arguments, resume=number > 0)) as child:
            done = child.wait()
        assert done.returncode == -signal.SIGKILL, f"{moment}: {done.stderr}"
        assert peftlab.open_run("run").summary["status"] == "running"
    run = distill("run", resume=True, progress=SilentProgress())
    assert weights(run.folder) == weights(texts.folder / "run")
    assert set(contents(here / "cache")) == set(contents(texts.folder / "cache"))
    assert not list(here.rglob("*.partial*")), "what was being written is gone"
    values = [{row["name"]: row["student"] for row in r.summary["card"]["metrics"]} for r in (run, texts.run)]
    assert values[0] == values[1]


def test_distill_resume_after_ctrl_c_gives_the_same_student(here: Path, texts: Done) -> None:
    with pytest.raises(Interrupted, match="Resume with: peftlab distill run --resume") as caught:
        distill(lesson("causal_lm"), progress=Stopper(3))
    assert caught.value.exit_code == 130
    assert peftlab.open_run("run").summary["status"] == "interrupted"
    with pytest.raises(RecipeError, match="cannot resume with changed settings"):
        distill("run", ["train.lr=0.5"], resume=True, progress=SilentProgress())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distilling, "compare_students", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(Interrupted, match="peftlab distill run --resume"):
            distill("run", resume=True, progress=SilentProgress())
    assert weights(distill("run", resume=True, progress=SilentProgress()).folder) == weights(texts.folder / "run")


def test_distill_resume_of_a_finished_run_touches_nothing(texts: Done) -> None:
    before = contents(texts.folder)
    with pytest.raises(RecipeError, match="run: the run is finished and cannot be resumed"):
        distill(texts.folder / "run", resume=True, progress=SilentProgress())
    assert contents(texts.folder) == before


def test_distill_on_a_full_disk_leaves_nothing_or_resumes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    document = lesson("seq_cls", distill={"seeds": 1, "baseline": False})
    before = contents(here)
    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "save_plain", full)
        with pytest.raises(ResourceError, match="the disk is full"):
            distill(document, progress=SilentProgress())
    assert contents(here) == before, "no training saved anything, so nothing is left"
    with monkeypatch.context() as patch:
        patch.setattr(distilling, "link_file", full)
        with pytest.raises(ResourceError, match="the disk is full"):
            distill(document, progress=SilentProgress())
    assert peftlab.open_run("run").summary["status"] == "failed"
    assert not (here / "run/student").exists()
    notes = Notes()
    assert distill("run", resume=True, progress=notes).summary["status"] == "finished"
    assert "run/seed-0/student is already finished" in notes.lines


def test_distill_stops_at_a_loss_that_is_nan(here: Path) -> None:
    before = contents(here)
    with pytest.raises(
        VerificationError, match=r"step 2 is nan.*transfer\.csv:\d+.*were not updated|transfer\.csv:\d+"
    ):
        distill(lesson("seq_cls", train={"lr": 1e38, "warmup": 0}), progress=SilentProgress())
    assert set(contents(here)) == set(before) or (here / "run").exists()


def test_distill_notes_a_student_larger_than_its_teacher(here: Path) -> None:
    small = lesson("seq_cls", distill={"seeds": 1, "student_init": {"layers": [0]}, "baseline": False})
    distill(small, ["run.dir=small"], progress=SilentProgress())
    notes = Notes()
    document = lesson("seq_cls", distill={"seeds": 1, "teacher": "small/student", "baseline": False})
    run = distill(document, progress=notes)
    message = "the student is larger than its teacher: 120,898 parameters against 87,426"
    assert message in notes.lines
    assert f"{message[0].upper()}{message[1:]}." in run.summary["card"]["notes"]
