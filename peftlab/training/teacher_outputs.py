"""Teachers: they return the targets of a student at the scored positions of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftlab import ops
from peftlab.adapters import head_input, without_adapter
from peftlab.distillation import SparseTarget, as_teacher
from peftlab.tasks import Batch, Example, Outputs, Task, collate_packed


@dataclass(frozen=True)
class Aligned:
    """Logits [n, V] of a teacher with another vocabulary, at ``places`` [n] of the student's N positions."""

    logits: Tensor
    places: Tensor


# Logits [N, C]; stored classes per position; hidden states and the head that turns them into logits; or vectors [N, H]
# for tasks that predict vectors.
Taught = Tensor | SparseTarget | ops.OnlineTeacher | Aligned


class Teacher(Protocol):
    def __call__(self, student: nn.Module, batch: Batch) -> Taught:
        """Returns the targets at the scored positions of ``batch``, on its device. No gradient, no dropout."""

    def reference(self, student: nn.Module, examples: list[Example], device: Any) -> Tensor | SparseTarget | Aligned:
        """Returns the same by the reference path, as ``Task.reference_outputs``."""


@dataclass(frozen=True)
class Columns:
    """The columns of a model's logits to compare.

    Attributes:
        count: leading columns; None: all. order: the student's class i is column order[i]; None: unchanged.
    """

    count: int | None = None
    order: tuple[int, ...] | None = None

    def of(self, logits: Tensor) -> Tensor:
        if self.order is not None:
            return logits[..., list(self.order)]
        return logits if self.count is None else logits[..., : self.count]


class ModelTeacher:
    """A teacher model that runs next to the student.

    Args:
        task: the student's task, with the teacher's tokenizer if it differs.
        device: the teacher's device; its outputs move to the student's.
        examples: the teacher's own examples, by ``Example.key``; None: the student's.
        kernels: the mode of run.kernels.
        packs: whether the teacher keeps packed rows separate; if not, it gets padded rows.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        *,
        device: Any,
        columns: Columns = Columns(),
        examples: Mapping[tuple[int, int], Example] | None = None,
        kernels: str = "auto",
        packs: bool = True,
    ) -> None:
        self.model, self.task, self.device = model, task, device
        self._columns, self._examples, self._kernels, self._packs = columns, examples, kernels, packs

    def network(self, student: nn.Module) -> Any:
        """The model that computes the targets."""
        return self.model

    def __call__(self, student: nn.Module, batch: Batch) -> Taught:
        device = batch.device
        own = self._own(batch)
        # The head stays on the teacher's device; another device therefore gets logits instead of hidden states.
        kernels = self._kernels if _is_at(device, self.device) else "reference"
        with as_teacher(self.model), _autocast_like(device.type, self.device):
            outputs = self.task.outputs(self.model, own)
            return _to(taught(outputs, self._columns, kernels), device)

    def reference(self, student: nn.Module, examples: list[Example], device: Any) -> Tensor | SparseTarget:
        own = examples if self._examples is None else [self._examples[e.key] for e in examples]
        with as_teacher(self.model):
            values = self.task.reference_outputs(self.model, own, self.device).values
        return self._columns.of(values).to(device)

    def _own(self, batch: Batch) -> Batch:
        same_place = _is_at(batch.device, self.device)
        if self._examples is None and same_place and (self._packs or not batch.packed):
            return batch
        examples = list(batch.examples) if self._examples is None else [self._examples[e.key] for e in batch.examples]
        if self._packs and batch.packed:
            return collate_packed(examples, device=self.device)
        return self.task.collate(examples, self.device)


class TranslatedTeacher:
    """A language model with another tokenizer: it gives targets where tokens of both models start at the same byte.

    Args:
        examples: the teacher's own examples, by ``Example.key``; their trained tokens start at the same byte as a student's token.
        places: by the same, the student's positions of those tokens.
        num_classes: number of leading columns of the teacher's logits that are tokens.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        *,
        device: Any,
        examples: Mapping[tuple[int, int], Example],
        places: Mapping[tuple[int, int], Sequence[int]],
        num_classes: int,
    ) -> None:
        self.model, self._task, self._device = model, task, device
        self._examples, self._places, self._num_classes = examples, places, num_classes

    def __call__(self, student: nn.Module, batch: Batch) -> Aligned:
        own = [self._examples[e.key] for e in batch.examples if self._places[e.key]]
        device = batch.device
        with as_teacher(self.model), _autocast_like(device.type, self._device):
            logits = self._task.outputs(self.model, self._task.collate(own, self._device)).logits() if own else None
        return self._aligned(logits, batch.examples, device)

    def reference(self, student: nn.Module, examples: list[Example], device: Any) -> Aligned:
        own = [self._examples[e.key] for e in examples if self._places[e.key]]
        with as_teacher(self.model):
            logits = self._task.reference_outputs(self.model, own, self._device).values if own else None
        return self._aligned(logits, examples, device)

    def _aligned(self, logits: Tensor | None, examples: Sequence[Example], device: Any) -> Aligned:
        places, start = [], 0
        for example in examples:
            assert example.trained is not None
            places += [start + place for place in self._places[example.key]]
            start += int(example.trained.sum())
        aligned = torch.zeros(0, self._num_classes) if logits is None else logits[:, : self._num_classes]
        return Aligned(aligned.to(device), torch.tensor(places, dtype=torch.int64, device=device))


