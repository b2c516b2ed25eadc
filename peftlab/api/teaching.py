"""``teach``: what the teacher says about every training example, stored once for as many distillations as one likes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.api import build
from peftlab.api.parts import check_settings
from peftlab.api.run import LOCK_NAME, open_run
from peftlab.api.teachers import TeacherModel, Teachers, open_teacher, teacher_identity, teacher_keys
from peftlab.data import eval_batches
from peftlab.distill import fingerprint
from peftlab.distill.cache import CacheWriter, Fill, TeacherCache, example_key, open_cache
from peftlab.errors import ArtifactError, PeftlabError, RecipeError, ResourceError
from peftlab.evaluation.loop import evaluate_examples
from peftlab.evaluation.metrics import default_metrics
from peftlab.recipe import LoadedRecipe, Recipe, load_recipe
from peftlab.tasks import Encoded, Outputs, Task
from peftlab.training.progress import Progress, make_progress
from peftlab.training.teachers import Columns

# Examples that are answered before the first of them is written: enough to batch those of like length.
_WINDOW = 512
# Positions whose logits exist at a time: 256 x 128,256 float32 values are 131 MB.
_CHUNK = 256
_DEFAULT_K = 50
_REASONS = {
    "teacher": "made by another teacher",
    "teacher_adapter": "made by a teacher with another adapter",
    "teacher_storage": "made by a teacher in another storage",
    "tokenizer": "made with another tokenizer",
    "template": "made with another template or other columns",
    "max_length": "made with another truncation",
    "too_long": "made with another truncation",
    "data": "made for other data",
    "split": "made for another split of the data",
    "classes": "made for other classes",
}


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
    with build.located(loaded), progress:
        settings = loaded.recipe
        if settings.distill is None:
            raise RecipeError(f"{loaded.name} has no section distill, which names the teacher")
        if settings.distill.cache is None:
            raise RecipeError("expected the folder to store the targets in, such as caches/mine", key="distill.cache")
        check_settings(settings)
        lesson = read_lesson(settings, progress)
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
    labelled = data.train is data.labelled
    train = build.encode(recipe, task, data.train, limit=limit, training=True, labelled=labelled)
    return Lesson(recipe, task, data, train, lesson_identity(recipe, task, data, limit))


def lesson_identity(recipe: Recipe, task: Task, data: build.DataParts, limit: int) -> dict[str, Any]:
    """What a teacher's targets depend on beside the teacher."""
    split = recipe.data.model_dump(include={"eval", "eval_fraction", "eval_rows", "exclude"})
    split["seed"] = recipe.run.seed if recipe.data.seed is None else recipe.data.seed
    template = recipe.data.model_dump(include={"template", "columns", "label_names", "bins"})
    template["chat"] = getattr(task.tokenizer, "chat_template", None) if recipe.task == "causal_lm" else None
    return {
        "task": recipe.task,
        "tokenizer": fingerprint(task.tokenizer),
        "template": _hash(template),
        "max_length": limit,
        "too_long": recipe.data.too_long,
        "data": data.train.fingerprint,
        "split": _hash(split),
        "classes": ", ".join(task.class_names or []),
    }


def cache_folder(recipe: Recipe, index: int) -> Path:
    """Of one teacher: the recipe's folder, or one inside it where there are several."""
    assert recipe.distill is not None and recipe.distill.cache is not None
    folder = Path(recipe.distill.cache)
    return folder if recipe.distill.teacher is not None else folder / f"teacher-{index}"


def open_stored(lesson_identity: Mapping[str, Any], recipe: Recipe, index: int) -> TeacherCache:
    """The cache of one teacher, made for this data. The teacher itself need not be there; if it is, it must be the one.

    Raises: ArtifactError when there is none, or it is not complete, damaged, or made for something else.
    """
    folder = cache_folder(recipe, index)
    cache = open_cache(folder)
    identity = dict(lesson_identity)
    stored = cache.manifest["identity"]
    try:
        identity |= teacher_identity(recipe, index)
    except PeftlabError:
        identity |= {name: value for name, value in stored.items() if name.startswith("teacher")}
    fill = fill_of(recipe, num_classes=cache.fill.num_classes, hidden_size=cache.fill.hidden_size)
    return open_cache(folder, identity=identity, fill=fill, reasons=_REASONS)


def is_stored(recipe: Recipe) -> bool:
    """Whether every teacher of the recipe has a cache, complete or not the right one."""
    assert recipe.distill is not None
    return all(
        (cache_folder(recipe, i) / "manifest.json").is_file() for i in range(len(recipe.distill.all_teachers))
    )


def fill_of(recipe: Recipe, *, num_classes: int | None, hidden_size: int | None) -> Fill:
    """How the recipe stores a teacher of so many classes and such a width."""
    assert recipe.distill is not None
    t = recipe.distill.targets
    if t.fill == "hidden":
        return Fill("hidden", hidden=t.states, hidden_size=hidden_size)
    assert num_classes is not None
    most = num_classes - (t.fill == "mixed")
    return Fill(
        t.fill,
        k=None if t.fill == "sampled" else min(_DEFAULT_K, most) if t.k is None else t.k,
        draws=None if t.fill == "topk" else t.draws,
        temperature=recipe.distill.temperature,
        values=t.values,
        num_classes=num_classes,
        seed=recipe.run.seed,
    )


def capture_all(lesson: Lesson, progress: Progress, *, replace: bool = False) -> list[dict[str, Any]]:
    """Captures every teacher, one after the other, so that no two are in memory together."""
    assert lesson.recipe.distill is not None
    found = []
    for index in range(len(lesson.recipe.distill.all_teachers)):
        identity = lesson.identity | teacher_identity(lesson.recipe, index)
        theirs = open_teacher(lesson.recipe, index, lesson.task, progress)
        for note in theirs.notes:
            progress.note(note)
        found.append(_capture(lesson, index, theirs, identity, progress, replace=replace))
        del theirs
        release_memory()
    return found


def _capture(
    lesson: Lesson, index: int, theirs: TeacherModel, identity: dict[str, Any], progress: Progress, *, replace: bool
) -> dict[str, Any]:
    recipe, started = lesson.recipe, time.perf_counter()
    folder = cache_folder(recipe, index)
    own = Teachers.read_by(theirs, lesson.data.train) if theirs.own_texts else None
    examples = lesson.train.examples
    answers = _Answers(theirs, recipe.eval.batch_tokens)
    num_classes, hidden_size, head = answers.shape(examples[:1] if own is None else [own[examples[0].row]])
    fill = fill_of(recipe, num_classes=num_classes, hidden_size=hidden_size)
    _check_room(folder, fill.bytes_per_position() * float(sum(e.weight for e in examples)))
    with CacheWriter(folder, fill, identity, replace=replace, reasons=_REASONS) as writer:
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
                split.add(example_key(example.ids, example.trained), target)
            progress.step(split.done, {})
        progress.stop()
        writer.finish({"name": theirs.name, "num_classes": num_classes, **_head_numbers(answers)})
    described = open_cache(folder).manifest["splits"]["train"]
    return {
        "teacher": theirs.name,
        "folder": str(folder),
        "fill": fill.settings(),
        "examples": described["examples"],
        "positions": described["positions"],
        "bytes": described["bytes"],
        "bytes_per_position": described["bytes_per_position"],
        "seconds": time.perf_counter() - started,
    }
