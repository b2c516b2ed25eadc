"""On-policy distillation end to end on tiny models: phases, their training rows, kills, memory, and refused settings."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from peftlab.api.distill import distill
from peftlab.api.teach import teach
from peftlab.assembly import Assembly
from peftlab.assembly import weights as weights_module
from peftlab.data import BatchPlan
from peftlab.errors import ArtifactError, DataError, PeftlabError, RecipeError
from peftlab.experiments import arms as distilling_module
from peftlab.experiments import card_figures as comparing_module
from peftlab.experiments import phases as on_policy_module
from peftlab.experiments.phase_plan import plan_phases
from peftlab.experiments.written_answers import read_answers, write_answers
from peftlab.models import find_pretrained, load_model, load_tokenizer
from peftlab.recipe import load_recipe
from peftlab.training.checkpoint import list_checkpoints
from peftlab.training.progress import SilentProgress
from peftlab.training.schedules import learning_rate

WORDS = {"red": "colour", "green": "colour", "blue": "colour", "cat": "animal", "dog": "animal", "cow": "animal"}
TEXT = "<|im_start|>user\n{word}<|im_end|>\n<|im_start|>assistant\n{kind}<|im_end|>"
START, END = 1, 2
STOPS = {END}  # what ends a turn of the chat template


def pretrain(folder: Path, *, steps: int) -> None:
    """Saves tiny:llama after some steps on the task, so that it sometimes ends an answer."""
    pretrained = find_pretrained("tiny:llama")
    tokenizer, model = (
        load_tokenizer(pretrained),
        load_model(pretrained, auto_class="AutoModelForCausalLM", device="cpu"),
    )
    texts = [TEXT.format(word=f"{word} {i}", kind=kind) for i in range(4) for word, kind in WORDS.items()]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models ``weak`` and ``strong`` and the data."""
    folder = tmp_path_factory.mktemp("models")
    pretrain(folder / "weak", steps=12)
    pretrain(folder / "strong", steps=40)
    rows = [{"word": f"{word} {i}", "kind": kind} for i in range(5) for word, kind in WORDS.items()]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(models)
    return tmp_path


def recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "task": "causal_lm",
        "model": {"name": "weak"},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {
            "train": "data.jsonl",
            "eval_rows": 6,
            "template": {"user": "{word}", "assistant": "{kind}"},
        },
        "train": {"batch_size": 4, "lr": 1e-2},
        "eval": {"before": False},
        "distill": {"teacher": "strong", "cache": str(folder / "cache"), "baseline": False},
        "run": {"dir": str(folder / "run")},
    }
    on_policy = sections.pop("on_policy", {})
    for name, changes in sections.items():
        base[name] = {**base.get(name, {}), **changes}
    settings = {"phases": 2, "rows": 8, "student_share": 0.75, "max_new_tokens": 16}
    base["distill"]["on_policy"] = {**settings, **on_policy}
    return base


def run_it(document: Any, *overrides: str, **options: Any) -> Any:
    return distill(document, overrides, **{"progress": SilentProgress(), **options})


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the final comparison, which other tests cover."""
    monkeypatch.setattr(distilling_module, "compare_students", lambda *_, **__: {})


def student_bytes(folder: Path) -> bytes:
    return (folder / "run" / "student" / "model.safetensors").read_bytes()


class Snapshots(SilentProgress):
    """Copies the files at each place where a test kills the run. A killed process leaves exactly these."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.places, self._captures = folder, set[str](), 0

    def stage(self, text: str) -> None:
        if text.startswith("phase"):
            self._copy(f"writing {text[6]}")
        if text.startswith("storing"):
            self._captures += 1

    def step(self, step: int, values: Any) -> None:
        if values:
            self._copy(f"step {step}")
        elif step == 8:
            self._copy(f"captured {self._captures}")

    def _copy(self, place: str) -> None:
        if place in self.places:  # the baseline's steps
            return
        self.places.add(place)
        for name in ("run", "cache"):
            if (self._folder / name).is_dir():
                shutil.copytree(self._folder / name, self._folder / place / name, dirs_exist_ok=True)


