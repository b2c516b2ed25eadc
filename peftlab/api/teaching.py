"""``teach``: what the teacher says about every training example, stored once for as many distillations as one likes."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peftlab.api import build
from peftlab.api.estimate import forward_seconds
from peftlab.api.parts import check_settings
from peftlab.api.run import LOCK_NAME, open_run
from peftlab.api.stored import (
    REASONS,
    cache_folder,
    check_begun_cache,
    check_cache_folder,
    fill_of,
    key_of,
    lesson_identity,
    open_stored,
    planned_fill,
)
from peftlab.api.teacher_models import (
    TeacherModel,
    check_teacher,
    open_teacher,
    read_by,
    rows_of,
    teacher_identity,
    teacher_target,
)
from peftlab.api.teachers import check_ids, check_routes
from peftlab.data import eval_batches
from peftlab.distillation.cache import SHARD_BYTES, CacheWriter, Fill, TeacherCache, open_cache
from peftlab.errors import RecipeError, ResourceError
from peftlab.models import load_skeleton, resolve_dtype, resolve_precision
from peftlab.recipe import Recipe, load_recipe
from peftlab.tasks import Encoded, Example, Outputs, Task
from peftlab.training.memory import frozen_heap, release_memory
from peftlab.training.progress import Progress, make_progress

# Examples that are answered before the first of them is written: enough to batch those of like length.
_WINDOW = 512
# Positions whose logits exist at a time: 256 x 128,256 float32 values are 131 MB.
_CHUNK = 256
_INDEX_BYTES = 20  # of each example, beside its record
_INDEX_HEADER_BYTES = 384


@dataclass(frozen=True)
class Lesson:
    """The training examples that teachers answer, and what identifies them. Nothing of a model is loaded."""

    recipe: Recipe
    task: Task
    data: build.DataParts
    train: Encoded
    identity: dict[str, Any]


def teach(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    plan: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Stores what the recipe's teacher says about its training examples in ``distill.cache``; a capture that was cut off
    goes on where it ended.

    Args:
        recipe: path, shipped name, dict, or a run folder, with a section ``distill``.
        overrides: ``section.key=value``.
        plan: say what it takes in disk and time, and do nothing.
        replace: a complete cache that is there is made anew.

    Returns: plain values, one entry per teacher: folder, examples, positions, bytes, bytes_per_position, seconds, and the
        teacher's held-out metrics; of a plan the first ones, as estimates.
    Raises: RecipeError, DataError, ResourceError, ArtifactError.
    """
    build.prepare_libraries()
    progress = progress or make_progress()
    if not isinstance(recipe, Mapping) and Path(recipe).is_dir():
        recipe = open_run(recipe).folder / LOCK_NAME
    loaded = load_recipe(recipe, overrides)
    with build.located(loaded), frozen_heap(), progress:
        settings = loaded.recipe
        if settings.distill is None:
            raise RecipeError(f"{loaded.name} has no section distill, which names the teacher")
        if settings.distill.cache is None:
            raise RecipeError("expected the folder to store the targets in, such as caches/mine", key="distill.cache")
        if settings.distill.on_policy is not None:
            raise RecipeError(
                "the teacher will read what the student writes, phase by phase: peftlab distill asks it then",
                key="distill.on_policy",
            )
        check_settings(settings)
        lesson = read_lesson(settings, progress)
        # Of all teachers, before the first of them is loaded.
        check_routes(settings, lesson.data)
        for index in range(len(settings.distill.all_teachers)):
            check_teacher(settings, index, lesson.task)
        if plan:
            return {"plan": True, "teachers": [_plan(lesson, i) for i in range(len(settings.distill.all_teachers))]}
        captured = capture_all(lesson, progress, replace=replace)
        return {"plan": False, "teachers": captured}


def read_lesson(recipe: Recipe, progress: Progress) -> Lesson:
    """The examples that the teachers answer: those that training will be on."""
    progress.stage("reading data")
    data = build.load_data(recipe, transfer=True)
    pretrained = build.pretrained_of(recipe)
    tokenizer = build.tokenizer_of(recipe, pretrained)
    task = build.build_task(recipe, tokenizer, data.labelled)
    limit = build.limit_of(recipe, pretrained, tokenizer)
    train = build.encode(recipe, task, data.train, limit=limit, training=True, labelled=data.has_labels)
    return Lesson(recipe, task, data, train, lesson_identity(recipe, task, data, limit))


