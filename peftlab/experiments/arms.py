"""Runs the trainings of a distillation, students and baselines of all seeds, and compares them."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peftlab import formatting
from peftlab.assembly import Assembly
from peftlab.assembly.checks import check_one_process
from peftlab.assembly.fit import fit
from peftlab.assembly.merging import merge_run
from peftlab.assembly.prepare import Phase
from peftlab.assembly.witness import WITNESS_NAME
from peftlab.errors import Interrupted
from peftlab.experiments.card_figures import compare_students, no_baseline
from peftlab.experiments.distill_checks import check_models
from peftlab.experiments.found_objects import found_examples
from peftlab.experiments.linking import link_file
from peftlab.experiments.phases import phase_notes, train_in_phases
from peftlab.experiments.student import cut_student
from peftlab.experiments.taught_answers import answered_examples
from peftlab.experiments.written_answers import ROWS_NAME
from peftlab.measuring.memory import release_memory
from peftlab.ranks import is_first, on_first
from peftlab.recipe import LoadedRecipe, check_lock, write_lock
from peftlab.runs import LOCK_NAME, RUN_NAME, open_run, write_json
from peftlab.tasks import Chats
from peftlab.teaching.alignment import check_routes
from peftlab.teaching.caches import is_stored
from peftlab.teaching.capture import TaughtExamples, capture_all, taught_examples
from peftlab.teaching.teacher import named_teachers
from peftlab.teaching.teachers import Teachers
from peftlab.training.checkpoint import list_checkpoints
from peftlab.training.progress import Progress, first_in_full

STUDENT, BASELINE = "student", "labels"
# Folder of the teacher's answers in the run folder.
ANSWERS = "answers"


@dataclass(frozen=True)
class Arm:
    """One training of a distillation: ``kind`` is student or labels."""

    kind: str
    seed: int
    folder: Path

    @property
    def model(self) -> Path:
        """The trained model, as a plain transformers folder."""
        full = self.folder / "model"
        return full if full.is_dir() else self.folder / "merged"


class Distillation:
    """All trainings of a recipe with a section ``distill``.

    Args:
        assembly: that of the recipe; trains on distill.transfer if the recipe has it. folder: the run folder.
        resume: resume the run in the folder: keep finished trainings, continue an interrupted one from its newest checkpoint.
    """

    def __init__(self, assembly: Assembly, folder: Path, progress: Progress, *, resume: bool = False) -> None:
        self._assembly, self._folder, self._progress, self._resume = assembly, folder, progress, resume
        self._summary: dict[str, Any] = {}

    def check(self) -> dict[str, str]:
        """Runs every check that needs no model and returns the fingerprints, so that a mistake costs seconds and no earlier
        run. A resumed run must match its lock; a new run must match the recipe's lock, if it has one.
        """
        assembly = self._assembly
        check_routes(assembly)
        fingerprints = dict(assembly.fingerprints)
        check_models(assembly)
        for teacher in named_teachers(assembly):
            fingerprints[teacher.key.removeprefix("distill.")] = teacher.fingerprint()
        locked = open_run(self._folder).recipe() if self._resume else assembly.loaded
        for line in check_lock(locked, fingerprints=fingerprints, resumed=self._resume):
            self._progress.note(line)
        return fingerprints

    def run(self, fingerprints: dict[str, str], *, replace: bool = False) -> None:
        """Trains what is unfinished, compares the models, and publishes the first seed's student as ``student/``.

        Args: fingerprints: from ``check``. replace: overwrite an earlier run in the folder.
        Raises: RecipeError, DataError, ResourceError, ArtifactError, VerificationError, Interrupted.
        """
        if self._resume:
            on_first(lambda: _clear_partial(self._folder))
        else:
            on_first(lambda: self._begin(fingerprints, replace=replace))
        loaded = self._assembly.loaded
        with _status(loaded, self._folder, resumed=self._resume) if is_first() else contextlib.nullcontext():
            started = time.perf_counter()
            self._train_and_compare()
            self._summary["seconds"] = time.perf_counter() - started
            finished = {**_head(loaded, "finished"), **self._summary}
            on_first(lambda: write_json(self._folder / RUN_NAME, finished))

    def _begin(self, fingerprints: dict[str, str], *, replace: bool) -> None:
        """Creates the run folder with its lock file."""
        folder, assembly = self._folder, self._assembly
        if replace and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        environment = assembly.kept
        if assembly.spec.chats:
            environment["style"] = cast(Chats, assembly.task).formatter.style
        try:
            write_lock(folder / LOCK_NAME, assembly.loaded, fingerprints=fingerprints, environment=environment)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _train_and_compare(self) -> None:
        arms = list(_arms(self._assembly, self._folder))
        seeds = dict.fromkeys(arm.seed for arm in arms)
        students = {seed: self._student(seed) for seed in first_in_full(self._progress, seeds)}
        first, progress = students[arms[0].seed], self._progress
        distill = first.distill
        if distill.cache is not None and distill.on_policy is None and not is_stored(first):
            check_one_process("caching the teacher's targets", key="distill.cache", remedy="run peftlab teach first")
            progress.note(
                f"{distill.cache} is incomplete: caching the missing teacher targets first, as `peftlab teach` does"
            )
            progress.stage("reading data")
            self._summary["teach"] = capture_all(self._taught(first) or taught_examples(first), progress)
        teachers = Teachers(first, progress)
        figures: dict[Arm, dict[str, Any]] = {}
        steps: dict[int, int] = {}
        for number, arm in enumerate(arms, start=1):
            if arm.kind == BASELINE:
                teachers.release()
            what = "from the teacher" if arm.kind == STUDENT else "from the labels alone"
            progress.stage(f"training {number} of {len(arms)}: the student {what}, seed {arm.seed}")
            taught_by = teachers if arm.kind == STUDENT else None
            # Only the first training reports its details; the others differ in seed and teacher only.
            with progress.quietly() if number > 1 else contextlib.nullcontext():
                figures[arm] = self._train(students[arm.seed], arm, taught_by, steps.get(arm.seed))
            progress.done()
            progress.note(_arm_line(number, len(arms), what, arm.seed, figures[arm]))
            steps.setdefault(arm.seed, figures[arm]["training"]["steps"])
            release_memory()
        if distill.on_policy is not None:
            self._summary["on_policy"] = [
                {"seed": arm.seed, "phases": phase_notes(arm.folder)} for arm in arms if arm.kind == STUDENT
            ]
        from_weights = self._summary.get("student_init", {}).get("weights") != "random"
        self._summary |= on_first(
            lambda: compare_students(first, teachers, figures, progress, from_weights=from_weights)
        )
        on_first(lambda: _publish_student(arms[0], self._folder))

    def _student(self, seed: int) -> Assembly:
        """The assembly of a seed's students, with their initial model."""
        init = self._assembly.distill.student_init
        if init is None:
            return self._assembly
        where = self._folder / "init" if init.weights == "copied" else self._folder / f"seed-{seed}" / "init"
        if init.weights == "random" or "student_init" not in self._summary:
            self._summary["student_init"] = on_first(
                lambda: cut_student(self._assembly, where, self._progress, seed=seed)
            )
        # Use the cut student instead of the model it was cut from.
        changes = {"model.name": str(where.absolute()), "model.revision": None, "model.adapter": None}
        changes |= {"distill.student_init": None}
        return self._assembly.derive(changes)

    def _train(self, student: Assembly, arm: Arm, teachers: Teachers | None, steps: int | None) -> dict[str, Any]:
        """Trains one arm and returns its summary; a finished training is read from its folder."""
        # One split for all seeds, so that no student is scored on its training rows.
        changes = {"data.seed": student.seed, "run.seed": arm.seed, "run.dir": str(arm.folder), "lock": None}
        if teachers is None:
            # The same budget: equal steps and rows.
            changes |= {"distill": None, "train.epochs": None, "train.max_steps": steps}
        assembly = student.derive(changes, name=f"{self._assembly.name}-{arm.kind}", transfer=teachers is not None)
        if (arm.folder / LOCK_NAME).is_file() and open_run(arm.folder).is_finished:
            self._progress.note(f"{arm.folder} is already finished")
            self._merge(arm, assembly)  # the run may have stopped before the merge
            return open_run(arm.folder).summary
        if teachers is not None and assembly.distill.on_policy is not None:
            train_in_phases(assembly, arm.folder, self._progress)
        else:
            checkpoints = list_checkpoints(arm.folder / "checkpoints")
            taught = None if teachers is None else self._taught(assembly)
            fit(
                assembly,
                arm.folder,
                self._progress,
                # Boxes that the teacher found are labels like those of the data.
                make_loss=teachers.loss if teachers is not None and assembly.spec.compares_outputs else None,
                phase=None if taught is None else Phase(taught.rows, taught.train),
                checkpoint=checkpoints[-1] if checkpoints else None,
                replace=not checkpoints,
                resume_hint=_resume_hint(self._folder),
            )
        self._merge(arm, assembly)
        return open_run(arm.folder).summary

    def _taught(self, student: Assembly) -> TaughtExamples | None:
        """The training rows with the teacher's answers; None if the student learns from those of the data."""
        if student.distill.answers == "data":
            return None
        answer = answered_examples if student.spec.generates else found_examples
        return answer(student, self._folder / ANSWERS, self._progress)

    def _merge(self, arm: Arm, assembly: Assembly) -> None:
        """Merges the adapter of a training into a plain model, unless that is already done."""
        on_first(lambda: self._merge_once(arm, assembly))

    def _merge_once(self, arm: Arm, assembly: Assembly) -> None:
        if (arm.folder / "adapter").is_dir() and not (arm.folder / "merged").is_dir():
            base = "dequantized" if assembly.storage != "none" else "original"
            merge_run(arm.folder, base=base, replace=True, progress=self._progress, assembly=assembly)