class Whole(NamedTuple):
    folder: Path
    summary: dict[str, Any]
    places: set[str]


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """One complete run of two phases with its card, and the files at each place."""
    folder = tmp_path_factory.mktemp("whole")
    progress = Snapshots(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(models)
        patch.setattr(comparing_module, "_TIMED_SECONDS", 0.1)
        document = recipe(folder, run={"save_every": 1})
        document["distill"]["baseline"] = True
        run = run_it(document, progress=progress)
    return Whole(folder, run.summary, progress.places)


def test_on_policy_run_describes_its_phases(whole: Whole) -> None:
    ((seed, phases),) = [(one["seed"], one["phases"]) for one in whole.summary["on_policy"]]
    assert seed == 0 and [p["phase"] for p in phases] == [1, 2]
    assert [p["steps"] for p in phases] == [[0, 2], [2, 4]], "8 rows in batches of 4, twice"
    lines = []
    for notes in phases:
        path = whole.folder / "run" / "seed-0" / f"phase-{notes['phase']}" / "rows.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        full = [row for row in rows if row["answer"].strip()]
        assert len(rows) == 6 and notes["rows"] == 8 and {row["phase"] for row in rows} == {notes["phase"]}
        assert notes["written"] == len(full) and notes["empty"] == len(rows) - len(full)
        assert notes["mean_answer_tokens"] == pytest.approx(sum(len(row["tokens"]) for row in full) / len(full))
        assert notes["ended"] == pytest.approx(sum(row["tokens"][-1] in STOPS for row in full) / len(full))
        assert all(row["ended"] == (row["tokens"][-1] in STOPS) for row in full)
        assert all(len(row["tokens"]) == 16 for row in full if not row["ended"])
        assert not any(STOPS & set(row["tokens"][:-1]) for row in full)
        assert set(notes["seconds"]) == {"generating", "scoring", "training"}
        assert all(seconds > 0 for seconds in notes["seconds"].values())
        assert 0.05 < notes["kl"] < 10
        lines.append({row["row"] for row in rows})
    assert not lines[0] & lines[1], "a prompt came again before all had been asked"
    assert 0 < sum(p["ended"] for p in phases) < 2, "both kinds of answers must be there"
    assert whole.summary["card"] and (whole.folder / "run" / "student" / "model.safetensors").is_file()


def test_on_policy_phases_are_one_training(whole: Whole) -> None:
    folder = whole.folder / "run" / "seed-0" / "student"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == [learning_rate(i, total_steps=4, peak=1e-2, schedule="linear", warmup=0.03) for i in range(4)]
    summary = json.loads((folder / "run.json").read_text())
    assert summary["status"] == "finished" and summary["training"]["steps"] == 4
    assert summary["training"]["rows"] == sum(p["written"] + 2 for p in whole.summary["on_policy"][0]["phases"])
    assert [p.name for p in list_checkpoints(folder / "checkpoints")] == ["step-00000002", "step-00000003"]
    labels = json.loads((folder.parent / "labels" / "run.json").read_text())
    assert labels["training"]["steps"] == 4, "the baseline has another budget"


PLACES = ["writing 1", "captured 1", "step 1", "step 2", "writing 2", "captured 2", "step 3", "step 4"]


@contextlib.contextmanager
def killed_at(whole: Whole, place: str, aside: Path) -> Iterator[None]:
    """Restores the folders of the whole run as they were at that place. Its recipe has absolute paths, so no copy works."""
    for name in ("run", "cache"):
        shutil.move(whole.folder / name, aside / name)
        if (whole.folder / place / name).is_dir():
            shutil.copytree(whole.folder / place / name, whole.folder / name)
    try:
        yield
    finally:
        for name in ("run", "cache"):
            shutil.rmtree(whole.folder / name, ignore_errors=True)
            shutil.move(aside / name, whole.folder / name)


@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize("place", PLACES)
def test_on_policy_killed_run_resumes_to_the_same_student(whole: Whole, here: Path, place: str) -> None:
    """Kills between and within phases: while the student writes, before its rows are stored, after the teacher answers, in
    the first step of a phase, and after a checkpoint in the middle of a phase."""
    assert set(PLACES) <= whole.places
    expected = student_bytes(whole.folder)
    phases = [whole.folder / "run" / "seed-0" / f"phase-{i}" for i in (1, 2)]
    written = [[(a.row, a.tokens) for a in read_answers(folder)] for folder in phases]
    with killed_at(whole, place, here):
        checkpoints = [p.name for p in list_checkpoints(whole.folder / "run" / "seed-0" / "student" / "checkpoints")]
        assert ("step-00000003" in checkpoints) == (place == "step 4"), "a kill behind a checkpoint must be among them"
        run = run_it(whole.folder / "run", resume=True)
        assert student_bytes(whole.folder) == expected
        assert [[(a.row, a.tokens) for a in read_answers(folder)] for folder in phases] == written
        assert [p["phase"] for p in run.summary["on_policy"][0]["phases"]] == [1, 2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "is missing, but phase 2 was trained on it"),
        (lambda path: path.write_text('{"phase": 2}\n'), "rows.jsonl is damaged"),
    ],
)
def test_on_policy_resume_refuses_lost_answers(whole: Whole, here: Path, damage: Any, message: str) -> None:
    with killed_at(whole, "step 4", here):
        damage(whole.folder / "run" / "seed-0" / "phase-2" / "rows.jsonl")
        with pytest.raises(ArtifactError, match=message):
            run_it(whole.folder / "run", resume=True)


