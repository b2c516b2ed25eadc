"""One teacher of a recipe: resolves its name, identifies its outputs, and loads the model."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peftlab.adapters import brought_parameters, check_adapter_files, load_adapter
from peftlab.assembly import Assembly
from peftlab.assembly.process import pick_device
from peftlab.assembly.target import Target, find_target, open_target
from peftlab.data import Rows
from peftlab.distillation import compare, require_same
from peftlab.errors import ArtifactError, DataError, RecipeError, listed
from peftlab.models import label_names, resolve_dtype
from peftlab.paths import sha256_of_files
from peftlab.recipe import LoadedRecipe
from peftlab.recipe.distillation import SELF, TeacherSection
from peftlab.runs import LOCK_NAME
from peftlab.specs.kernels import KERNEL_MODES
from peftlab.tasks import Example, Task
from peftlab.training.progress import Progress
from peftlab.training.teacher_outputs import Columns

# Recipe keys used while a teacher is loaded -> the teacher's keys for error messages.
_KEYS = {"model.name": "name", "model.revision": "revision", "model.quantize": "quantize", "model.dtype": "dtype"}


@dataclass(frozen=True)
class TeacherModel:
    """A loaded teacher.

    Attributes:
        key: the key of its section in the recipe. task: its task, with its own tokenizer and classes. limit: maximum length
            of a text in tokens.
        own_texts: whether it reads texts with another tokenizer than the student. columns: the columns of its logits that
            the student has too. notes: notes for the user.
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

    def read(self, rows: Rows, examples: Sequence[Example]) -> dict[tuple[int, int], Example]:
        """The examples by ``Example.key``, encoded with the teacher's own tokenizer and truncated to its limit.

        Args: examples: the student's, whose masks say which pixels are compared.
        """
        labelled = self.task.spec.predicts == "pixels" and any(e.label is not None for e in examples)
        encoded = self.task.encode(rows, max_length=self.limit, too_long="truncate", training=False, labelled=labelled)
        return {e.key: e for e in encoded.examples}


