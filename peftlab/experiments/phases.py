"""On-policy distillation on one device, in phases: the student writes answers, the teacher scores every token of them, and
the student learns from the scores. Then the next phase starts.

Only one of the two models is loaded at a time; they exchange data through files. The phases are one training: optimizer,
learning rate and random numbers continue from the checkpoint of the previous phase. Source: GKD, arXiv 2306.13649,
algorithm 1, with the student's samples renewed once per phase.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from peftlab.assembly import Assembly
from peftlab.assembly.accelerator import run_accelerator
from peftlab.assembly.account import MOST_PLACES
from peftlab.assembly.fit import Fit
from peftlab.assembly.prepare import Parts, Phase, prepare
from peftlab.data import eval_batches
from peftlab.data.ledger_text import opening_lines
from peftlab.errors import ArtifactError, DataError
from peftlab.experiments.phase_plan import PhasePlan, plan_phases
from peftlab.experiments.written_answers import ROWS_NAME, WrittenAnswer, read_answers, write_answers
from peftlab.measuring.memory import release_memory
from peftlab.runs import Run, open_run, write_json
from peftlab.tasks import Encoded, Generates
from peftlab.teaching.caches import examples_identity, is_stored
from peftlab.teaching.capture import TaughtExamples, capture_all
from peftlab.teaching.teacher import named_teachers
from peftlab.teaching.teachers import Teachers
from peftlab.training.checkpoint import list_checkpoints
from peftlab.training.progress import Progress, SilentProgress

_NOTES_NAME = "phase.json"


def train_in_phases(assembly: Assembly, folder: Path, progress: Progress) -> Run:
    """Trains the student of one seed and skips finished phases.

    Args: assembly: that of the student, with ``distill.on_policy``. folder: the training's folder, next to those of the phases.
    Raises: RecipeError, DataError, ResourceError, ArtifactError, VerificationError, Interrupted.
    """
    plan = plan_phases(assembly, folder, progress)
    for number, (first, end) in enumerate(plan.spans, start=1):
        checkpoints = list_checkpoints(folder / "checkpoints")
        done = int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0
        if done >= end:
            continue
        run = _train_phase(plan, number, checkpoints[-1] if checkpoints else None, begun=done > first)
        release_memory()
        if run.summary["status"] == "finished":  # the last phase, or eval.patience ran out
            break
    return open_run(folder)


def phase_notes(folder: Path) -> list[dict[str, Any]]:
    """Returns the notes on each phase of the finished training in ``folder``, in order, without the ledgers."""
    files = sorted(folder.parent.glob(f"phase-*/{_NOTES_NAME}"), key=lambda path: int(path.parent.name[6:]))
    notes = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    begins = [n.pop("trained_before_s") for n in notes]
    ends = [*begins[1:], open_run(folder).summary["training"]["seconds"]]
    complete = []
    for note, begin, end in zip(notes, begins, ends, strict=True):
        del note["ledger"]
        complete.append({**note, "seconds": {**note.get("seconds", {}), "training": end - begin}})
    return complete


def _train_phase(plan: PhasePlan, number: int, checkpoint: Path | None, *, begun: bool) -> Run:
    """Trains one phase. Args: begun: whether the checkpoint is from within this phase."""
    notes = _Notes(plan.folder.parent / f"phase-{number}" / _NOTES_NAME)
    if not begun:
        notes.set(trained_before_s=_seconds_of(checkpoint))
    answers = _answers(plan, number, checkpoint, notes, begun=begun)
    full = [a for a in answers if not a.is_empty]
    notes.set(
        phase=number,
        steps=list(plan.spans[number - 1]),
        rows=plan.rows,
        written=len(full),
        empty=len(answers) - len(full),
        mean_answer_tokens=float(np.mean([len(a.tokens) for a in full])) if full else 0.0,
        ended=float(np.mean([a.ended for a in full])) if full else 0.0,
    )
    taught, written = _taught(plan, number, answers, notes)
    if not is_stored(taught.assembly):
        started = time.perf_counter()
        capture_all(taught, plan.progress)
        notes.set_seconds("scoring", time.perf_counter() - started)

    with run_accelerator(plan.assembly, plan.folder) as accelerator:

        def measure(parts: Parts) -> None:
            if "kl" not in notes.values:
                with accelerator.autocast():
                    notes.set(kl=_mean_kl(taught, written, parts))
                plan.progress.note(
                    f"phase {number}: KL to the teacher {notes.values['kl']:.4f} nats per token on the student's answers"
                )

        phase = Phase(taught.rows, taught.train, plan.spans[number - 1], measure)
        teachers = Teachers(taught.assembly, plan.progress)
        parts = prepare(plan.assembly, accelerator, plan.progress, make_loss=teachers.loss, phase=phase)
        return Fit(
            parts,
            accelerator,
            plan.folder,
            plan.progress,
            checkpoint=checkpoint,
            replace=checkpoint is None,
            resume_hint=f"peftlab distill {shlex.quote(str(plan.folder.parents[1]))} --resume",
        ).run()


def _answers(
    plan: PhasePlan, number: int, checkpoint: Path | None, notes: _Notes, *, begun: bool
) -> list[WrittenAnswer]:
    """Returns the student's answers for this phase; reads them if they are stored, else generates them."""
    folder = plan.folder.parent / f"phase-{number}"
    if (folder / ROWS_NAME).is_file():
        return read_answers(folder)
    if begun:
        raise ArtifactError(
            f"{folder / ROWS_NAME} is missing, but phase {number} was trained on it; restore the file, or start over with "
            "--replace"
        )
    started = time.perf_counter()
    chosen, _ = plan.choose(number)
    examples = plan.base.train.examples
    answers = write_answers(
        plan.assembly,
        plan.base.rows,
        [examples[i].row for i in chosen],
        phase=number,
        checkpoint=checkpoint,
        folder=folder,
        progress=plan.progress,
    )
    notes.set_seconds("generating", time.perf_counter() - started)
    return answers


