"""``distill``: a student learns from a teacher, next to the same student on the labels alone, and both are compared."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.api import build
from peftlab.api.check_distill import check_models
from peftlab.api.comparing import compare_students, no_baseline
from peftlab.api.merging import merge_run
from peftlab.api.on_policy import phase_notes, train_in_phases
from peftlab.api.parts import check_settings, prepare, run_accelerator
from peftlab.api.run import LOCK_NAME, RUN_NAME, Run, open_run, write_json
from peftlab.api.stored import is_stored
from peftlab.api.student import cut_student
from peftlab.api.student_answers import ROWS_NAME
from peftlab.api.teacher_models import teacher_fingerprint, teacher_keys
from peftlab.api.teachers import Teachers, check_routes
from peftlab.api.teaching import capture_all, read_lesson
from peftlab.api.training import choose_folder, execute, open_source
from peftlab.data import class_names
from peftlab.errors import Interrupted, RecipeError
from peftlab.models import load_skeleton
from peftlab.recipe import LoadedRecipe, check_lock, check_same_settings, write_lock
from peftlab.training.checkpoint import list_checkpoints
from peftlab.training.memory import frozen_heap, release_memory
from peftlab.training.progress import Progress, make_progress

STUDENT, BASELINE = "student", "labels"


@dataclass(frozen=True)
class Arm:
    """One training of a distillation: ``kind`` is student or labels."""

    kind: str
    seed: int
    folder: Path

    @property
    def model(self) -> Path:
        """Its trained model as a plain transformers folder."""
        full = self.folder / "model"
        return full if full.is_dir() else self.folder / "merged"


def distill(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    seeds: int | None = None,
    resume: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Trains the student that the recipe describes on its teacher and returns the run.

    Args:
        recipe: path, shipped name, dict, or a run folder (its recipe.lock.yaml is used), with a section ``distill``.
        overrides: ``section.key=value``.
        seeds: repetitions, in place of distill.seeds.
        resume: continue the run in the run folder: finished trainings are kept, an interrupted one goes on from its
            newest checkpoint.
        replace: an earlier run in the run folder is removed.
        progress: where progress goes; default: a live bar or plain lines on stderr.

    Returns: the ``Run``: ``student/`` is the student as a plain transformers folder, ``summary["card"]`` the report card.
    Raises: RecipeError, DataError, ResourceError, ArtifactError, VerificationError, Interrupted.
    """
    build.prepare_libraries()
    progress = progress or make_progress()
    loaded, folder = open_source(recipe, [*overrides, *([f"distill.seeds={seeds}"] if seeds else [])], resume)
    with build.located(loaded), frozen_heap(), contextlib.ExitStack() as stack:
        stack.callback(progress.stop)
        if loaded.recipe.distill is None:
            raise RecipeError(
                f"{loaded.name} has no section distill, which names the teacher; to train without one: peftlab train"
            )
        folder = folder or choose_folder(loaded, resume=resume, replace=replace)
        if resume:
            check_same_settings(loaded, open_run(folder).recipe())
        check_settings(loaded.recipe)
        fingerprints, environment = _check(loaded, folder if resume else None, progress)
        if resume:
            _clear_partial(folder)
        else:
            _begin(loaded, folder, fingerprints, environment, replace=replace)
        with _status(loaded, folder, resumed=resume):
            summary = _run(loaded, folder, progress)
            write_json(folder / RUN_NAME, {**_head(loaded, "finished"), **summary})
    return open_run(folder)