class NamedTeacher:
    """One teacher in a recipe; nothing is loaded before ``open``.

    Args: assembly: the student's assembly. index: its index among the teachers of the recipe.
    """

    def __init__(self, assembly: Assembly, index: int) -> None:
        self._assembly, self.index = assembly, index
        self.section: TeacherSection = assembly.distill.all_teachers[index]
        single = assembly.distill.teacher is not None
        self.key = "distill.teacher" if single else f"distill.teachers.{index}"

    @property
    def name(self) -> str:
        return self.section.name

    @property
    def is_self(self) -> bool:
        """Whether it is the student's own backbone."""
        return self.section.name == SELF

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter that the recipe loads onto it."""
        return None if self.section.adapter is None else Path(self.section.adapter)

    @functools.cached_property
    def target(self) -> Target:
        """The target of the name: a run or a merged model with its own recipe, or a model with the student's recipe.

        Raises: RecipeError.
        """
        student = self._assembly.recipe
        if self.is_self:
            loaded = self._assembly.loaded.derive({"distill": None, "lock": None, "run.merge": "none"}, name=SELF)
            return Target("base", loaded, None, self._labels(loaded))
        device = {} if self.section.device == "auto" else {"run.device": self.section.device}
        if (Path(self.name) / LOCK_NAME).is_file():
            target = find_target(self.name)
            theirs = target.loaded.recipe
            if theirs.spec.what != student.spec.what:
                raise RecipeError(
                    f"it was trained for {theirs.spec.what}, but the student is for {student.spec.what}; use a teacher of "
                    "the student's task"
                )
            changes: dict[str, Any] = {
                "run.device": student.run.device,
                "run.kernels": _kernels(student.run.kernels),
            } | device
            return dataclasses.replace(target, loaded=target.loaded.derive(changes))
        model = {
            "name": self.name,
            "revision": self.section.revision,
            "quantize": self.section.quantize or "none",
            "dtype": self.section.dtype,
            "trust_remote_code": student.model.trust_remote_code,
            "attention": student.model.attention,
        }
        if "model.chat_template" in student.spec.keys:
            model["chat_template"] = student.model.chat_template
        changes = {"model": model, "adapter": {}, "distill": None, "lock": None, "run.merge": "none"}
        changes |= {"run.kernels": _kernels(student.run.kernels)} | device
        loaded = self._assembly.loaded.derive(changes, name=self.name)
        return Target("base", loaded, None, self._labels(loaded))

    def _labels(self, loaded: LoadedRecipe) -> list[str] | None:
        """The labels of the columns of a model's own head."""
        return label_names(Assembly(loaded).pretrained) if loaded.recipe.spec.names_classes else None

    def open(self, progress: Progress) -> TeacherModel:
        """Loads the teacher, which is not ``self``.

        Raises: RecipeError for another task, a missing head, other labels or another tokenizer; ArtifactError for damaged
            files.
        """
        progress.stage(f"loading the teacher {self.name}")
        changes: dict[str, Any] = {} if self.section.quantize is None else {"quantize": self.section.quantize}
        changes |= {} if self.section.dtype == "auto" else {"dtype": self.section.dtype}
        self.check_adapters()
        with self.located():
            changes["brought"] = {name for folder in self._adapters() for name in brought_parameters(folder)}
            opened = open_target(self.target, progress, whole=True, **changes)
            model = opened.model
        if self.adapter is not None:
            with self.located(part="adapter"):
                model = load_adapter(model, self.adapter, kernels=self._assembly.recipe.run.kernels).eval()
        columns, own_texts, notes = self._columns(opened.task)
        # Its own tokenizer and classes, but the student's data columns: its training data may have had other names.
        task = self._assembly.task_for(
            opened.assembly.reader, classes=opened.task.class_names, pretrained=opened.assembly.pretrained
        )
        task.padding = opened.task.padding
        return TeacherModel(self.key, self.name, model, task, opened.device, opened.limit, own_texts, columns, notes)

    def check(self) -> None:
        """Raises the errors of ``open`` for another task, labels or tokenizer, or damaged adapters; loads no weights."""
        self.check_adapters()
        if self.is_self and self.adapter is not None:
            return  # its labels are those of the adapter's head, which only the weights show
        with self.located():
            task = self.target.assembly().task
        self._columns(task)

    def check_adapters(self) -> None:
        """Raises ArtifactError unless the teacher's adapters exist and are complete."""
        if self.adapter is not None:
            with self.located(part="adapter"):
                check_adapter_files(self.adapter)
        with self.located():
            if self.target.adapter is not None:
                check_adapter_files(self.target.adapter)

    def skeleton(self) -> Any:
        """The teacher without weights. Raises: RecipeError."""
        return self.target.assembly().skeleton(self._assembly.task)

    def identity(self) -> dict[str, str]:
        """What the outputs depend on, from the files only. Raises: RecipeError if they are missing."""
        self.check_adapters()
        with self.located():
            recipe, adapters = self.target.loaded.recipe, self._adapters()
            dtype = recipe.model.dtype if self.section.dtype == "auto" else self.section.dtype
            resolved = resolve_dtype(dtype, pick_device(recipe.run.device))
            files = [file for folder in adapters for file in sorted(folder.glob("adapter_*"))]
            return {
                "teacher": self.target.assembly().pretrained.fingerprint,
                "teacher_adapter": sha256_of_files(files) if adapters else "",
                "teacher_storage": f"{self.section.quantize or recipe.model.quantize} {resolved}".replace("torch.", ""),
            }

    def fingerprint(self) -> str:
        """Hex sha256 of the files, independent of dtype and quantization. Raises: as ``identity``."""
        identity = self.identity()
        return hashlib.sha256(f"{identity['teacher']} {identity['teacher_adapter']}".encode()).hexdigest()

    def takes(self, rows: Rows) -> np.ndarray:
        """[N] bool, the rows of this teacher. Raises: DataError for a missing column."""
        return _rows_with(rows, self.section.rows, f"{self.key}.rows")

    def backbone_columns(self, columns: Columns) -> Columns:
        """The columns of the backbone as a teacher: its own head may order the student's classes differently."""
        labels, classes = self.target.labels, self._assembly.task.class_names
        if labels is None or classes is None or self.adapter is not None:
            return columns
        return Columns(columns.count, self._same_classes(classes, labels))

    @contextlib.contextmanager
    def located(self, *, part: str = "name") -> Iterator[None]:
        """Prefixes errors with the teacher's name, and replaces the key in the teacher's own recipe by the teacher's key."""
        try:
            yield
        except (RecipeError, ArtifactError) as error:
            at = f"{self.key}.{_KEYS.get(error.key or '', part)}"
            message = f"the teacher {self.name!r}: {error}{_nearest_folder(self.name)}"
            raise type(error)(message, key=at) from error

    def _adapters(self) -> list[Path]:
        return [folder for folder in (self.target.adapter, self.adapter) if folder is not None]

    def _columns(self, theirs: Task) -> tuple[Columns, bool, list[str]]:
        """The teacher's columns that the student has too, whether it tokenizes texts differently, and notes."""
        student, spec = self._assembly.task, self._assembly.spec
        if spec.reader == "image processor":
            assert student.class_names is not None
            same = student.tokenizer.fingerprint == theirs.tokenizer.fingerprint
            notes = (
                [] if same else ["teacher and student have different image processors: each sees images with its own"]
            )
            order = self._same_classes(student.class_names, theirs.class_names or [])
            return Columns(order=order), not same, notes
        compared = compare(student.tokenizer, theirs.tokenizer)
        if spec.predicts == "tokens":
            try:
                cross = self._assembly.distill.cross_tokenizer
                require_same(student.tokenizer, theirs.tokenizer, cross_tokenizer=cross)
            except RecipeError as error:
                raise RecipeError(str(error), key=f"{self.key}.name") from error
            if not compared.same:
                return Columns(), True, [f"teacher and student have different tokenizers: {compared.difference}"]
            return Columns(compared.num_shared_ids), False, list(compared.notes)
        if spec.predicts == "spans" and not compared.same:
            raise RecipeError(
                "teacher and student have different tokenizers, so the positions of their windows are not the same: "
                f"{compared.difference}. Use a teacher with the student's tokenizer",
                key=f"{self.key}.name",
            )
        order = None
        if student.class_names is not None:
            order = self._same_classes(student.class_names, theirs.class_names or [])
        notes = ["teacher and student have different tokenizers: each reads the texts with its own"]
        return Columns(order=order), not compared.same, [] if compared.same else notes

    def _same_classes(self, ours: list[str], theirs: list[str]) -> tuple[int, ...] | None:
        if sorted(ours) != sorted(theirs):
            is_default = theirs == [f"LABEL_{i}" for i in range(len(theirs))]
            unnamed = " (transformers' default labels of a model not trained for this task)" if is_default else ""
            raise RecipeError(
                f"the teacher has other labels: {listed(theirs)}{unnamed}; the student's are {listed(ours)}. Use a teacher "
                "trained on these labels, or rename the labels in its config",
                key=f"{self.key}.name",
            )
        if ours != theirs and self._assembly.spec.one_output_per_class:
            raise RecipeError(
                f"the teacher has the labels in another order: {listed(theirs)}; the student's are {listed(ours)}. Use a teacher "
                "trained on the same rows",
                key=f"{self.key}.name",
            )
        return None if ours == theirs else tuple(theirs.index(name) for name in ours)


def named_teachers(assembly: Assembly) -> list[NamedTeacher]:
    """The teachers of a recipe, in order."""
    return [NamedTeacher(assembly, index) for index in range(len(assembly.distill.all_teachers))]


def _kernels(students: str) -> str:
    """The teacher's kernel mode: the student's, but without rounded operands, which are for the student's adapter."""
    return "auto" if KERNEL_MODES[students].operands is not None else students


def _nearest_folder(name: str) -> str:
    """A suggestion of a folder with a similar name; empty if there is none."""
    path = Path(name)
    if name == SELF or path.exists() or not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], n=1)
    return f"; did you mean {str(path.with_name(near[0]))!r}?" if near else ""


def _rows_with(rows: Rows, wanted: Mapping[str, str | list[str]], key: str) -> np.ndarray:
    """[N] bool, rows with one of the wanted values in each of the columns."""
    chosen = np.ones(len(rows), dtype=bool)
    for column, value in wanted.items():
        values = {value} if isinstance(value, str) else set(value)
        try:
            chosen &= np.array([str(v) in values for v in rows.column(column)])
        except DataError as error:
            raise DataError(str(error), key=f"{key}.{column}") from None
    return chosen
