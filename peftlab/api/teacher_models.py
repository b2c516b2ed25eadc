"""One teacher of a recipe: what its name means, what its answers depend on, and the loaded model."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peftlab.adapters import brought_parameters, check_adapter_files, load_adapter
from peftlab.api import build
from peftlab.api.opening import Target, find_target, open_target
from peftlab.api.run import LOCK_NAME
from peftlab.data import Rows
from peftlab.distillation import compare, require_same
from peftlab.errors import ArtifactError, DataError, RecipeError
from peftlab.models import label_names, resolve_dtype
from peftlab.paths import sha256_of_files
from peftlab.recipe import LoadedRecipe, Recipe
from peftlab.recipe.distillation import SELF
from peftlab.tasks import Example, Task
from peftlab.training.progress import Progress
from peftlab.training.teachers import Columns

# Recipe keys of a teacher that stand for other keys while it is loaded.
_KEYS = {"model.name": "name", "model.revision": "revision", "model.quantize": "quantize", "model.dtype": "dtype"}


@dataclass(frozen=True)
class TeacherModel:
    """A teacher that was loaded.

    Attributes:
        key: of its section in the recipe. task: with its own tokenizer and classes. limit: longest text it reads, tokens.
        own_texts: whether it reads texts with another tokenizer than the student. columns: of its logits that the
            student has too. notes: what a person should know.
    """

    key: str
    name: str
    model: Any
    task: Task
    device: str
    limit: int
    own_texts: bool
    columns: Columns
    notes: list[str]


def teacher_keys(recipe: Recipe) -> list[str]:
    """The recipe key of each teacher's section."""
    assert recipe.distill is not None
    if recipe.distill.teacher is not None:
        return ["distill.teacher"]
    return [f"distill.teachers.{i}" for i in range(len(recipe.distill.teachers))]


def open_teacher(recipe: Recipe, index: int, student: Task, progress: Progress) -> TeacherModel:
    """Loads one of the recipe's teachers, which is not ``self``.

    Args: student: the student's task.
    Raises: RecipeError for another task, a missing head, other labels or another tokenizer; ArtifactError for damaged files.
    """
    assert recipe.distill is not None
    section, key = recipe.distill.all_teachers[index], teacher_keys(recipe)[index]
    progress.stage(f"loading the teacher {section.name}")
    changes: dict[str, Any] = {} if section.quantize is None else {"quantize": section.quantize}
    changes |= {} if section.dtype == "auto" else {"dtype": section.dtype}
    check_adapters(recipe, index)
    with about_teacher(recipe, index):
        target = teacher_target(recipe, index)
        adapters = [folder for folder in (target.adapter, section.adapter and Path(section.adapter)) if folder]
        changes["brought"] = {name for folder in adapters for name in brought_parameters(folder)}
        opened = open_target(target, progress, whole=True, **changes)
        model = opened.model
    if section.adapter is not None:
        with about_teacher(recipe, index, part="adapter"):
            model = load_adapter(model, Path(section.adapter), kernels=recipe.run.kernels).eval()
    columns, own_texts, notes = _columns(recipe, student, opened.task, key)
    # Its own tokenizer and classes, and the student's columns: those that it was trained with may be named otherwise.
    task = build.build_task(recipe, opened.tokenizer, None, classes=opened.task.class_names)
    return TeacherModel(key, section.name, model, task, opened.device, opened.limit, own_texts, columns, notes)


def check_teacher(recipe: Recipe, index: int, student: Task) -> None:
    """Raises what ``open_teacher`` does for another task, other labels, another tokenizer or damaged adapters; loads no
    weights.
    """
    assert recipe.distill is not None
    section = recipe.distill.all_teachers[index]
    check_adapters(recipe, index)
    if section.name == SELF and section.adapter is not None:
        return  # its labels are those of the adapter's head, which only the weights tell
    with about_teacher(recipe, index):
        target = teacher_target(recipe, index)
        theirs = target.loaded.recipe
        tokenizer = build.tokenizer_of(theirs, build.pretrained_of(theirs))
        task = build.build_task(theirs, tokenizer, None, classes=target.classes)
    _columns(recipe, student, task, teacher_keys(recipe)[index])