def _run(loaded: LoadedRecipe, folder: Path, progress: Progress) -> dict[str, Any]:
    started = time.perf_counter()
    recipe = loaded.recipe
    assert recipe.distill is not None
    summary: dict[str, Any] = {}
    arms = list(_arms(recipe, folder))
    beginnings: dict[int, Any] = {}
    for seed in dict.fromkeys(arm.seed for arm in arms):
        beginnings[seed] = _beginning(recipe, folder, seed, summary, progress)
    recipe = beginnings[arms[0].seed]
    if recipe.distill.cache is not None and recipe.distill.on_policy is None and not is_stored(recipe):
        progress.note(
            f"{recipe.distill.cache} does not hold all teacher targets yet: they are made first, as by `peftlab teach`"
        )
        summary["teach"] = capture_all(read_lesson(recipe, progress), progress)
    teachers = Teachers(recipe, progress)
    figures: dict[Arm, dict[str, Any]] = {}
    steps: dict[int, int] = {}
    for number, arm in enumerate(arms, start=1):
        if arm.kind == BASELINE:
            teachers.release()
        what = "from the teacher" if arm.kind == STUDENT else "from the labels alone"
        progress.note(f"training {number} of {len(arms)}: the student {what}, seed {arm.seed}")
        taught = teachers if arm.kind == STUDENT else None
        figures[arm] = _train(loaded, beginnings[arm.seed], arm, taught, steps.get(arm.seed), progress)
        steps.setdefault(arm.seed, figures[arm]["training"]["steps"])
        release_memory()
    if recipe.distill.on_policy is not None:
        summary["on_policy"] = [
            {"seed": arm.seed, "phases": phase_notes(arm.folder)} for arm in arms if arm.kind == STUDENT
        ]
    from_weights = summary.get("student_init", {}).get("weights") != "random"
    summary |= compare_students(beginnings, teachers, figures, progress, from_weights=from_weights)
    _publish_student(arms[0], folder)
    return summary | {"seconds": time.perf_counter() - started}


def _arms(recipe: Any, folder: Path) -> Iterator[Arm]:
    """The students first: the teacher is not in memory while the baselines train."""
    for kind in [STUDENT] if no_baseline(recipe) else [STUDENT, BASELINE]:
        for seed in range(recipe.run.seed, recipe.run.seed + recipe.distill.seeds):
            yield Arm(kind, seed, folder / f"seed-{seed}" / kind)


def _beginning(recipe: Any, folder: Path, seed: int, summary: dict[str, Any], progress: Progress) -> Any:
    """The recipe of a seed's students, whose model is what they begin as."""
    init = recipe.distill.student_init
    if init is None:
        return recipe
    where = folder / "init" if init.weights == "copied" else folder / f"seed-{seed}" / "init"
    if init.weights == "random" or "student_init" not in summary:
        summary["student_init"] = cut_student(recipe, where, progress, seed=seed)
    return _starting_from(recipe, where)


def _starting_from(recipe: Any, folder: Path) -> Any:
    """The recipe with the student that was cut in place of the model it was cut from."""
    model = recipe.model.model_copy(update={"name": str(folder.absolute()), "revision": None})
    distill = recipe.distill.model_copy(update={"student_init": None})
    return recipe.model_copy(update={"model": model, "distill": distill})


def _train(
    loaded: LoadedRecipe, recipe: Any, arm: Arm, teachers: Teachers | None, steps: int | None, progress: Progress
) -> dict[str, Any]:
    """The summary of one training; one that is finished already is read from its folder."""
    if (arm.folder / LOCK_NAME).is_file() and open_run(arm.folder).summary.get("status") == "finished":
        progress.note(f"{arm.folder} is finished already")
        _merge(arm, recipe, progress)  # it may have been stopped between the two
        return open_run(arm.folder).summary
    # One split for all seeds: no student is scored on rows that it has learned.
    data = recipe.data.model_copy(update={"seed": build.data_seed(recipe)})
    run = recipe.run.model_copy(update={"seed": arm.seed, "dir": str(arm.folder)})
    update: dict[str, Any] = {"data": data, "run": run, "lock": None}
    if teachers is None:
        # The same budget: as many steps, of as many rows.
        train = recipe.train.model_copy(update={"epochs": None, "max_steps": steps})
        update |= {"distill": None, "train": train}
    ours = dataclasses.replace(loaded, recipe=recipe.model_copy(update=update), name=f"{loaded.name}-{arm.kind}")
    if ours.recipe.distill is not None and ours.recipe.distill.on_policy is not None:
        train_in_phases(ours, arm.folder, progress)
    else:
        _train_at_once(ours, arm, teachers, progress)
    _merge(arm, recipe, progress)
    return open_run(arm.folder).summary


def _train_at_once(ours: LoadedRecipe, arm: Arm, teachers: Teachers | None, progress: Progress) -> None:
    checkpoints = list_checkpoints(arm.folder / "checkpoints")
    with run_accelerator(ours.recipe, arm.folder) as accelerator:
        parts = prepare(ours, accelerator, progress, teachers=teachers)
        execute(
            parts,
            accelerator,
            arm.folder,
            checkpoints[-1] if checkpoints else None,
            progress,
            replace=not checkpoints,
            resume_hint=_resume_hint(arm.folder.parents[1]),
        )


