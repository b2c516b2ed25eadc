"""Computes the report card's figures: loads teacher, student and baseline and scores them on the held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from peftlab.assembly import Assembly
from peftlab.assembly.target import Target, find_target, open_target
from peftlab.data import eval_batches
from peftlab.evaluation.card import as_metrics, make_card, paired
from peftlab.evaluation.card_shape import Seed
from peftlab.evaluation.held_out_scores import HeldOutScores
from peftlab.measuring.latency import measure_latency
from peftlab.measuring.memory import release_memory
from peftlab.models import num_parameters
from peftlab.tasks import Batch, Generates
from peftlab.tasks.outputs import numbers_of
from peftlab.teaching.teachers import Teachers
from peftlab.training.distill_loss import TaughtLogits
from peftlab.training.progress import Progress, first_in_full

# Positions per chunk of logits and model: 256 x 49,152 float32 values are 48 MiB.
_CHUNK = 256
# Rows of the timed forward pass, and the time budget for timing.
_TIMED_ROWS, _TIMED_SECONDS = 32, 20.0
# Name of a training in the run folder -> name of its model on the card.
_WHO = {"student": "student", "labels": "baseline"}


def no_baseline(assembly: Assembly) -> str | None:
    """Why there is no baseline on the labels alone; None if there is one."""
    if not assembly.spec.learns_from_labels:
        return "no labels"
    return None if assembly.distill.baseline else "distill.baseline: false"


def compare_students(
    student: Assembly,
    teachers: Teachers,
    arms: Mapping[Any, Mapping[str, Any]],
    progress: Progress,
    *,
    from_weights: bool,
) -> dict[str, Any]:
    """Returns the report card of a distillation and the figures behind it.

    Args:
        student: assembly of the first seed's student, with the initial ``model.name``. arms: each training with its summary.
        from_weights: whether students start from meaningful weights, so that the untrained student is scored too.
    """
    comparer = _Comparer(student, teachers, progress, from_weights=from_weights)
    seeds: list[Seed] = []
    for seed in first_in_full(progress, sorted({arm.seed for arm in arms})):
        seeds.append(comparer.seed(seed, {arm: summary for arm, summary in arms.items() if arm.seed == seed}))
        release_memory()
    figures: dict[str, Any] = {
        "headline": student.headline(),
        "num_rows": student.held_out.num_rows,
        "seeds": seeds,
        "timed_on": comparer.timed_on,
    }
    if (reason := no_baseline(student)) is not None:
        figures["no_baseline"] = reason
    return {"card": make_card(figures), "seeds": seeds}  # type: ignore[arg-type]


class _Comparer:
    """Scores the models of one seed on the same held-out rows, and compares each with the teachers."""

    def __init__(self, student: Assembly, teachers: Teachers, progress: Progress, *, from_weights: bool) -> None:
        self._cut = _untrained_student(student) if from_weights else None
        self._student, self._teachers, self._progress = student, teachers, progress
        self._task, self._encoded, self._device = student.task, student.held_out, student.device
        encoded, rows = self._encoded, student.data.eval
        # Classes of different vocabularies cannot be compared one by one.
        together = student.spec.compares_outputs and not teachers.translated()
        self._shares = teachers.shares(self._task, None, rows, encoded) if together else []
        self._columns = teachers.columns()
        self._index = {row: i for i, row in enumerate(dict.fromkeys(e.row for e in encoded.examples))}
        room = max(1, student.recipe.eval.batch_tokens // int(encoded.lengths.max()))
        self._timed = encoded.examples[: min(_TIMED_ROWS, room)]
        self.num_tokens = sum(map(len, self._timed))
        self.timed_on = f"{len(self._timed)} held-out rows, {self.num_tokens:,} tokens, on {self._device}"

    def seed(self, seed: int, arms: Mapping[Any, Mapping[str, Any]]) -> Seed:
        """Computes all figures of one seed."""
        self._progress.stage(f"comparing teacher and student on {self._encoded.num_rows:,} held-out rows")
        models = {_WHO[arm.kind]: open_target(find_target(arm.model), self._progress).model for arm in arms}
        if self._cut is not None:
            models["cut"] = open_target(self._cut, self._progress).model
        num_rows, headline = self._encoded.num_rows, self._student.headline()
        scores = {
            who: HeldOutScores(self._task.spec, num_rows, headline, class_names=self._task.class_names)
            for who in ("teacher", *models)
        }
        self._score(models, scores)
        estimates = {who: score.estimates() for who, score in scores.items()}
        sides: dict[str, Any] = {
            who: {"metrics": as_metrics(of_one, **scores[who].figures())} for who, of_one in estimates.items()
        }
        sides["teacher"] |= self._teachers.costs()
        for arm, summary in arms.items():
            sides[_WHO[arm.kind]] |= _costs(models[_WHO[arm.kind]], arm.model, summary)
        if cut := models.pop("cut", None):
            sides["cut"]["num_parameters"] = num_parameters(cut)
        self._progress.stage("timing forward passes in turns")
        runs = self._teachers.runs(self._timed) | {who: self._run(model) for who, model in models.items()}
        timed = measure_latency(runs, num_tokens=self.num_tokens, device=self._device, seconds=_TIMED_SECONDS)
        for who, latency in timed.items():
            sides[who] |= latency.costs()
        between = paired(
            teacher=estimates["teacher"],
            student=estimates["student"],
            baseline=estimates.get("baseline"),
            cut=estimates.get("cut"),
        )
        return {"seed": seed, **sides, "paired": between}  # type: ignore[typeddict-item]

    @torch.no_grad()
    def _score(self, models: Mapping[str, Any], scores: Mapping[str, HeldOutScores]) -> None:
        first = next(iter(models.values()))
        for part in eval_batches(self._encoded.lengths, self._student.recipe.eval.batch_tokens):
            batch = self._task.collate([self._encoded.examples[i] for i in part], self._device)
            if self._task.spec.predicts == "boxes":
                self._score_boxes(models, scores, batch)
                continue
            outputs = {who: self._task.outputs(model, batch) for who, model in models.items()}
            counts = next(iter(outputs.values())).counts
            where = torch.tensor([self._index[e.row] for e in batch.examples]).repeat_interleave(torch.tensor(counts))
            taught = TaughtLogits(self._shares, first, batch, counts) if self._shares else None
            if self._task.spec.predicts == "numbers":
                ours = outputs["student"]
                assert ours.targets is not None and ours.unit is not None
                right = numbers_of(ours.targets, ours.unit)
                values = {who: of_one.values for who, of_one in outputs.items()}
                values |= {"teacher": taught.rows(slice(None))} if taught else {}
                for who, numbers in values.items():
                    scores[who].add_numbers(where.tolist(), numbers_of(numbers[:, 0], ours.unit), right)
                continue
            if self._task.spec.predicts == "vectors":
                for who, of_one in outputs.items():
                    assert taught is not None
                    scores[who].add_vectors(of_one.values, taught.rows(slice(None)))
                continue
            for who, of_one in outputs.items():
                for chosen in _chunks(len(of_one)):
                    logits = self._columns.of(of_one.logits(chosen))
                    theirs = taught.rows(chosen).to(logits.dtype) if taught else None
                    assert of_one.targets is not None
                    scores[who].add_logits(logits, of_one.targets[chosen], where[chosen], theirs)
            students = outputs["student"]
            for chosen in _chunks(len(students) if taught else 0):
                assert students.targets is not None and taught is not None
                scores["teacher"].add_logits(taught.rows(chosen), students.targets[chosen], where[chosen])
            if self._task.class_names and self._task.spec.classes_from == "eval.choices":
                rows = where.unique_consecutive().tolist()
                for who, model in (*models.items(), *self._teachers.choosers()):
                    columns = self._task.score(model, batch)
                    scores[who].add_choices(rows, columns["predictions"], columns["references"])
            if self._task.spec.always_writes:
                writer, rows = cast(Generates, self._task), where.unique_consecutive().tolist()
                for who, model in (*models.items(), *self._teachers.choosers()):
                    written = writer.score_answers(model, batch)
                    scores[who].add_texts(rows, written["answers"], written["reference_texts"])
            if self._task.spec.predicts == "spans":
                for who, model in (*models.items(), *self._teachers.choosers()):
                    columns = self._task.score(model, batch)
                    found = [{**answer, "row": self._index[answer["row"]]} for answer in columns["found_answers"]]
                    scores[who].add_answers(found, columns["right_answers"])

    def _score_boxes(self, models: Mapping[str, Any], scores: Mapping[str, HeldOutScores], batch: Batch) -> None:
        rows = [self._index[e.row] for e in batch.examples]
        columns = {who: self._task.score(model, batch) for who, model in models.items()}
        objects = columns["student"]["objects"]
        found = {who: of_one["found"] for who, of_one in columns.items()}
        found["teacher"] = self._teachers.found_objects(batch.examples, self._task.class_names or [])
        for who, boxes in found.items():
            scores[who].add_objects(rows, boxes, objects)

    def _run(self, model: Any) -> Callable[[], object]:
        batch = self._task.collate(self._timed, self._device)

        @torch.no_grad()
        def run() -> object:
            return self._task.outputs(model, batch).values

        return run


def _untrained_student(student: Assembly) -> Target | None:
    """The student before training; None if its answers are meaningless: with a new head or random weights."""
    if student.spec.names_classes or student.recipe.model.name.startswith("shape:"):
        return None
    return Target("base", student.loaded.derive({"distill": None, "lock": None}, name="cut"), None)


def _chunks(num: int) -> Iterator[slice]:
    for start in range(0, num, _CHUNK):
        yield slice(start, start + _CHUNK)


def _costs(model: Any, folder: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    training = summary["training"]
    return {
        "num_parameters": num_parameters(model),
        "num_trained": summary["adapter"]["num_trained"],
        "file_bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")),
        "peak_memory_bytes": training["peak_memory_bytes"],
        "seconds": training["seconds"],
        "steps": training["steps"],
    }
