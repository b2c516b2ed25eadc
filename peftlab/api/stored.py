"""A recipe's teacher caches: where they lie, how they are filled, and what they must have been made for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peftlab.api import build
from peftlab.api.teacher_models import teacher_identity
from peftlab.distillation import fingerprint
from peftlab.distillation.cache import Fill, TeacherCache, check_begun, differences, example_key, open_cache, unfit
from peftlab.distillation.cache.manifest import CAPTURE, MANIFEST, OWN
from peftlab.errors import ArtifactError, RecipeError
from peftlab.recipe import Recipe
from peftlab.tasks import Example, Task

_DEFAULT_K = 50
REASONS = {
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


def lesson_identity(recipe: Recipe, task: Task, data: build.DataParts, limit: int) -> dict[str, Any]:
    """What a teacher's targets depend on beside the teacher."""
    split = recipe.data.model_dump(include={"eval", "eval_fraction", "eval_rows", "exclude"})
    split["seed"] = build.data_seed(recipe)
    template = recipe.data.model_dump(include={"template", "columns", "label_names", "bins"})
    template["chat"] = getattr(task.tokenizer, "chat_template", None) if recipe.spec.generates else None
    return {
        "task": recipe.task,
        "tokenizer": task.tokenizer.fingerprint
        if recipe.spec.reader == "image processor"
        else fingerprint(task.tokenizer),
        "template": _hash(template),
        "max_length": limit,
        "too_long": recipe.data.too_long,
        "data": data.train.fingerprint,
        "split": _hash(split),
        "classes": ", ".join(task.class_names or []),
    }


def key_of(example: Example) -> int:
    """What an example is known by in a cache: its tokens and which are trained, or the content of its image."""
    if example.image is None:
        return example_key(example.ids, example.trained)
    source = example.image.source
    raw = source.read_bytes() if isinstance(source, Path) else source if isinstance(source, bytes) else source.tobytes()
    return example_key(np.frombuffer(raw, dtype=np.uint8))


def cache_folder(recipe: Recipe, index: int) -> Path:
    """Of one teacher: the recipe's folder, or one inside it where there are several."""
    assert recipe.distill is not None and recipe.distill.cache is not None
    folder = Path(recipe.distill.cache)
    return folder if recipe.distill.teacher is not None else folder / f"teacher-{index}"


def open_stored(lesson_identity: Mapping[str, Any], recipe: Recipe, index: int) -> TeacherCache:
    """The cache of one teacher, made by it and for this data. Only the teacher's files are looked at, it is not loaded.

    Raises: ArtifactError when there is none, or it is not complete, damaged, or made for something else.
    """
    folder = cache_folder(recipe, index)
    identity = dict(lesson_identity) | teacher_identity(recipe, index)
    try:
        cache = open_cache(folder)
        fill = _fill_like(recipe, folder, cache.fill.settings())
        return open_cache(folder, identity=identity, fill=fill, reasons=REASONS)
    except ArtifactError as error:
        raise ArtifactError(str(error), key="distill.cache") from error


def check_cache_folder(folder: Path) -> None:
    """Raises RecipeError for a file, and for a folder of something else, such as a model or a run."""
    if folder.is_file():
        raise RecipeError(f"{folder} cannot hold a cache: it is a file; choose another folder", key="distill.cache")
    if folder.is_dir() and not any((folder / name).is_file() for name in (MANIFEST, CAPTURE)):
        others = sorted(p.name for p in folder.iterdir() if not OWN.fullmatch(p.name) and not p.name.startswith("."))
        if others:
            shown = ", ".join(others[:3])
            raise RecipeError(
                f"{folder} holds other files ({shown}) and no teacher cache; choose another folder", key="distill.cache"
            )


def check_begun_cache(lesson_identity: Mapping[str, Any], recipe: Recipe, index: int) -> None:
    """Raises ArtifactError for a capture that was cut off and cannot go on: damaged, or made for something else."""
    folder = cache_folder(recipe, index)
    identity = dict(lesson_identity) | teacher_identity(recipe, index)
    try:
        check_begun(folder, lambda found: _fill_like(recipe, folder, found), identity, REASONS)
    except ArtifactError as error:
        raise ArtifactError(str(error), key="distill.cache") from error


def _fill_like(recipe: Recipe, folder: Path, found: Mapping[str, Any]) -> Fill:
    """How the recipe stores a teacher that is stored as ``found``. Raises: ArtifactError for another kind of targets."""
    assert recipe.distill is not None
    wanted = recipe.distill.targets.fill
    if told := differences({"fill": found["kind"]}, {"fill": wanted}, {"fill": "made with other targets"}):
        raise unfit(f"the teacher cache {folder} is not for this", told)
    return fill_of(recipe, num_classes=found.get("num_classes"), hidden_size=found.get("hidden_size"))


def is_stored(recipe: Recipe) -> bool:
    """Whether every teacher of the recipe has a cache, complete or not the right one."""
    assert recipe.distill is not None
    return all((cache_folder(recipe, i) / "manifest.json").is_file() for i in range(len(recipe.distill.all_teachers)))


def planned_fill(recipe: Recipe, task: Task, skeleton: Any) -> Fill:
    """How the recipe will store the teacher ``skeleton``, from its configuration alone. Raises: RecipeError."""
    num_classes, width = None, skeleton.config.get_text_config().hidden_size
    if recipe.spec.predicts == "tokens":
        num_classes = len(task.tokenizer)
    elif task.class_names:  # few classes: their logits themselves are what `hidden` stores
        num_classes = width = len(task.class_names)
    return fill_of(recipe, num_classes=num_classes, hidden_size=width)


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
        seed=build.data_seed(recipe),
    )


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
