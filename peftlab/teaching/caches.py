"""A recipe's teacher caches: their folders, what they store, and checks of what they were made for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peftlab.assembly import Assembly
from peftlab.data import Mask, Rows
from peftlab.distillation import fingerprint
from peftlab.distillation.cache import Fill, TeacherCache, check_begun, differences, example_key, open_cache, unfit
from peftlab.distillation.cache.manifest import CAPTURE, MANIFEST, OWN
from peftlab.errors import ArtifactError, RecipeError
from peftlab.tasks import Example
from peftlab.teaching.teacher import NamedTeacher, named_teachers

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


def examples_identity(assembly: Assembly, rows: Rows) -> dict[str, Any]:
    """What a teacher's targets for the examples of ``rows`` depend on besides the teacher."""
    recipe, task = assembly.recipe, assembly.task
    split = recipe.data.model_dump(include={"eval", "eval_fraction", "eval_rows", "exclude"})
    split["seed"] = assembly.seed
    if recipe.data.empty != "error":
        split["empty"] = recipe.data.empty
    if recipe.data.balance:
        split["balance"] = recipe.data.balance
    template = recipe.data.model_dump(include={"template", "columns", "label_names", "bins", "control_tokens"})
    if recipe.data.stride is not None:
        template["stride"] = recipe.data.stride
    if assembly.spec.reads_source:
        template |= recipe.data.model_dump(
            include={"prefix", "source_language", "target_language", "max_target_length"}
        )
    template["chat"] = getattr(task.tokenizer, "chat_template", None) if assembly.spec.chats else None
    by_image = assembly.spec.reader == "image processor"
    return {
        "task": recipe.task,
        "tokenizer": task.tokenizer.fingerprint if by_image else fingerprint(task.tokenizer),
        "template": _hash(template),
        "max_length": assembly.limit,
        "too_long": recipe.data.too_long,
        "data": rows.fingerprint,
        "split": _hash(split),
        "classes": ", ".join(task.class_names or []),
    }


def key_of(example: Example) -> int:
    """The key of an example in a cache, from its tokens and trained mask, or from the content of its image and mask."""
    if example.image is None:
        return example_key(example.ids, example.trained)
    source = example.image.source
    raw = source.read_bytes() if isinstance(source, Path) else source if isinstance(source, bytes) else source.tobytes()
    raw += example.label.content() if isinstance(example.label, Mask) else b""
    return example_key(np.frombuffer(raw, dtype=np.uint8))


def cache_folder(assembly: Assembly, teacher: NamedTeacher) -> Path:
    """The cache folder of one teacher: the recipe's folder, or a subfolder if there are several teachers."""
    assert assembly.distill.cache is not None
    folder = Path(assembly.distill.cache)
    return folder if assembly.distill.teacher is not None else folder / f"teacher-{teacher.index}"


def open_stored(examples: Mapping[str, Any], assembly: Assembly, teacher: NamedTeacher) -> TeacherCache:
    """The cache of one teacher, made by it for these examples. Only the teacher's files are read; it is not loaded.

    Args: examples: from ``examples_identity``.
    Raises: ArtifactError if the cache is missing, incomplete, damaged, or made for something else.
    """
    folder = cache_folder(assembly, teacher)
    identity = dict(examples) | teacher.identity()
    try:
        cache = open_cache(folder)
        fill = _fill_like(assembly, folder, cache.fill.settings())
        return open_cache(folder, identity=identity, fill=fill, reasons=REASONS)
    except ArtifactError as error:
        raise ArtifactError(str(error), key="distill.cache") from error


def check_cache_folder(folder: Path) -> None:
    """Raises RecipeError for a file, and for a folder with other contents, such as a model or a run."""
    if folder.is_file():
        raise RecipeError(f"{folder} is a file, not a folder; choose another folder", key="distill.cache")
    if folder.is_dir() and not any((folder / name).is_file() for name in (MANIFEST, CAPTURE)):
        others = sorted(p.name for p in folder.iterdir() if not OWN.fullmatch(p.name) and not p.name.startswith("."))
        if others:
            shown = ", ".join(others[:3])
            raise RecipeError(
                f"{folder} contains other files ({shown}) but no teacher cache; choose another folder",
                key="distill.cache",
            )


def check_begun_cache(examples: Mapping[str, Any], assembly: Assembly, teacher: NamedTeacher) -> None:
    """Raises ArtifactError for an unfinished capture that cannot be resumed: damaged, or made for something else."""
    folder = cache_folder(assembly, teacher)
    identity = dict(examples) | teacher.identity()
    try:
        check_begun(folder, lambda stored: _fill_like(assembly, folder, stored), identity, REASONS)
    except ArtifactError as error:
        raise ArtifactError(str(error), key="distill.cache") from error


def is_stored(assembly: Assembly) -> bool:
    """Whether every teacher of the recipe has a complete cache, not necessarily a matching one."""
    return all((cache_folder(assembly, teacher) / MANIFEST).is_file() for teacher in named_teachers(assembly))


def planned_fill(assembly: Assembly, skeleton: Any) -> Fill:
    """How the recipe will store the teacher ``skeleton``, from its configuration alone. Raises: RecipeError."""
    task = assembly.task
    num_classes, width = None, getattr(skeleton.config.get_text_config(), "hidden_size", None)
    if assembly.spec.predicts == "tokens":
        num_classes = len(task.tokenizer)
    elif assembly.spec.predicts == "spans":  # the positions of a window
        num_classes = width = task.max_length
    elif assembly.spec.predicts == "numbers":
        width = 1
    elif assembly.spec.one_output_per_class:
        num_classes = width = 2
    elif task.class_names:  # few classes: `hidden` stores the logits themselves
        num_classes = width = len(task.class_names)
    return fill_of(assembly, num_classes=num_classes, hidden_size=width)


def fill_of(assembly: Assembly, *, num_classes: int | None, hidden_size: int | None) -> Fill:
    """How the recipe stores a teacher with this number of classes and this width."""
    t = assembly.distill.targets
    if t.fill == "hidden":
        return Fill("hidden", hidden=t.states, hidden_size=hidden_size)
    assert num_classes is not None
    most = num_classes - (t.fill == "mixed")
    return Fill(
        t.fill,
        k=None if t.fill == "sampled" else min(_DEFAULT_K, most) if t.k is None else t.k,
        draws=None if t.fill == "topk" else t.draws,
        temperature=assembly.distill.temperature,
        values=t.values,
        num_classes=num_classes,
        seed=assembly.seed,
    )


def _fill_like(assembly: Assembly, folder: Path, stored: Mapping[str, Any]) -> Fill:
    """How the recipe stores the teacher of the cache ``stored``. Raises: ArtifactError for another kind of targets."""
    wanted = assembly.distill.targets.fill
    if unlike := differences({"fill": stored["kind"]}, {"fill": wanted}, {"fill": "made with other targets"}):
        raise unfit(f"the teacher cache {folder} does not match", unlike)
    return fill_of(assembly, num_classes=stored.get("num_classes"), hidden_size=stored.get("hidden_size"))


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