@torch.no_grad()
def greedy(model: Any, prompt: list[int], most: int) -> list[int]:
    """Greedy tokens, without a cache. Returns [] if two tokens are almost equally likely."""
    ids = list(prompt)
    for _ in range(most):
        (first, second), (best, _) = (x.tolist() for x in model(torch.tensor([ids])).logits[0, -1].topk(2))
        if first - second < 1e-3:
            return []
        ids.append(best)
        if ids[-1] in STOPS:
            break
    return ids[len(prompt) :]


def by_hand(
    models: Path, folder: Path, *, fresh_optimizer: bool = False, never_ends: bool = False
) -> tuple[dict[str, Any], dict[str, Any], list[tuple[list[int], list[int]]], list[float]]:
    """The full-weight run of ``test_on_policy_training_equals_plain_pytorch_on_the_students_tokens`` in plain PyTorch, float64.

    Returns: the weights before and after; without a fault, the student's greedy answers before each phase and the answers
    in the run; mean KL to the teacher on its answers before each phase.
    """
    from transformers import AutoModelForCausalLM

    teacher, student = (
        AutoModelForCausalLM.from_pretrained(models / name).double().eval() for name in ("strong", "weak")
    )
    tokenizer = load_tokenizer(find_pretrained(str(models / "weak")))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    optimizer, step = torch.optim.AdamW(student.parameters(), lr=1.0, weight_decay=0.0), 0
    answers, distances = [], []

    def both(prompt: list[int], answer: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, at = torch.tensor([prompt + answer]), slice(len(prompt) - 1, -1)
        with torch.no_grad():
            log_p = teacher(ids).logits[0, at].log_softmax(-1)
        return log_p, student(ids).logits[0, at].log_softmax(-1)

    for phase in (1, 2):
        if fresh_optimizer:
            optimizer = torch.optim.AdamW(student.parameters(), lr=1.0, weight_decay=0.0)
        lines = (folder / "run" / "seed-0" / f"phase-{phase}" / "rows.jsonl").read_text().splitlines()
        rows = []
        for line in map(json.loads, lines):
            prompt = tokenizer(line["prompt"], add_special_tokens=False).input_ids
            if not fresh_optimizer and not never_ends:
                answers.append((greedy(student, prompt, 16), line["tokens"]))
            rows.append((prompt, line["tokens"] + ([END] if never_ends and not line["ended"] else [])))
        with torch.no_grad():
            kl = sum(float((p.exp() * (p - q)).sum()) for p, q in (both(*row) for row in rows))
        distances.append(kl / sum(len(answer) for _, answer in rows))
        lengths = [len(prompt) + len(answer) for prompt, answer in rows]
        plan = BatchPlan(lengths, batch_size=4, epochs=1)
        for number in range(plan.total_steps):
            chosen = [int(i) for part in plan.step(number).micro_batches for i in part]
            optimizer.zero_grad()
            total = torch.zeros((), dtype=torch.float64)
            for i in chosen:
                log_p, log_q = both(*rows[i])
                total = total + (log_q.exp() * (log_q - log_p)).sum()
            (total / sum(len(rows[i][1]) for i in chosen)).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total_steps=4, peak=1e-3, schedule="linear", warmup=0.03)
            optimizer.step()
            step += 1
    return before, dict(student.named_parameters()), answers, distances


