"""From a recipe's teachers to what the loss and the comparison ask of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftlab import ops
from peftlab.adapters import add_adapter
from peftlab.api import build
from peftlab.api.stored import key_of, lesson_identity, open_stored
from peftlab.api.teacher_models import (
    TeacherModel,
    about_teacher,
    backbone_columns,
    open_teacher,
    read_by,
    rows_of,
    teacher_keys,
)
from peftlab.data import Rows
from peftlab.distillation import VECTOR_LOSSES, Objective, UldObjective, VectorObjective, aligned_answers
from peftlab.distillation.cache import TeacherCache
from peftlab.errors import DataError, RecipeError
from peftlab.models import num_parameters
from peftlab.recipe import Recipe
from peftlab.recipe.distillation import SELF, LossSection
from peftlab.tasks import Encoded, Example, Task
from peftlab.tasks.answers import answers_of
from peftlab.training.distilling import DistillLoss, Share
from peftlab.training.inner_losses import InnerLosses, plan_inner_losses
from peftlab.training.packing_check import check_packing
from peftlab.training.progress import Progress
from peftlab.training.teachers import BackboneTeacher, CachedTeacher, Columns, ModelTeacher, Teacher, TranslatedTeacher

_SECOND = "teacher"  # name of a second adapter on the student's backbone


class Teachers:
    """The teachers of a recipe, each loaded when it is first asked for and then kept for all the arms of a run."""

    def __init__(self, recipe: Recipe, progress: Progress) -> None:
        assert recipe.distill is not None
        self._recipe, self._distill, self._progress = recipe, recipe.distill, progress
        self._models: dict[int, TeacherModel] = {}
        self._caches: dict[int, TeacherCache] = {}

    def model(self, index: int, student: Task) -> TeacherModel:
        """One that is not ``self``."""
        if index not in self._models:
            self._models[index] = open_teacher(self._recipe, index, student, self._progress)
            for note in self._models[index].notes:
                self._progress.note(note)
        return self._models[index]

    def release(self) -> None:
        """Lets go of the loaded models; the next one who asks loads them again."""
        self._models.clear()

    def loss(
        self, task: Task, model: Any, data: build.DataParts, encoded: Encoded, *, limit: int, packing: bool = False
    ) -> DistillLoss:
        """The loss of a student on the training examples ``encoded``. Raises: RecipeError, DataError, ArtifactError."""
        d = self._distill
        if d.cache is not None:
            self._open_caches(lesson_identity(self._recipe, task, data, limit))
        columns = self.columns(task)
        if columns.count is not None:
            self._check_width(model, columns.count)
        losses = [] if self.translated(task) else d.losses or [self._default_loss(task, model)]
        terms: list[Any] = [
            (loss.weight, self._objective(loss.kind))
            for loss in losses
            if not loss.compares_layers(self._recipe.spec.predicts)
        ]
        if self.translated(task):
            terms = [(1.0, UldObjective(d.temperature))]
        inner = self._inner(task, model, losses)
        if not terms and not d.hard_weight:
            self._progress.warn(
                "the losses compare layers alone: what turns the last layer into answers learns nothing"
            )
        shares = self.shares(task, model, data.train, encoded, packing=packing, stored=d.cache is not None)
        self._say_if_larger(model)
        return DistillLoss(
            task,
            terms,
            shares,
            inner=inner,
            hard_weight=d.hard_weight,
            columns=columns,
            kernels=self._recipe.run.kernels,
        )

    def _say_if_larger(self, model: Any) -> None:
        """A student may be larger than its teacher, but hardly on purpose; the sizes of stored teachers are not known."""
        largest = max((num_parameters(theirs.model) for theirs in self._models.values()), default=None)
        own = num_parameters(model.get_base_model() if hasattr(model, "get_base_model") else model)
        if self._recipe.adapter.method != "none":
            own -= sum(p.numel() for p in model.parameters() if p.requires_grad)
        if largest is not None and own > largest:
            self._progress.warn(f"the student is larger than its teacher: {own:,} parameters against {largest:,}")

    def _open_caches(self, identity: Mapping[str, Any]) -> None:
        for index in range(len(self._distill.all_teachers)):
            if index not in self._caches:
                self._caches[index] = open_stored(identity, self._recipe, index)
                split = self._caches[index].manifest["splits"]["train"]
                self._progress.note(
                    f"teacher targets: {split['positions']:,} positions in {self._caches[index].folder}, "
                    f"{split['bytes_per_position']:.0f} bytes each"
                )

    def shares(
        self,
        task: Task,
        model: Any | None,
        rows: Rows,
        encoded: Encoded,
        *,
        packing: bool = False,
        stored: bool = False,
    ) -> list[Share]:
        """Each teacher with its part of the examples ``encoded`` of ``rows``.

        Args: model: the student in training; None: the teachers stand apart from any, also one that is the backbone.
        stored: the examples are those of the caches, and the teachers are read from there.
        """
        columns, found = self.columns(task), []
        if columns.count is not None:
            check_ids(task.tokenizer, rows, encoded, columns.count)
        for index, section in enumerate(self._distill.all_teachers):
            theirs = rows_of(self._recipe, index, rows)
            if stored:
                teacher: Teacher = self._stored(index, model, [e for e in encoded.examples if theirs[e.row]])
            else:
                teacher = self._teacher(index, task, model, rows, encoded, columns, packing=packing)
            found.append(Share(teacher, section.weight, _Takes(theirs) if section.rows else None))
        return found

    def columns(self, task: Task) -> Columns:
        """The columns that the student and all teachers have. Of stored targets no teacher is loaded to find out."""
        if self._recipe.spec.predicts != "tokens":
            return Columns()
        # Of a teacher whose answers are stored that is known without it: with a cache it is not in memory while students train.
        counts = [
            cache.extra["num_classes"]
            if (cache := self._caches.get(i)) is not None
            else self.model(i, task).columns.count
            for i, teacher in enumerate(self._distill.all_teachers)
            if i in self._caches or teacher.name != SELF
        ]
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

    def _stored(self, index: int, model: Any, examples: Sequence[Example]) -> CachedTeacher:
        """Raises: ArtifactError when the cache holds other examples, or they are in another order."""
        cache = self._caches[index]
        split = cache.split("train")
        split.check_keys(np.array([key_of(e) for e in examples], dtype=np.uint64))
        head = None
        if cache.fill.kind == "hidden" and cache.manifest["tensors"] is not None:
            device = next(model.parameters()).device
            tensors = {name: tensor.to(device) for name, tensor in cache.head_tensors().items()}
            transform = cache.extra["head"]
            head = ops.Head(
                ops.DenseWeight(tensors["weight"]),
                tensors.get("bias"),
                None,
                transform["softcap"],
                transform["scale"],
            )
        return CachedTeacher(split.read, index_of={e.row: i for i, e in enumerate(examples)}, head=head)

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
                with about_teacher(self._recipe, index, part="adapter"):
                    add_adapter(model, Path(section.adapter), name=_SECOND)
            columns = backbone_columns(self._recipe, index, task, columns)
            return BackboneTeacher(task, adapter=section.adapter and _SECOND, columns=columns, kernels=kernels)
        theirs = self.model(index, task)
        if self.translated(task):
            return self._translated(theirs, task, rows, encoded)
        own = read_by(theirs, rows) if theirs.own_texts else None
        packs = not packing or check_packing(theirs.model, theirs.task, encoded.examples, device=theirs.device) is None
        columns = theirs.columns if columns.count is None else columns
        return ModelTeacher(
            theirs.model, theirs.task, device=theirs.device, columns=columns, examples=own, kernels=kernels, packs=packs
        )

    def translated(self, task: Task) -> bool:
        """Whether the teacher of a language model has another vocabulary."""
        return self._distill.cross_tokenizer is not None and self.model(0, task).own_texts

    def _translated(self, theirs: TeacherModel, task: Any, rows: Rows, encoded: Encoded) -> TranslatedTeacher:
        own, places = read_by(theirs, rows), {}
        examples: dict[int, Example] = {}
        num_positions = num_aligned = 0
        for example in encoded.examples:
            other = own.get(example.row)
            pairs = _aligned(task, theirs.task, rows, example, other) if other is not None else []
            position = np.cumsum(example.trained) - 1
            places[example.row] = [int(position[ours]) for ours, _ in pairs]
            if other is not None and pairs:
                trained = np.zeros(len(other), dtype=bool)
                trained[[at for _, at in pairs]] = True
                examples[example.row] = dataclasses.replace(other, trained=trained, weight=float(len(pairs)))
            num_positions, num_aligned = num_positions + int(example.weight), num_aligned + len(pairs)
        if not num_aligned:
            raise DataError(
                "the tokenizers of teacher and student begin no token of the answers at the same byte: there is nothing to compare",
                key="distill.cross_tokenizer",
            )
        self._progress.note(
            f"uld: at {num_aligned:,} of {num_positions:,} trained positions both tokenizers begin a token; the others learn "
            "from the labels alone" + ("" if self._distill.hard_weight else ", of which hard_weight 0 takes nothing")
        )
        return TranslatedTeacher(
            theirs.model,
            theirs.task,
            device=theirs.device,
            examples=examples,
            places=places,
            num_classes=len(theirs.task.tokenizer),
        )

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
        if task.spec.predicts != "vectors":
            return LossSection(kind="forward_kl")
        section = self._distill.all_teachers[0]
        widths = [m.config.hidden_size for m in (model, *([] if section.name == SELF else [self.model(0, task).model]))]
        return LossSection(kind="hidden_cosine" if len(set(widths)) == 1 else "similarity_kl")

    def _inner(self, task: Task, model: Any, losses: Sequence[LossSection]) -> InnerLosses | None:
        """The losses between layers. Raises: RecipeError where layers of these two models cannot be compared."""
        chosen = inner_settings(self._recipe, losses)
        if not chosen:
            return None
        own = self._distill.all_teachers[0].name == SELF
        if not own and self.model(0, task).own_texts:
            raise RecipeError(
                f"{chosen[0][0]}: the teacher reads the texts with another tokenizer, so its layers are about other tokens",
                key="distill.losses",
            )
        terms = plan_inner_losses(chosen, model, model if own else self.model(0, task).model)
        for term in terms:
            pairs = ", ".join(f"{mine} and {other}" for mine, other in term.layers)
            self._progress.note(f"{term.kind}: layers {pairs} of student and teacher")
        return InnerLosses(terms)

    def _objective(self, kind: str) -> Objective | VectorObjective:
        d = self._distill
        if kind in VECTOR_LOSSES:
            return VectorObjective(kind)
        return Objective(kind, d.temperature, d.share, 0.0, d.scale_by_t2)


def inner_settings(recipe: Recipe, losses: Sequence[LossSection]) -> list[Any]:
    """Those of ``losses`` that compare layers, as ``plan_inner_losses`` takes them."""
    return [(x.kind, x.weight, x.layers, x.relation_heads) for x in losses if x.compares_layers(recipe.spec.predicts)]


class _Takes:
    """Whether an example is of the chosen rows."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __call__(self, example: Example) -> bool:
        return bool(self._rows[example.row])