def _arm_line(number: int, total: int, what: str, seed: int, summary: Mapping[str, Any]) -> str:
    """The progress line of a finished training."""
    training = summary["training"]
    return (
        f"{number:>{len(str(total))}} of {total}  {what:<21}  seed {seed:<3} {training['steps']:>6,} steps  "
        f"loss {formatting.number(training['last_loss']):<9.4g} {formatting.duration(training['seconds'])}"
    )


def _arms(assembly: Assembly, folder: Path) -> Iterator[Arm]:
    """Yields the arms, students first, so that the teacher is not in memory while the baselines train."""
    seed = assembly.recipe.run.seed
    for kind in [STUDENT] if no_baseline(assembly) else [STUDENT, BASELINE]:
        for number in range(seed, seed + assembly.distill.seeds):
            yield Arm(kind, number, folder / f"seed-{number}" / kind)


def _publish_student(arm: Arm, folder: Path) -> None:
    """Publishes the first seed's student as ``student/`` with the lock of the whole run, by a rename."""
    partial = folder / ".student.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for file in arm.model.rglob("*"):  # not copytree, whose error hides a full disk
        if file.is_file() and file.name != LOCK_NAME:
            target = partial / file.relative_to(arm.model)
            target.parent.mkdir(parents=True, exist_ok=True)
            link_file(file, target)
    shutil.copy(folder / LOCK_NAME, partial / LOCK_NAME)
    witness = arm.folder / WITNESS_NAME
    if witness.is_file():
        (folder / WITNESS_NAME).unlink(missing_ok=True)
        link_file(witness, folder / WITNESS_NAME)
    shutil.rmtree(folder / "student", ignore_errors=True)
    os.replace(partial, folder / "student")