def check_adapters(recipe: Recipe, index: int) -> None:
    """Raises ArtifactError unless the adapters that a teacher has are there and whole."""
    assert recipe.distill is not None
    section = recipe.distill.all_teachers[index]
    if section.adapter is not None:
        with about_teacher(recipe, index, part="adapter"):
            check_adapter_files(Path(section.adapter))
    with about_teacher(recipe, index):
        target = teacher_target(recipe, index)
        if target.adapter is not None:
            check_adapter_files(target.adapter)


def teacher_identity(recipe: Recipe, index: int) -> dict[str, str]:
    """What the answers of a teacher depend on, from its files alone. Raises: RecipeError when they are not there."""
    assert recipe.distill is not None
    section = recipe.distill.all_teachers[index]
    check_adapters(recipe, index)
    with about_teacher(recipe, index):
        target = teacher_target(recipe, index)
        model = target.loaded.recipe.model
        adapters = [folder for folder in (target.adapter, section.adapter and Path(section.adapter)) if folder]
        device = build.pick_device(target.loaded.recipe.run.device)
        dtype = resolve_dtype(model.dtype if section.dtype == "auto" else section.dtype, device)
        return {
            "teacher": build.pretrained_of(target.loaded.recipe).fingerprint,
            "teacher_adapter": sha256_of_files([f for folder in adapters for f in sorted(folder.glob("adapter_*"))])
            if adapters
            else "",
            "teacher_storage": f"{section.quantize or model.quantize} {dtype}".replace("torch.", ""),
        }


def teacher_fingerprint(recipe: Recipe, index: int) -> str:
    """Hex sha256 of the teacher's files, whatever they are loaded as. Raises: as ``teacher_identity``."""
    found = teacher_identity(recipe, index)
    return hashlib.sha256(f"{found['teacher']} {found['teacher_adapter']}".encode()).hexdigest()


@contextlib.contextmanager
def about_teacher(recipe: Recipe, index: int, *, part: str = "name") -> Iterator[None]:
    """Puts the teacher's name in front of errors, and its key in place of the one they have within its own recipe."""
    assert recipe.distill is not None
    name, key = recipe.distill.all_teachers[index].name, teacher_keys(recipe)[index]
    try:
        yield
    except (RecipeError, ArtifactError) as error:
        at = f"{key}.{_KEYS.get(error.key or '', part)}"
        raise type(error)(f"the teacher {name!r}: {error}{_nearest_folder(name)}", key=at) from error


def _nearest_folder(name: str) -> str:
    """A folder that may have been meant by a name that is none; empty where there is no such."""
    path = Path(name)
    if name == SELF or path.exists() or not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], n=1)
    return f"; did you mean {str(path.with_name(near[0]))!r}?" if near else ""


def teacher_target(recipe: Recipe, index: int) -> Target:
    """What the teacher's name means: a run or a merged model with its own recipe, or a model with the student's."""
    assert recipe.distill is not None
    section = recipe.distill.all_teachers[index]
    if section.name == SELF:
        loaded = LoadedRecipe(recipe.model_copy(update={"distill": None, "lock": None}), SELF)
        return Target("base", loaded, None, _labels(loaded.recipe))
    device = {} if section.device == "auto" else {"device": section.device}
    if (Path(section.name) / LOCK_NAME).is_file():
        found = find_target(section.name)
        theirs = found.loaded.recipe
        if theirs.task != recipe.task:
            raise RecipeError(
                f"it was trained for task: {theirs.task}, and the student is for task: {recipe.task}; take a teacher of this task"
            )
        run = theirs.run.model_copy(update={"device": recipe.run.device, "kernels": recipe.run.kernels} | device)
        loaded = dataclasses.replace(found.loaded, recipe=theirs.model_copy(update={"run": run}))
        return dataclasses.replace(found, loaded=loaded)
    model = {
        "name": section.name,
        "revision": section.revision,
        "quantize": section.quantize or "none",
        "dtype": section.dtype,
        "trust_remote_code": recipe.model.trust_remote_code,
        "attention": recipe.model.attention,
    }
    if recipe.spec.generates:
        model["chat_template"] = recipe.model.chat_template
    update = {
        "model": type(recipe.model)(**model),
        "adapter": type(recipe.adapter)(),
        "run": recipe.run.model_copy(update=device),
        "distill": None,
        "lock": None,
    }
    loaded = LoadedRecipe(recipe.model_copy(update=update), section.name)
    return Target("base", loaded, None, _labels(loaded.recipe))


