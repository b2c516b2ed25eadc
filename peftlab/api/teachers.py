"""From a recipe's teachers to what the loss and the comparison ask of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftlab.adapters import add_adapter, check_adapter_files, load_adapter
from peftlab.api import build
from peftlab.api.opening import Target, find_target, open_target
from peftlab.api.run import LOCK_NAME
from peftlab.data import Rows
from peftlab.distill import VECTOR_LOSSES, Objective, VectorObjective, compare, fingerprint, require_same
from peftlab.errors import ArtifactError, DataError, RecipeError
from peftlab.models import label_names, num_parameters
from peftlab.paths import sha256_of_files
from peftlab.recipe import LoadedRecipe, Recipe
from peftlab.recipe.distillation import SELF, LossSection
from peftlab.tasks import Encoded, Example, Task
from peftlab.training.distilling import DistillLoss, Share
from peftlab.training.packing_check import check_packing
from peftlab.training.progress import Progress
from peftlab.training.teachers import BackboneTeacher, Columns, ModelTeacher, Teacher

_SECOND = "teacher"  # name of a second adapter on the student's backbone
# Recipe keys of a teacher that stand for other keys while it is loaded.
_KEYS = {"model.name": "name", "model.revision": "revision", "model.quantize": "quantize", "model.dtype": "dtype"}


@dataclass(frozen=True)
class TeacherModel:
    """A teacher that was loaded.

    Attributes:
        key: of its section in the recipe. task: with its own tokenizer and classes. identity: what its answers depend on.
        own_texts: whether it reads texts with another tokenizer than the student. columns: of its logits that the
            student has too. notes: what a person should know.
    """

    key: str
    name: str
    model: Any
    task: Task
    device: str
    limit: int
    identity: dict[str, str]
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
    try:
        target = _target(recipe, index)
        changes = {} if section.quantize is None else {"quantize": section.quantize}
        changes |= {} if section.dtype == "auto" else {"dtype": section.dtype}
        opened = open_target(target, progress, whole=True, **changes)
        model = opened.model
        if section.adapter is not None:
            check_adapter_files(Path(section.adapter))
            model = load_adapter(model, Path(section.adapter), kernels=recipe.run.kernels).eval()
    except (RecipeError, ArtifactError) as error:
        at = f"{key}.{_KEYS.get(error.key or '', 'name')}"
        raise type(error)(f"the teacher {section.name!r}: {error}", key=at) from error
    columns, own_texts, notes = _columns(recipe, student, opened.task, key)
    storage = target.loaded.recipe.model.quantize if section.quantize is None else section.quantize
    adapter = target.adapter if section.adapter is None else Path(section.adapter)
    identity = {
        "teacher": opened.pretrained.fingerprint,
        "teacher_adapter": sha256_of_files(sorted(adapter.glob("adapter_*"))) if adapter is not None else "",
        "teacher_storage": f"{storage} {next(model.parameters()).dtype}".replace("torch.", ""),
        "teacher_tokenizer": _fingerprint(opened.tokenizer),
    }
    return TeacherModel(
        key, section.name, model, opened.task, opened.device, opened.limit, identity, own_texts, columns, notes
    )


def _target(recipe: Recipe, index: int) -> Target:
    """What the teacher's name means: a run or a merged model with its own recipe, or a model with the student's."""
    assert recipe.distill is not None
    section = recipe.distill.all_teachers[index]
    if section.name == SELF:
        return Target("base", LoadedRecipe(recipe.model_copy(update={"distill": None, "lock": None}), SELF), None)
    device = {} if section.device == "auto" else {"device": section.device}
    if (Path(section.name) / LOCK_NAME).is_file():
        found = find_target(section.name)
        theirs = found.loaded.recipe
        if theirs.task != recipe.task:
            raise RecipeError(f"it was trained for task: {theirs.task}, and the student is for task: {recipe.task}")
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
    if recipe.task == "causal_lm":
        model["chat_template"] = recipe.model.chat_template
    update = {
        "model": type(recipe.model)(**model),
        "adapter": type(recipe.adapter)(),
        "run": recipe.run.model_copy(update=device),
        "distill": None,
        "lock": None,
    }
    loaded = LoadedRecipe(recipe.model_copy(update=update), section.name)
    labels = None
    if recipe.classifies:
        labels = label_names(build.pretrained_of(loaded.recipe))
    return Target("base", loaded, None, labels)


def _columns(recipe: Recipe, student: Task, theirs: Task, key: str) -> tuple[Columns, bool, list[str]]:
    """Which of the teacher's columns the student has, whether it reads texts in its own way, and notes."""
    assert recipe.distill is not None
    if recipe.task == "image_cls":
        assert student.class_names is not None
        same = student.tokenizer.fingerprint == theirs.tokenizer.fingerprint
        notes = (
            [] if same else ["teacher and student have different image processors: each sees the images with its own"]
        )
        return Columns(order=_same_classes(student.class_names, theirs.class_names or [], key)), not same, notes
    compared = compare(student.tokenizer, theirs.tokenizer)
    if recipe.task == "causal_lm":
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