def _clear_partial(folder: Path) -> None:
    """Removes partial files of a killed process. They may be whole models, and their names contain its process id."""
    for path in folder.glob("**/.*.partial*"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _status(loaded: LoadedRecipe, folder: Path, *, resumed: bool) -> Iterator[None]:
    """Keeps the status in run.json current. Removes a new run folder if no training reached a checkpoint, unless it was
    interrupted after cutting the student."""
    try:
        write_json(folder / RUN_NAME, _head(loaded, "running"))
        yield
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        kept = (
            resumed
            or any(any(folder.glob(f"seed-*/*/{name}")) for name in (LOCK_NAME, ROWS_NAME))
            or (folder / ANSWERS / ROWS_NAME).is_file()
            or (stopped and (folder / "init").is_dir())
        )
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        with contextlib.suppress(OSError):
            write_json(folder / RUN_NAME, _head(loaded, "interrupted" if stopped else "failed"))
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"interrupted. Resume with: {_resume_hint(folder)}") from None
        raise


def _resume_hint(folder: Path) -> str:
    return f"peftlab distill {shlex.quote(str(folder))} --resume"


def _head(loaded: LoadedRecipe, status: str) -> dict[str, Any]:
    return {"name": loaded.name, "status": status, "kind": "distill", "task": loaded.recipe.task}