def _labels(recipe: Recipe) -> list[str] | None:
    """What the columns of a model's own head mean."""
    return label_names(build.pretrained_of(recipe)) if recipe.spec.classifies else None


def backbone_columns(recipe: Recipe, index: int, student: Task, columns: Columns) -> Columns:
    """Of the backbone as a teacher: its own head may have the student's classes in another order."""
    assert recipe.distill is not None
    labels = teacher_target(recipe, index).labels
    if labels is None or student.class_names is None or recipe.distill.all_teachers[index].adapter is not None:
        return columns
    return Columns(columns.count, _same_classes(student.class_names, labels, teacher_keys(recipe)[index]))


def _columns(recipe: Recipe, student: Task, theirs: Task, key: str) -> tuple[Columns, bool, list[str]]:
    """Which of the teacher's columns the student has, whether it reads texts in its own way, and notes."""
    assert recipe.distill is not None
    if recipe.spec.reader == "image processor":
        assert student.class_names is not None
        same = student.tokenizer.fingerprint == theirs.tokenizer.fingerprint
        notes = [] if same else ["teacher and student have different image processors: each sees images with its own"]
        return Columns(order=_same_classes(student.class_names, theirs.class_names or [], key)), not same, notes
    compared = compare(student.tokenizer, theirs.tokenizer)
    if recipe.spec.predicts == "tokens":
        try:
            require_same(student.tokenizer, theirs.tokenizer, cross_tokenizer=recipe.distill.cross_tokenizer)
        except RecipeError as error:
            raise RecipeError(str(error), key=f"{key}.name") from error
        if not compared.same:
            return Columns(), True, [f"teacher and student have different tokenizers: {compared.difference}"]
        return Columns(compared.num_shared_ids), False, list(compared.notes)
    order = None
    if student.class_names is not None:
        order = _same_classes(student.class_names, theirs.class_names or [], key)
    notes = (
        [] if compared.same else ["teacher and student have different tokenizers: each reads the texts with its own"]
    )
    return Columns(order=order), not compared.same, notes


def _same_classes(ours: list[str], theirs: list[str], key: str) -> tuple[int, ...] | None:
    if sorted(ours) != sorted(theirs):
        made_up = theirs == [f"LABEL_{i}" for i in range(len(theirs))]
        unnamed = (
            " (so transformers calls the labels of a model that was never trained for this task)" if made_up else ""
        )
        raise RecipeError(
            f"the teacher has other labels: {', '.join(theirs)}{unnamed}; the student's are {', '.join(ours)}. Take a teacher "
            "that was trained on these labels (or name them alike in its config)",
            key=f"{key}.name",
        )
    return None if ours == theirs else tuple(theirs.index(name) for name in ours)


def rows_of(recipe: Recipe, index: int, rows: Rows) -> np.ndarray:
    """[N] bool, the rows that a teacher answers. Raises: DataError for a column that is not there."""
    assert recipe.distill is not None
    wanted = recipe.distill.all_teachers[index].rows
    return _rows_with(rows, wanted, f"{teacher_keys(recipe)[index]}.rows")


def _rows_with(rows: Rows, wanted: Mapping[str, str | list[str]], key: str) -> Any:
    """[N] bool, rows that have one of the wanted values in each of the columns."""
    chosen = np.ones(len(rows), dtype=bool)
    for column, value in wanted.items():
        values = {value} if isinstance(value, str) else set(value)
        try:
            found = np.array([str(v) in values for v in rows.column(column)])
        except DataError as error:
            raise DataError(str(error), key=f"{key}.{column}") from None
        chosen &= found
    return chosen


def read_by(theirs: TeacherModel, rows: Rows) -> dict[int, Example]:
    """Each row as the teacher's own tokenizer has it; what is too long for it is cut."""
    encoded = theirs.task.encode(rows, max_length=theirs.limit, too_long="truncate", training=False, labelled=False)
    return {e.row: e for e in encoded.examples}