def check_ids(tokenizer: Any, rows: Rows, encoded: Encoded, num_shared: int) -> None:
    """Raises DataError for the first row with a token that the student's tokenizer has and a teacher's has not."""
    for example in encoded.examples:
        if len(example.ids) and (last := int(example.ids.max())) >= num_shared:
            raise DataError(
                f"{rows.where(example.row)}: the teacher's tokenizer has no {tokenizer.convert_ids_to_tokens(last)!r} (id "
                f"{last:,}), which the student's puts into this row; take a chat template or a teacher without this difference",
                key="distill",
            )


def check_routes(recipe: Recipe, data: build.DataParts) -> None:
    """Raises DataError for a row, trained on or held out, that no teacher takes, and for a teacher that takes none."""
    assert recipe.distill is not None
    sections = list(zip(recipe.distill.all_teachers, teacher_keys(recipe), strict=True))
    for index, (section, key) in enumerate(sections):
        if section.rows and not rows_of(recipe, index, data.train).any():
            (column, wanted), *_ = section.rows.items()
            there = sorted({str(v) for v in data.train.column(column)})
            shown = ", ".join(there[:8]) + (f" and {len(there) - 8:,} more" if len(there) > 8 else "")
            raise DataError(
                f"no training row has {column}: {wanted}, so this teacher would teach nothing; there is {shown}",
                key=f"{key}.rows",
            )
    if not all(section.rows for section, _ in sections):
        return
    for rows in (data.train, data.eval):
        taught = np.any([rows_of(recipe, index, rows) for index in range(len(sections))], axis=0)
        if not taught.all():
            first = int(np.flatnonzero(~taught)[0])
            raise DataError(
                f"{rows.where(first)}: no teacher takes this row, nor {len(taught) - int(taught.sum()) - 1:,} more; leave one of "
                "the teachers without `rows`, or name the missing values",
                key=sections[0][1].rpartition(".")[0] if len(sections) > 1 else f"{sections[0][1]}.rows",
            )


def _aligned(ours: Any, theirs: Any, rows: Rows, example: Example, other: Example) -> list[tuple[int, int]]:
    """Pairs of trained tokens, ours and theirs, that begin at the same byte of an answer."""
    row, where = rows.row(example.row), rows.where(example.row)
    found = []
    both = (answers_of(task.tokenizer, task.formatter, row, where) for task in (ours, theirs))
    assert example.trained is not None
    for a, b in zip(*both, strict=False):
        for i, j in aligned_answers(a.text, a.offsets, b.text, b.offsets):
            left, right = a.tokens[i], b.tokens[j]
            if left < len(example) and example.trained[left] and 0 < right < len(other):
                found.append((left, right))
    return found