def _merge(arm: Arm, recipe: Any, progress: Progress) -> None:
    """Makes the plain model of a training that has an adapter, unless it is there."""
    if (arm.folder / "adapter").is_dir() and not (arm.folder / "merged").is_dir():
        target = "dequantized" if recipe.model.quantize != "none" else "original"
        merge_run(arm.folder, target=target, replace=True, progress=progress)


def _publish_student(arm: Arm, folder: Path) -> None:
    """The first seed's student as ``student/``, with the lock of the whole run beside it; a rename publishes it."""
    partial = folder / ".student.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for file in arm.model.rglob("*"):  # not copytree, whose error does not say that the disk is full
        if file.is_file() and file.name != LOCK_NAME:
            target = partial / file.relative_to(arm.model)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(file, target)
    shutil.copy(folder / LOCK_NAME, partial / LOCK_NAME)
    shutil.rmtree(folder / "student", ignore_errors=True)
    os.replace(partial, folder / "student")


def _link(source: Path, target: Path) -> None:
    """A second name for the same bytes where the disk allows it: a student may have gigabytes."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _check(loaded: LoadedRecipe, resumed: Path | None, progress: Progress) -> tuple[dict[str, str], dict[str, Any]]:
    """Fingerprints and environment of the run, after all that can be checked without loading a model was checked, so that
    a mistake costs seconds and no earlier run.

    Args: resumed: folder of the run that goes on, whose lock the model, the data and the teachers must still agree with;
        of a new run it is the recipe's own, where it has one.
    """
    recipe = loaded.recipe
    pretrained = build.pretrained_of(recipe)
    tokenizer = build.tokenizer_of(recipe, pretrained)
    data = build.load_data(recipe, transfer=True)
    check_routes(recipe, data)
    fingerprints = build.fingerprints_of(pretrained, tokenizer, data)
    task = build.build_task(recipe, tokenizer, data.labelled)
    check_models(recipe, task, load_skeleton(pretrained, auto_class=task.spec.auto_class, **task.model_kwargs()))
    for index, key in enumerate(teacher_keys(recipe)):
        fingerprints[key.removeprefix("distill.")] = teacher_fingerprint(recipe, index)
    locked = loaded if resumed is None else open_run(resumed).recipe()
    for line in check_lock(locked, fingerprints=fingerprints, resumed=resumed is not None):
        progress.note(line)
    return fingerprints, _environment(loaded, data)


def _begin(
    loaded: LoadedRecipe, folder: Path, fingerprints: dict[str, str], environment: dict[str, Any], *, replace: bool
) -> None:
    """The run folder with its lock file."""
    if replace and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_lock(folder / LOCK_NAME, loaded, fingerprints=fingerprints, environment=environment)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _clear_partial(folder: Path) -> None:
    """Removes what a killed process was writing: it may be a whole model, and its name has that process's number."""
    for path in folder.glob("**/.*.partial*"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _status(loaded: LoadedRecipe, folder: Path, *, resumed: bool) -> Iterator[None]:
    """Keeps run.json up to date; a new run folder is removed again where no training got as far as a checkpoint, unless it
    was stopped with a student cut already."""
    try:
        write_json(folder / RUN_NAME, _head(loaded, "running"))
        yield
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        kept = (
            resumed
            or any(any(folder.glob(f"seed-*/*/{name}")) for name in (LOCK_NAME, ROWS_NAME))
            or (stopped and (folder / "init").is_dir())
        )
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        with contextlib.suppress(OSError):
            write_json(folder / RUN_NAME, _head(loaded, "interrupted" if stopped else "failed"))
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"interrupted. Continue with: {_resume_hint(folder)}") from None
        raise


def _resume_hint(folder: Path) -> str:
    return f"peftlab distill {shlex.quote(str(folder))} --resume"


def _environment(loaded: LoadedRecipe, data: build.DataParts) -> dict[str, Any]:
    if not loaded.recipe.spec.classifies:
        return {}
    return {"class_names": class_names(build.read_class_labels(loaded.recipe, data.labelled))}


def _head(loaded: LoadedRecipe, status: str) -> dict[str, Any]:
    return {"name": loaded.name, "status": status, "kind": "distill", "task": loaded.recipe.task}