class BackboneTeacher:
    """The student's own backbone, without its adapter or with another loaded adapter.

    Args: adapter: name of the other adapter in the ``PeftModel``; None: no adapter.
    """

    def __init__(
        self,
        task: Task,
        *,
        adapter: str | None = None,
        columns: Columns = Columns(),
        kernels: str = "auto",
    ) -> None:
        self._task, self._adapter, self._columns, self._kernels = task, adapter, columns, kernels

    def network(self, student: nn.Module) -> Any:
        """The model that computes the targets."""
        return student

    def __call__(self, student: nn.Module, batch: Batch) -> Taught:
        with as_teacher(student), self._switched(student):
            return taught(self._task.outputs(student, batch), self._columns, self._kernels)

    def reference(self, student: nn.Module, examples: list[Example], device: Any) -> Tensor | SparseTarget:
        with as_teacher(student), self._switched(student):
            return self._columns.of(self._task.reference_outputs(student, examples, device).values)

    @contextlib.contextmanager
    def _switched(self, student: Any) -> Any:
        trained = [(p, p.requires_grad) for p in student.parameters()]
        before = student.active_adapter
        try:
            if self._adapter is None:
                with without_adapter(student):
                    yield
            else:
                student.set_adapter(self._adapter)
                yield
        finally:
            if self._adapter is not None:
                student.set_adapter(before)
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)


class CachedTeacher:
    """Cached targets; see ``distill.cache``.

    Args:
        read: example indices -> their targets on the CPU. index_of: ``Example.key`` -> index in the cache.
        head: the teacher's head, if hidden states are stored; None: classes or vectors are stored.
    """

    def __init__(
        self,
        read: Callable[[Sequence[int]], SparseTarget | Tensor],
        *,
        index_of: Mapping[tuple[int, int], int],
        head: ops.Head | None = None,
    ) -> None:
        self._read, self._index_of, self._head = read, index_of, head

    def __call__(self, student: nn.Module, batch: Batch) -> Taught:
        stored = _to(self._read([self._index_of[e.key] for e in batch.examples]), batch.device)
        if self._head is None or not isinstance(stored, Tensor):
            return stored
        return ops.OnlineTeacher(stored.to(self._dtype()), self._head)

    def reference(self, student: nn.Module, examples: list[Example], device: Any) -> Tensor | SparseTarget:
        stored = self._read([self._index_of[e.key] for e in examples])
        if self._head is None or not isinstance(stored, Tensor):
            return _to(stored, device)  # type: ignore[return-value]
        return ops.head_logits(stored.to(device, self._dtype()), self._head)

    def _dtype(self) -> torch.dtype:
        """The dtype in which the teacher multiplies with its head."""
        assert self._head is not None
        return self._head.weight.tensors()[0].dtype


def taught(outputs: Outputs, columns: Columns, kernels: str) -> Taught:
    """Returns the targets in a teacher's outputs: for a language model head hidden states, so that the logits of all positions
    never exist at once; logits if that head has no fused form."""
    if outputs.head is None:
        return columns.of(outputs.values).detach()
    head = outputs.head
    fused = (
        None
        if kernels == "reference"
        else head_input(head.module, outputs.values, softcap=head.softcap, scale=head.scale, num_classes=columns.count)
    )
    if fused is None:
        return columns.of(outputs.logits())
    return ops.OnlineTeacher(fused.hidden, fused.head)


def _to(targets: Taught, device: Any) -> Taught:
    if isinstance(targets, Tensor):
        return targets.to(device)
    return targets.to(device) if isinstance(targets, SparseTarget) else targets


def _is_at(device: torch.device, place: Any) -> bool:
    """Whether a tensor's ``device``, such as cuda:0, is ``place``, which may lack an index: cuda."""
    place = torch.device(place)
    return device.type == place.type and place.index in (None, device.index)


def _autocast_like(student: str, teacher: Any) -> contextlib.AbstractContextManager[Any]:
    """Disables autocast for a teacher on another device type, such as the CPU: it computes in its own dtype."""
    kind = torch.device(teacher).type
    return contextlib.nullcontext() if kind == student else torch.autocast(kind, enabled=False)