@pytest.mark.usefixtures("no_card")
def test_on_policy_training_equals_plain_pytorch_on_the_students_tokens(here: Path, models: Path) -> None:
    """Compares with plain PyTorch on the rows of the run: reverse KL on the written tokens only, one AdamW and one
    learning-rate schedule over both phases, greedy answers of the current student.

    Faults that it must catch: an optimizer that restarts with each phase; an end that was never written.
    """
    document = recipe(
        here,
        train={"lr": 1e-3},
        on_policy={"student_share": 1.0, "temperature": 0},
    )
    document["adapter"] = {"method": "none"}
    document["distill"] |= {"losses": ["reverse_kl"], "targets": {"fill": "hidden", "states": "float32"}}
    phases = run_it(document).summary["on_policy"][0]["phases"]
    after = load_file(here / "run" / "student" / "model.safetensors")

    answers: list[Any] = []

    def distance(**faults: bool) -> float:
        before, ours, pairs, kls = by_hand(models, here, **faults)
        answers.extend(pairs)
        if not faults:
            assert [p["kl"] for p in phases] == pytest.approx(kls, rel=1e-3)  # rounding of two phases in float32
        moved = math.sqrt(sum(float((p - before[n]).square().sum()) for n, p in ours.items()))
        apart = math.sqrt(sum(float((p - after[n].double()).square().sum()) for n, p in ours.items()))
        return apart / moved

    # Adam divides by the size of the gradient, so float32 rounding grows if the gradient is small.
    assert distance() < 0.01
    assert distance(fresh_optimizer=True) > 0.05
    assert distance(never_ends=True) > 0.05
    pairs = [(ours, theirs) for ours, theirs in answers if ours]
    assert len(pairs) > 8 and all(ours == theirs for ours, theirs in pairs)