def _fingerprint(tokenizer: Any) -> str:
    return str(tokenizer.fingerprint) if hasattr(tokenizer, "fingerprint") else fingerprint(tokenizer)


def _same_classes(ours: list[str], theirs: list[str], key: str) -> tuple[int, ...] | None:
    if sorted(ours) != sorted(theirs):
        raise RecipeError(
            f"the teacher has other labels: {', '.join(theirs)}; the student's are {', '.join(ours)}. Take a teacher that was "
            "trained on these labels (or name them alike in its config)",
            key=f"{key}.name",
        )
    return None if ours == theirs else tuple(theirs.index(name) for name in ours)


class Teachers:
    """The teachers of a recipe, each loaded when it is first asked for and then kept for all the arms of a run."""

    def __init__(self, recipe: Recipe, progress: Progress) -> None:
        assert recipe.distill is not None
        self._recipe, self._distill, self._progress = recipe, recipe.distill, progress
        self._models: dict[int, TeacherModel] = {}

    def model(self, index: int, student: Task) -> TeacherModel:
        """One that is not ``self``."""
        if index not in self._models:
            self._models[index] = open_teacher(self._recipe, index, student, self._progress)
            for note in self._models[index].notes:
                self._progress.note(note)
        return self._models[index]

    def loss(self, task: Task, model: Any, rows: Rows, encoded: Encoded, *, packing: bool = False) -> DistillLoss:
        """The loss of a student on the training examples ``encoded`` of ``rows``. Raises: RecipeError, DataError."""
        d, columns = self._distill, self.columns(task)
        if columns.count is not None:
            self._check_width(model, columns.count)
        terms = [(loss.weight, self._objective(loss.kind)) for loss in d.losses or [self._default_loss(task, model)]]
        shares = self.shares(task, model, rows, encoded, packing=packing)
        return DistillLoss(
            task, terms, shares, hard_weight=d.hard_weight, columns=columns, kernels=self._recipe.run.kernels
        )

    def shares(
        self, task: Task, model: Any | None, rows: Rows, encoded: Encoded, *, packing: bool = False
    ) -> list[Share]:
        """Each teacher with its part of the examples ``encoded`` of ``rows``.

        Args: model: the student in training; None: the teachers stand apart from any, also one that is the backbone.
        """
        columns, found = self.columns(task), []
        taught = np.zeros(len(rows), dtype=bool)
        for index, section in enumerate(self._distill.all_teachers):
            theirs = np.ones(len(rows), dtype=bool)
            if section.rows:
                theirs = _rows_with(rows, section.rows, f"{teacher_keys(self._recipe)[index]}.rows")
            taught |= theirs
            teacher = self._teacher(index, task, model, rows, encoded, columns, packing=packing)
            found.append(Share(teacher, section.weight, _Takes(theirs) if section.rows else None))
        for example in encoded.examples:
            if not taught[example.row]:
                raise DataError(
                    f"{rows.where(example.row)}: no teacher takes this row; leave one of the teachers without `rows`",
                    key="distill.teachers",
                )
        return found

    def columns(self, task: Task) -> Columns:
        """The columns that the student and all teachers have."""
        if self._recipe.task != "causal_lm":
            return Columns()
        counts = [self.model(i, task).columns.count for i, t in enumerate(self._distill.all_teachers) if t.name != SELF]
        return Columns(min((c for c in counts if c is not None), default=None))

    def costs(self) -> dict[str, Any]:
        """Parameters of the teachers together, for the report card."""
        return {"num_parameters": sum(num_parameters(m.model) for m in self._models.values())}

    def runs(self, task: Task, examples: Sequence[Example]) -> dict[str, Callable[[], object]]:
        """The forward pass of a single teacher on some of the student's examples, to be timed."""
        if len(self._distill.all_teachers) > 1:
            return {}
        theirs = self.model(0, task)
        batch = theirs.task.collate(list(examples), theirs.device)

        @torch.no_grad()
        def run() -> object:
            return theirs.task.outputs(theirs.model, batch).values

        return {"teacher": run}

    def choosers(self, task: Task) -> list[tuple[str, Any]]:
        """The single teacher's model, where it can be asked to choose as the student is."""
        only = len(self._distill.all_teachers) == 1 and not self.model(0, task).own_texts
        return [("teacher", self.model(0, task).model)] if only else []

    def _teacher(
        self,
        index: int,
        task: Task,
        model: Any | None,
        rows: Rows,
        encoded: Encoded,
        columns: Columns,
        *,
        packing: bool,
    ) -> Teacher:
        section, kernels = self._distill.all_teachers[index], self._recipe.run.kernels
        if section.name == SELF and model is not None:
            if section.adapter is not None and _SECOND not in model.peft_config:
                add_adapter(model, Path(section.adapter), name=_SECOND)
            return BackboneTeacher(task, adapter=section.adapter and _SECOND, columns=columns, kernels=kernels)
        theirs = self.model(index, task)
        own = self._read_by(theirs, rows) if theirs.own_texts else None
        packs = not packing or check_packing(theirs.model, theirs.task, encoded.examples, device=theirs.device) is None
        columns = theirs.columns if columns.count is None else columns
        return ModelTeacher(
            theirs.model, theirs.task, device=theirs.device, columns=columns, examples=own, kernels=kernels, packs=packs
        )

    def _read_by(self, theirs: TeacherModel, rows: Rows) -> dict[int, Example]:
        """Each row as the teacher's own tokenizer has it; what is too long for it is cut."""
        encoded = theirs.task.encode(rows, max_length=theirs.limit, too_long="truncate", training=False, labelled=False)
        return {e.row: e for e in encoded.examples}

    def _check_width(self, model: Any, count: int) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        width = int(base.get_output_embeddings().weight.shape[0])
        if width < count:
            raise RecipeError(
                f"the student's logits have {width:,} columns and the tokenizers share {count:,} ids: the student and its "
                "tokenizer do not belong together",
                key="model.name",
            )
        if width > count:
            self._progress.note(f"vocabulary: {count:,} ids are compared of the student's {width:,} columns")

    def _default_loss(self, task: Task, model: Any) -> LossSection:
        if task.answers != "vectors":
            return LossSection(kind="forward_kl")
        section = self._distill.all_teachers[0]
        widths = [m.config.hidden_size for m in (model, *([] if section.name == SELF else [self.model(0, task).model]))]
        return LossSection(kind="hidden_cosine" if len(set(widths)) == 1 else "similarity_kl")

    def _objective(self, kind: str) -> Objective | VectorObjective:
        d = self._distill
        if kind in VECTOR_LOSSES:
            return VectorObjective(kind)
        return Objective(kind, d.temperature, d.share, 0.0, d.scale_by_t2)


class _Takes:
    """Whether an example is of the chosen rows."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __call__(self, example: Example) -> bool:
        return bool(self._rows[example.row])


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