def capture_all(lesson: Lesson, progress: Progress, *, replace: bool = False) -> list[dict[str, Any]]:
    """Captures every teacher, one after the other, so that no two are in memory together."""
    assert lesson.recipe.distill is not None
    found = []
    for index in range(len(lesson.recipe.distill.all_teachers)):
        identity = lesson.identity | teacher_identity(lesson.recipe, index)
        folder = cache_folder(lesson.recipe, index)
        if (folder / "manifest.json").is_file() and not replace:
            cache = open_stored(lesson.identity, lesson.recipe, index)
            progress.note(f"{folder} has them all already")
            found.append(_described(cache, lesson.recipe.distill.all_teachers[index].name, seconds=0.0))
            continue
        check_cache_folder(folder)
        if not replace:
            check_begun_cache(lesson.identity, lesson.recipe, index)
        theirs = open_teacher(lesson.recipe, index, lesson.task, progress)
        for note in theirs.notes:
            progress.note(note)
        found.append(_capture(lesson, index, theirs, identity, progress, replace=replace))
        del theirs
        release_memory()
    return found


def _examples_of(lesson: Lesson, index: int) -> list[Example]:
    """Those that a teacher answers: all, or those of its own rows."""
    theirs = rows_of(lesson.recipe, index, lesson.data.train)
    return [e for e in lesson.train.examples if theirs[e.row]]


def _capture(
    lesson: Lesson, index: int, theirs: TeacherModel, identity: dict[str, Any], progress: Progress, *, replace: bool
) -> dict[str, Any]:
    recipe, started = lesson.recipe, time.perf_counter()
    folder = cache_folder(recipe, index)
    own = read_by(theirs, lesson.data.train) if theirs.own_texts else None
    examples = _examples_of(lesson, index)
    answers = _Answers(theirs, recipe.eval.batch_tokens)
    if own is None and theirs.columns.count is not None:
        check_ids(lesson.task.tokenizer, lesson.data.train, lesson.train, theirs.columns.count)
    one = examples[:1] if own is None else [own[examples[0].row]]
    num_classes, hidden_size, head = answers.shape(one)
    transform = answers.transform(one)
    fill = fill_of(recipe, num_classes=num_classes, hidden_size=hidden_size)
    if fill.kind == "hidden" and transform and not head:
        raise RecipeError(
            "the head of this teacher is quantized or adapted, so its hidden states cannot be played back through it; merge the "
            "teacher first, or store classes (fill: topk)",
            key="distill.targets.fill",
        )
    _check_room(folder, _stored_bytes(fill, _num_positions(examples)))
    with _storing(folder), CacheWriter(folder, fill, identity, replace=replace, reasons=REASONS) as writer:
        split = writer.split("train", len(examples))
        if split.done:
            progress.note(f"{folder}: {split.done:,} of {len(examples):,} examples are there already")
        if fill.kind == "hidden" and head:
            writer.save_tensors(head)
        progress.stage(f"storing what the teacher says about {len(examples):,} examples")
        progress.start(len(examples), split.done)
        while split.done < len(examples):
            window = examples[split.done : split.done + _WINDOW]
            asked = window if own is None else [own[e.row] for e in window]
            for example, target in zip(window, answers.targets(asked, fill, first=split.done), strict=True):
                split.add(key_of(example), target)
            progress.step(split.done, {})
        progress.stop()
        writer.finish({"name": theirs.name, "num_classes": num_classes, "head": transform})
    return _described(open_cache(folder), theirs.name, seconds=time.perf_counter() - started)