@pytest.mark.usefixtures("no_card")
def test_on_policy_never_holds_teacher_and_student_together(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other model is alive when a model is loaded. The test must notice a teacher that is kept."""
    alive: list[weakref.ref[Any]] = []
    kept: list[Any] = []
    loaded: list[str] = []
    right = weights_module.load_model

    def watched(pretrained: Any, **options: Any) -> Any:
        gc.collect()
        assert not [ref for ref in alive if ref() is not None], f"another model is there while {pretrained} is loaded"
        model = right(pretrained, **options)
        alive.append(weakref.ref(model))
        loaded.append(Path(pretrained.source.name).name)
        if keep:
            kept.append(model)
        return model

    keep = False
    monkeypatch.setattr(weights_module, "load_model", watched)
    monkeypatch.setattr(
        distilling_module, "merge_run", lambda *args, **options: (here / "run/seed-0/student/merged").mkdir()
    )
    run_it(recipe(here))
    assert loaded == [*["weak", "strong", "weak"] * 2, "weak"], "the last: the run opened from its files"
    keep = True
    with pytest.raises(AssertionError, match="another model is there"):
        run_it(recipe(here), replace=True)


@pytest.mark.usefixtures("no_card")
def test_on_policy_with_several_teachers_and_seeds(here: Path) -> None:
    document = recipe(here, on_policy={"phases": 1, "rows": None})
    document["distill"] |= {
        "teacher": None,
        "teachers": [{"name": "strong"}, {"name": "self", "rows": {"kind": "animal"}}],
        "seeds": 2,
        "losses": ["jsd"],
        "targets": {"fill": "hidden", "states": "float32"},
    }
    run = run_it(document)
    first, second = run.summary["on_policy"]
    assert (first["seed"], second["seed"]) == (0, 1)
    answers = [read_answers(here / "run" / f"seed-{s}" / "phase-1") for s in (0, 1)]
    assert [a.tokens for a in answers[0]] != [a.tokens for a in answers[1]], "both seeds drew the same"
    assert [p["rows"] for p in first["phases"]] == [24], "all rows but those held out"
    assert len(list((here / "cache").glob("phase-1-*/teacher-1/manifest.json"))) == 2


@pytest.mark.usefixtures("no_card")
def test_on_policy_patience_ends_the_phases(here: Path) -> None:
    document = recipe(
        here,
        train={"max_steps": 8, "lr": 1e-9},
        eval={"every": 1, "best": "token_accuracy", "patience": 1},
        on_policy={"phases": 4},
    )
    document["adapter"] = {"method": "none"}
    run = run_it(document)
    training = json.loads((here / "run" / "seed-0" / "student" / "run.json").read_text())["training"]
    assert training["stopped_early"] and training["steps"] < 8
    assert len(run.summary["on_policy"][0]["phases"]) < 4


def test_on_policy_answers_follow_the_students_softmax(here: Path, models: Path) -> None:
    """Chi-square of 600 first tokens against the softmax at that temperature. The model's own
    generation_config.json must have no effect; the test would catch its top_k of 1."""
    shutil.copytree(models / "weak", here / "habits")
    (here / "habits" / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "top_k": 1, "temperature": 0.1, "repetition_penalty": 5.0, "eos_token_id": 2})
    )
    settings = {"max_new_tokens": 1, "temperature": 1.5}
    loaded = load_recipe(recipe(here, model={"name": str(here / "habits")}, on_policy=settings))
    assembly = Assembly(loaded, transfer=True)
    answers = write_answers(
        assembly, assembly.data.train, [0] * 600, phase=1, checkpoint=None, folder=here / "p", progress=SilentProgress()
    )
    model = load_model(find_pretrained(str(models / "weak")), auto_class="AutoModelForCausalLM", device="cpu").eval()
    ids = assembly.task.tokenizer(answers[0].prompt, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = 600 * (model(ids).logits[0, -1].double() / 1.5).softmax(-1)
    drawn = torch.bincount(torch.tensor([a.tokens[0] for a in answers]), minlength=len(expected)).double()
    often = expected >= 5
    seen = torch.cat([drawn[often], drawn[~often].sum()[None]])
    hoped = torch.cat([expected[often], expected[~often].sum()[None]])
    statistic, freedom = float(((seen - hoped) ** 2 / hoped).sum()), len(seen) - 1
    assert freedom >= 2
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_on_policy_reports_a_student_that_writes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = on_policy_module.write_answers

    def silent(*args: Any, **options: Any) -> list[Any]:
        return [type(a)(**{**vars(a), "answer": " ", "tokens": [END]}) for a in right(*args, **options)]

    monkeypatch.setattr(on_policy_module, "write_answers", silent)
    with pytest.raises(DataError, match="gave only empty answers to 6 prompts"):
        run_it(recipe(here))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": {"teacher": "strong"}}, "on_policy needs cache"),
        (
            {"distill": {"teacher": "strong", "cache": "c", "hard_weight": 0.5}},
            "the student's own answers are not labels",
        ),
        (
            {"distill": {"teacher": "strong", "cache": "c", "cross_tokenizer": "uld"}},
            "cross_tokenizer: uld needs a single live teacher",
        ),
        ({"eval": {"choices": ["animal", "colour"]}}, "the student writes free text"),
        ({"train": {"batch_size": None, "batch_tokens": 99}}, "train.batch_tokens needs train.max_steps"),
        ({"data": {"packing": True}}, "data.packing needs train.max_steps"),
        ({"train": {"max_steps": 1}}, "2 phases need as many steps, found train.max_steps: 1"),
        ({"on_policy": {"temperature": 0, "top_p": 0.9}}, "with temperature: 0, which draws nothing"),
        ({"on_policy": {"student_share": 0.0}}, "student_share"),
        ({"on_policy": {"rows": 25}}, "expected at least 25 training rows, found 24"),
        ({"on_policy": {"phases": 25, "rows": None}}, "expected at least 25 training rows, found 24"),
        ({"on_policy": {"max_new_tokens": 500}}, "leave no room for an answer of 500 within 512 tokens"),
        ({"data": {"template": None, "columns": {"text": "word"}}}, "these rows are plain text"),
    ],
)
def test_on_policy_refuses_impossible_settings(here: Path, changes: dict[str, Any], message: str) -> None:
    document = recipe(here)
    on_policy = document["distill"]["on_policy"] | changes.pop("on_policy", {})
    for name, values in changes.items():
        document[name] = values if name == "distill" else {**document[name], **values}
    document["distill"]["on_policy"] = on_policy
    with pytest.raises(PeftlabError) as caught:
        run_it(document)
    assert message in str(caught.value)
    assert not (here / "run").exists()


def test_on_policy_drops_prompts_that_are_too_long(here: Path) -> None:
    notes: list[str] = []

    class Notes(SilentProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    limit = 44 + 16
    rows = [{"word": "cat", "kind": "animal"}] * 20 + [{"word": "a very long word " * 2, "kind": "animal"}] * 4
    (here / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = recipe(
        here,
        data={"train": str(here / "long.jsonl"), "max_length": limit + 30, "too_long": "drop"},
        on_policy={"max_new_tokens": 46},
    )
    loaded = load_recipe(document)
    plan = plan_phases(Assembly(loaded, transfer=True), here / "run", Notes())
    assert 0 < len(plan.candidates) < len(plan.base.train.examples)
    assert any("these rows are dropped" in note for note in notes)


def test_teach_refuses_an_on_policy_recipe(here: Path) -> None:
    with pytest.raises(RecipeError, match="on-policy distillation has no cache to prepare"):
        teach(recipe(here), progress=SilentProgress())


def test_on_policy_is_for_language_models_only(here: Path) -> None:
    document = recipe(here)
    document |= {"task": "seq_cls", "model": {"name": "tiny:bert"}}
    document["data"] = {"train": "data.jsonl", "columns": {"text": "word", "label": "kind"}}
    with pytest.raises(RecipeError, match="on_policy: has no effect for task: seq_cls"):
        run_it(document)
