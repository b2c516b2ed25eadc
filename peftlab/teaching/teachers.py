"""The teachers of a recipe together, for the loss and for the comparison of models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from peftlab import ops
from peftlab.adapters import add_adapter
from peftlab.assembly import Assembly
from peftlab.data import Rows
from peftlab.distillation import VECTOR_LOSSES, Objective, UldObjective, VectorObjective
from peftlab.distillation.cache import TeacherCache
from peftlab.errors import DataError, RecipeError
from peftlab.models import base_model, num_parameters
from peftlab.recipe.distillation import LossSection
from peftlab.tasks import Encoded, Example, Task
from peftlab.teaching.alignment import aligned_tokens, check_ids
from peftlab.teaching.caches import examples_identity, key_of, open_stored
from peftlab.teaching.teacher import NamedTeacher, TeacherModel, named_teachers
from peftlab.training.distill_loss import DistillLoss, Share
from peftlab.training.inner_losses import InnerLosses, plan_inner_losses
from peftlab.training.packing_check import check_packing
from peftlab.training.progress import Progress
from peftlab.training.teacher_outputs import (
    BackboneTeacher,
    CachedTeacher,
    Columns,
    ModelTeacher,
    Teacher,
    TranslatedTeacher,
)

_SECOND = "teacher"  # name of a second adapter on the student's backbone


class Teachers:
    """The teachers of a recipe, each loaded at first use and kept for all arms of a run.

    Args: assembly: the students' assembly, with the recipe's teachers, task and losses.
    """

    def __init__(self, assembly: Assembly, progress: Progress) -> None:
        self._assembly, self._distill, self._progress = assembly, assembly.distill, progress
        self._named = named_teachers(assembly)
        self._models: dict[int, TeacherModel] = {}
        self._caches: dict[int, TeacherCache] = {}

    def model(self, index: int) -> TeacherModel:
        """The loaded model of a teacher that is not ``self``."""
        if index not in self._models:
            self._models[index] = self._named[index].open(self._progress)
            for note in self._models[index].notes:
                self._progress.note(note)
        return self._models[index]

    def release(self) -> None:
        """Frees the loaded models; the next use loads them again."""
        self._models.clear()

    def loss(self, student: Assembly, model: Any, rows: Rows, encoded: Encoded) -> DistillLoss:
        """The loss of a student on the training examples ``encoded`` of ``rows``.

        Raises: RecipeError, DataError, ArtifactError.
        """
        d, task = self._distill, student.task
        if d.cache is not None:
            self._open_caches(examples_identity(student, rows))
        columns = self.columns()
        if columns.count is not None:
            self._check_width(model, columns.count)
        predicts = task.spec.predicts
        losses = [] if self.translated() else d.losses or [self._default_loss(task, model)]
        terms: list[Any] = [
            (loss.weight, self._objective(loss.kind)) for loss in losses if not loss.compares_layers(predicts)
        ]
        if self.translated():
            terms = [(1.0, UldObjective(d.temperature))]
        inner = self._inner(model, losses)
        if not terms and not d.hard_weight:
            self._progress.warn("the losses only compare layers: the output head learns nothing")
        packing = student.recipe.data.packing
        shares = self.shares(task, model, rows, encoded, packing=packing, stored=d.cache is not None)
        self._warn_if_larger(student, model)
        return DistillLoss(
            task,
            terms,
            shares,
            inner=inner,
            hard_weight=d.hard_weight,
            columns=columns,
            kernels=student.recipe.run.kernels,
        )

    def _warn_if_larger(self, student: Assembly, model: Any) -> None:
        """Warns about a student larger than its teacher, which is rarely intended; sizes of cached teachers are unknown."""
        largest = max((num_parameters(theirs.model) for theirs in self._models.values()), default=None)
        own = num_parameters(base_model(model))
        if student.method.adapts:
            own -= sum(p.numel() for p in model.parameters() if p.requires_grad)
        if largest is not None and own > largest:
            self._progress.warn(f"the student is larger than its teacher: {own:,} parameters against {largest:,}")

    def _open_caches(self, identity: Mapping[str, Any]) -> None:
        for index, teacher in enumerate(self._named):
            if index not in self._caches:
                self._caches[index] = open_stored(identity, self._assembly, teacher)
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

        Args: model: the student in training; None: the teachers share no model with a student, not even the backbone.
        stored: the examples are those of the caches, and the teachers' outputs are read from there.
        """
        columns, shares = self.columns(), []
        if columns.count is not None:
            check_ids(task.tokenizer, rows, encoded, columns.count)
        for index, named in enumerate(self._named):
            theirs = named.takes(rows)
            if stored:
                teacher: Teacher = self._stored(index, model, [e for e in encoded.examples if theirs[e.row]])
            else:
                teacher = self._teacher(named, task, model, rows, encoded, columns, packing=packing)
            shares.append(Share(teacher, named.section.weight, _Takes(theirs) if named.section.rows else None))
        return shares

    def columns(self) -> Columns:
        """The columns that the student and all teachers share. With stored targets no teacher is loaded for this."""
        if self._assembly.spec.predicts != "tokens":
            return Columns()
        # With a cache the columns are known without the teacher, which is not in memory while students train.
        counts = [
            cache.extra["num_classes"] if (cache := self._caches.get(i)) is not None else self.model(i).columns.count
            for i, teacher in enumerate(self._named)
            if i in self._caches or not teacher.is_self
        ]
        return Columns(min((c for c in counts if c is not None), default=None))

    def costs(self) -> dict[str, Any]:
        """The total parameters of the teachers, for the report card."""
        return {"num_parameters": sum(num_parameters(m.model) for m in self._models.values())}

    def runs(self, examples: Sequence[Example]) -> dict[str, Callable[[], object]]:
        """The forward pass of a single teacher on some of the student's examples, for timing."""
        if len(self._named) > 1:
            return {}
        theirs = self.model(0)
        batch = theirs.task.collate(list(examples), theirs.device)

        @torch.no_grad()
        def run() -> object:
            return theirs.task.outputs(theirs.model, batch).values

        return {"teacher": run}

    def found_objects(self, examples: Sequence[Example], class_names: Sequence[str]) -> list[Any]:
        """What the single teacher finds in the images of ``examples``, as ``Task.score`` gives it, with indices into
        ``class_names``."""
        theirs = self.model(0)
        found = theirs.task.score(theirs.model, theirs.task.collate(list(examples), theirs.device))["found"]
        order = [class_names.index(name) for name in theirs.task.class_names or ()]
        return [[[order[int(box[0])], *box[1:]] for box in boxes] for boxes in found]

    def choosers(self) -> list[tuple[str, Any]]:
        """The single teacher's model, if it can answer like the student: with one of eval.choices, or with a span."""
        only = len(self._named) == 1 and not self.model(0).own_texts
        return [("teacher", self.model(0).model)] if only else []

    def _stored(self, index: int, model: Any, examples: Sequence[Example]) -> CachedTeacher:
        """The cached teacher. Raises: ArtifactError if the cache has other examples, or another order."""
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
        return CachedTeacher(split.read, index_of={e.key: i for i, e in enumerate(examples)}, head=head)

    def _teacher(
        self,
        named: NamedTeacher,
        task: Task,
        model: Any | None,
        rows: Rows,
        encoded: Encoded,
        columns: Columns,
        *,
        packing: bool,
    ) -> Teacher:
        kernels = self._assembly.recipe.run.kernels
        if named.is_self and model is not None:
            if named.adapter is not None and _SECOND not in model.peft_config:
                with named.located(part="adapter"):
                    add_adapter(model, named.adapter, name=_SECOND)
            columns = named.backbone_columns(columns)
            second = None if named.adapter is None else _SECOND
            return BackboneTeacher(task, adapter=second, columns=columns, kernels=kernels)
        theirs = self.model(named.index)
        if self.translated():
            return self._translated(theirs, task, rows, encoded)
        own = theirs.read(rows, encoded.examples) if theirs.own_texts else None
        if own is not None and task.spec.predicts == "pixels" and self._assembly.recipe.data.augment is not None:
            raise RecipeError(
                f"the teacher {named.name} has another image processor and sees the images as they are, so changed masks do not fit "
                "its pixels; remove data.augment",
                key="data.augment",
            )
        packs = not packing or check_packing(theirs.model, theirs.task, encoded.examples, device=theirs.device) is None
        columns = theirs.columns if columns.count is None else columns
        return ModelTeacher(
            theirs.model, theirs.task, device=theirs.device, columns=columns, examples=own, kernels=kernels, packs=packs
        )

    def translated(self) -> bool:
        """Whether the teacher of a language model has another vocabulary."""
        return self._distill.cross_tokenizer is not None and self.model(0).own_texts

    def _translated(self, theirs: TeacherModel, task: Any, rows: Rows, encoded: Encoded) -> TranslatedTeacher:
        own, places = theirs.read(rows, encoded.examples), {}
        examples: dict[tuple[int, int], Example] = {}
        num_positions = num_aligned = 0
        for example in encoded.examples:
            other = own.get(example.key)
            pairs = aligned_tokens(task, theirs.task, rows, example, other) if other is not None else []
            assert example.trained is not None
            position = np.cumsum(example.trained) - 1
            places[example.key] = [int(position[ours]) for ours, _ in pairs]
            if other is not None and pairs:
                trained = np.zeros(len(other), dtype=bool)
                trained[[at for _, at in pairs]] = True
                examples[example.key] = dataclasses.replace(other, trained=trained, weight=float(len(pairs)))
            num_positions, num_aligned = num_positions + int(example.weight), num_aligned + len(pairs)
        if not num_aligned:
            raise DataError(
                "teacher and student tokens never start at the same byte, so uld has nothing to compare",
                key="distill.cross_tokenizer",
            )
        self._progress.note(
            f"uld: both tokenizers start a token at {num_aligned:,} of {num_positions:,} trained positions; the others learn "
            + ("only from the labels" if self._distill.hard_weight else "nothing, because hard_weight is 0")
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
        base = base_model(model)
        width = int(base.get_output_embeddings().weight.shape[0])
        if width < count:
            raise RecipeError(
                f"the student's logits have {width:,} columns, but the tokenizers share {count:,} ids: the student and its "
                "tokenizer do not match",
                key="model.name",
            )
        if width > count:
            self._progress.note(f"vocabulary: {count:,} of the student's {width:,} columns are compared")

    def _default_loss(self, task: Task, model: Any) -> LossSection:
        if task.spec.predicts == "numbers":
            return LossSection(kind="hidden_mse")
        if task.spec.predicts != "vectors":
            return LossSection(kind="forward_kl")
        models = [model] if self._named[0].is_self else [model, self.model(0).model]
        widths = [m.config.hidden_size for m in models]
        return LossSection(kind="hidden_cosine" if len(set(widths)) == 1 else "similarity_kl")

    def _inner(self, model: Any, losses: Sequence[LossSection]) -> InnerLosses | None:
        """The losses between layers. Raises: RecipeError if layers of the two models cannot be compared."""
        chosen = inner_settings(losses, self._assembly.spec.predicts)
        if not chosen:
            return None
        own = self._named[0].is_self
        if not own and self.model(0).own_texts:
            raise RecipeError(
                f"{chosen[0][0]}: the teacher uses another tokenizer, so its layers cannot be compared token by token",
                key="distill.losses",
            )
        terms = plan_inner_losses(chosen, model, model if own else self.model(0).model)
        for term in terms:
            pairs = ", ".join(f"{mine} and {other}" for mine, other in term.layers)
            self._progress.note(f"{term.kind}: layers {pairs} of student and teacher")
        return InnerLosses(terms)

    def _objective(self, kind: str) -> Objective | VectorObjective:
        d = self._distill
        if kind in VECTOR_LOSSES:
            return VectorObjective(kind)
        return Objective(kind, d.temperature, d.share, 0.0, d.scale_by_t2)


def inner_settings(losses: Sequence[LossSection], predicts: str) -> list[Any]:
    """The layer losses among ``losses``, as ``plan_inner_losses`` takes them. Args: predicts: what the task predicts."""
    return [(x.kind, x.weight, x.layers, x.relation_heads) for x in losses if x.compares_layers(predicts)]


class _Takes:
    """Whether an example belongs to the chosen rows."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __call__(self, example: Example) -> bool:
        return bool(self._rows[example.row])