@contextlib.contextmanager
def _storing(folder: Path) -> Iterator[None]:
    """Errors of the disk as errors of the recipe's cache."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk is full: {error}; free some room and run the same again: it goes on with what is stored",
                key="distill.cache",
            ) from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise RecipeError(
                f"{folder} cannot hold a cache: {error}; choose another folder", key="distill.cache"
            ) from error
        raise


def _described(cache: TeacherCache, name: str, *, seconds: float) -> dict[str, Any]:
    split = cache.manifest["splits"]["train"]
    return {
        "teacher": name,
        "folder": str(cache.folder),
        "fill": cache.fill.settings(),
        **{key: split[key] for key in ("examples", "positions", "bytes", "bytes_per_position")},
        "seconds": seconds,
    }


class _Answers:
    """Runs a teacher over examples, those of like length together, and makes the targets that are stored."""

    def __init__(self, theirs: TeacherModel, batch_tokens: int) -> None:
        self._theirs, self._batch_tokens = theirs, batch_tokens

    def shape(self, examples: Sequence[Example]) -> tuple[int | None, int, dict[str, Tensor]]:
        """Number of classes, width of what ``hidden`` stores, and the tensors of the head that goes with it."""
        outputs = self._ask(examples)
        if outputs.head is None:
            width = outputs.values.shape[1]
            return (None if outputs.vectors else width), width, {}
        module = outputs.head.module
        count = self._theirs.columns.count or int(module.weight.shape[0])
        tensors = {}
        if type(module) is nn.Linear:
            tensors = {"weight": module.weight[:count]}
            tensors |= {} if module.bias is None else {"bias": module.bias[:count]}
        return count, outputs.values.shape[1], tensors

    def transform(self, examples: Sequence[Example]) -> dict[str, float | None]:
        """Soft-cap and scale of the head."""
        head = self._ask(examples).head
        return {} if head is None else {"softcap": head.softcap, "scale": head.scale}

    def targets(self, examples: Sequence[Example], fill: Fill, *, first: int) -> list[Any]:
        """What is stored of each example; ``first`` is the number of the first of them."""
        found: dict[int, Any] = {}
        for part in eval_batches([len(e) for e in examples], self._batch_tokens):
            outputs = self._ask([examples[i] for i in part])
            end = np.cumsum(outputs.counts)
            for i, stop, count in zip(part.tolist(), end.tolist(), outputs.counts, strict=True):
                found[i] = _on_cpu(fill.target(self._parts(outputs, stop - count, stop, fill), first + i))
        return [found[i] for i in range(len(examples))]

    def _parts(self, outputs: Outputs, start: int, stop: int, fill: Fill) -> Iterator[Tensor]:
        if fill.kind == "hidden" and (outputs.head is not None or outputs.vectors):
            yield outputs.values[start:stop]
            return
        for at in range(start, max(stop, start + 1), _CHUNK):
            yield self._theirs.columns.of(outputs.logits(slice(at, min(stop, at + _CHUNK))))

    @torch.no_grad()
    def _ask(self, examples: Sequence[Example]) -> Outputs:
        t = self._theirs
        return t.task.outputs(t.model, t.task.collate(list(examples), t.device))


def _on_cpu(target: Any) -> Any:
    return target.to("cpu")


def _plan(lesson: Lesson, index: int) -> dict[str, Any]:
    """Disk and time of a capture, from the teacher's configuration alone."""
    recipe = lesson.recipe
    assert recipe.distill is not None
    target = teacher_target(recipe, index)
    theirs = target.loaded.recipe
    pretrained = build.pretrained_of(theirs)
    skeleton = load_skeleton(pretrained, auto_class=lesson.task.spec.auto_class, **lesson.task.model_kwargs())
    head = skeleton.get_output_embeddings() if recipe.spec.predicts == "tokens" else None
    fill = planned_fill(recipe, lesson.task, skeleton)
    examples = _examples_of(lesson, index)
    lengths = np.array([len(e) for e in examples], dtype=np.int64)
    counts = _num_positions(examples)
    positions, size = int(counts.sum()), _stored_bytes(fill, counts)
    if fill.kind == "hidden" and head is not None:
        size += head.weight.numel() * resolve_dtype(theirs.model.dtype, "cpu").itemsize
    seconds = forward_seconds(
        skeleton,
        tokens=int(lengths.sum()),
        squares=float((lengths.astype(np.float64) ** 2).sum()),
        scored=positions if head is not None else 0,
        dtype=resolve_precision(recipe.train.precision, build.pick_device(theirs.run.device)),
        device=build.pick_device(theirs.run.device),
        storage=theirs.model.quantize,
    )
    return {
        "teacher": recipe.distill.all_teachers[index].name,
        "folder": str(cache_folder(recipe, index)),
        "fill": fill.settings(),
        "examples": len(lengths),
        "positions": positions,
        "tokens": int(lengths.sum()),
        "bytes": int(size),
        "bytes_per_position": fill.bytes_per_position(),
        "seconds": seconds,
        "free_bytes": shutil.disk_usage(_existing(cache_folder(recipe, index))).free,
    }


def _num_positions(examples: Sequence[Example]) -> NDArray[np.float64]:
    """[N] scored positions of each example."""
    return np.array([1.0 if e.trained is None else e.weight for e in examples])


def _stored_bytes(fill: Fill, counts: NDArray[np.float64]) -> int:
    """Of examples with so many positions each; where classes are drawn, the most that it can be."""
    records = np.ceil(fill.bytes_per_position() * counts) + (2 if fill.draws else 0)  # parts begin at a whole byte
    num_shards = max(1, round(records.sum() / SHARD_BYTES))
    return int(records.sum()) + _INDEX_BYTES * len(counts) + _INDEX_HEADER_BYTES * num_shards


def _check_room(folder: Path, needed: float) -> None:
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise ResourceError(
            f"the targets need about {needed / 2**20:,.0f} MiB in {folder}, and {free / 2**20:,.0f} MiB are free; free some "
            "room, choose another folder, or store less: distill.targets.k, or fill: sampled",
            key="distill.cache",
        )


def _existing(folder: Path) -> Path:
    return next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