def _taught(
    plan: PhasePlan, number: int, answers: list[WrittenAnswer], notes: _Notes
) -> tuple[TaughtExamples, Encoded]:
    """Returns the examples of the phase, with the phase's own cache, and those that the student wrote."""
    base, assembly = plan.base, plan.assembly
    task = cast(Generates, assembly.task)
    _, own = plan.choose(number)
    rows = base.rows.select([*(a.row for a in answers), *(base.train.examples[i].row for i in own)])
    digest = hashlib.sha256(base.rows.fingerprint.encode())
    digest.update(json.dumps([(a.row, a.tokens) for a in answers]).encode())
    rows = replace(rows, fingerprint=digest.hexdigest())
    empty = np.zeros(0, dtype=np.int32)
    tokens = [empty if a.is_empty else np.array(a.tokens, dtype=np.int32) for a in answers]
    written = task.encode_answers(rows.select(range(len(answers))), tokens, max_length=assembly.limit)
    report = written.ledger.report(most_places=MOST_PLACES)
    for line in opening_lines(f"phase {number}, written by the student", report, counts=True):
        plan.progress.note(line)
    notes.set(ledger=report)
    kept = [replace(base.train.examples[i], row=len(answers) + j) for j, i in enumerate(own)]
    if not written.examples:
        raise DataError(
            f"phase {number}: the student gave only empty answers to {len(answers):,} prompts; train it on the rows first, or "
            "raise distill.on_policy.temperature",
            key="distill.on_policy",
        )
    identity = examples_identity(assembly, rows)
    cached = _with_cache(assembly, f"phase-{number}", identity)
    encoded = Encoded([*written.examples, *kept], base.train.ledger)
    return TaughtExamples(cached, rows, encoded, identity), written


def _with_cache(assembly: Assembly, name: str, identity: dict[str, Any]) -> Assembly:
    """Returns the assembly with a cache for one phase of one run. The folder name, in distill.cache, hashes everything that
    the targets depend on, so that runs that share distill.cache do not collide."""
    d = assembly.distill
    assert d.cache is not None
    teachers = [teacher.identity() for teacher in named_teachers(assembly)]
    depends = json.dumps([identity, teachers, d.targets.model_dump(), d.temperature], sort_keys=True)
    folder = Path(d.cache) / f"{name}-{hashlib.sha256(depends.encode()).hexdigest()[:12]}"
    return assembly.derive({"distill.cache": str(folder), "distill.on_policy": None})


@torch.no_grad()
def _mean_kl(taught: TaughtExamples, written: Encoded, parts: Parts) -> float:
    """Mean KL(teacher || student) in nats over the student's tokens, at distill.temperature. With targets that hold only
    some classes, the KL between the distributions they resolve, which is a lower bound."""
    forward_kl = {"distill.losses": [], "distill.share": 0.5, "distill.scale_by_t2": False, "data.packing": False}
    plain = taught.assembly.derive(forward_kl)
    loss = Teachers(plain, SilentProgress()).loss(plain, parts.model, taught.rows, taught.train)
    device = next(parts.model.parameters()).device
    parts.model.eval()
    total = 0.0
    for part in eval_batches(written.lengths, parts.recipe.eval.batch_tokens):
        total += float(loss(parts.model, parts.task.collate([written.examples[i] for i in part], device)))
    return total / sum(e.weight for e in written.examples)


class _Notes:
    """The notes on a phase, written to its folder as they become known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def set(self, **values: Any) -> None:
        self.values |= values
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, self.values)

    def set_seconds(self, what: str, seconds: float) -> None:
        self.set(seconds={**self.values.get("seconds", {}), what: seconds})


def _seconds_of(checkpoint: Path | None) -> float:
    """Training seconds up to a checkpoint."""
    if checkpoint is None:
        return 0.0
    return float(json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["counted"]["seconds"])
