"""Teachers: whatever tells, for the examples of a batch, what the student should say at their scored positions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftlab import ops
from peftlab.adapters import head_input
from peftlab.distillation import SparseTarget, as_teacher
from peftlab.tasks import Batch, Example, Outputs, Task, collate_packed


@dataclass(frozen=True)
class Aligned:
    """Logits [n, V] of a teacher with another vocabulary, at ``places`` [n] of the student's N positions."""

    logits: Tensor
    places: Tensor


# Logits [N, C]; or stored classes of each position; or hidden states and the head that turns them into logits; or, for
# tasks whose answer is a vector, vectors [N, H].
Taught = Tensor | SparseTarget | ops.OnlineTeacher | Aligned


class Teacher(Protocol):
    def __call__(self, student: nn.Module, batch: Batch) -> Taught:
        """What is taught at the scored positions of ``batch``, on the device of the batch. No gradient, no dropout."""

    def reference(self, student: nn.Module, examples: list[Example], device: Any) -> Tensor | SparseTarget | Aligned:
        """The same the long way, as ``Task.reference_outputs``."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a model's logits are compared.

    Attributes:
        count: leading columns; None: all. order: the student's class i is column order[i]; None: as they are.
    """

    count: int | None = None
    order: tuple[int, ...] | None = None

    def of(self, logits: Tensor) -> Tensor:
        if self.order is not None:
            return logits[..., list(self.order)]
        return logits if self.count is None else logits[..., : self.count]


class ModelTeacher:
    """Another model that runs beside the student.

    Args:
        task: the student's task, with the teacher's tokenizer where that is another one.
        device: the teacher's; its answers go to the student's.
        examples: the teacher's own example of each row, by row; None: it reads the student's.
        kernels: the mode of run.kernels.
        packs: whether it keeps packed rows apart; without it they are padded for it.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        *,
        device: Any,
        columns: Columns = Columns(),
        examples: Mapping[int, Example] | None = None,
        kernels: str = "auto",
        packs: bool = True,
    ) -> None:
        self.model, self.task, self.device = model, task, device
        self._columns, self._examples, self._kernels, self._packs = columns, examples, kernels, packs

    def network(self, student: nn.Module) -> Any:
        """The model that answers."""
        return self.model

    def __call__(self, student: nn.Module, batch: Batch) -> Taught:
        device = batch.device
        own = self._own(batch)
        # The head stays where the teacher is, so from another device the logits come, not what goes into it.
        kernels = self._kernels if _is_at(device, self.device) else "reference"
        with as_teacher(self.model), _autocast_like(device.type, self.device):
            outputs = self.task.outputs(self.model, own)
            return _to(taught(outputs, self._columns, kernels), device)

    def reference(self, student: nn.Module, examples: list[Example], device: Any) -> Tensor | SparseTarget:
        own = examples if self._examples is None else [self._examples[e.row] for e in examples]
        with as_teacher(self.model):
            values = self.task.reference_outputs(self.model, own, self.device).values
        return self._columns.of(values).to(device)

    def _own(self, batch: Batch) -> Batch:
        same_place = _is_at(batch.device, self.device)
        if self._examples is None and same_place and (self._packs or not batch.packed):
            return batch
        examples = list(batch.examples) if self._examples is None else [self._examples[e.row] for e in batch.examples]
        if self._packs and batch.packed:
            return collate_packed(examples, device=self.device)
        return self.task.collate(examples, self.device)


class TranslatedTeacher:
    """Another language model, whose tokenizer cuts texts at other places: it answers where both begin a token.

    Args:
        examples: the teacher's own example of each row; trained are the tokens that the student begins at the same byte.
        places: of each row, which of the student's positions those are.
        num_classes: leading columns of the teacher's logits that are tokens.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        *,
        device: Any,
        examples: Mapping[int, Example],
        places: Mapping[int, Sequence[int]],
        num_classes: int,
    ) -> None:
        self.model, self._task, self._device = model, task, device
        self._examples, self._places, self._num_classes = examples, places, num_classes

    def __call__(self, student: nn.Module, batch: Batch) -> Aligned:
        own = [self._examples[e.row] for e in batch.examples if self._places[e.row]]
        device = batch.device
        with as_teacher(self.model), _autocast_like(device.type, self._device):
            logits = self._task.outputs(self.model, self._task.collate(own, self._device)).logits() if own else None
        return self._aligned(logits, batch.examples, device)

    def reference(self, student: nn.Module, examples: list[Example], device: Any) -> Aligned:
        own = [self._examples[e.row] for e in examples if self._places[e.row]]
        with as_teacher(self.model):
            logits = self._task.reference_outputs(self.model, own, self._device).values if own else None
        return self._aligned(logits, examples, device)

    def _aligned(self, logits: Tensor | None, examples: Sequence[Example], device: Any) -> Aligned:
        places, start = [], 0
        for example in examples:
            assert example.trained is not None
            places += [start + place for place in self._places[example.row]]
            start += int(example.trained.sum())
        found = torch.zeros(0, self._num_classes) if logits is None else logits[:, : self._num_classes]
        return Aligned(found.to(device), torch.tensor(places, dtype=torch.int64, device=device))


class BackboneTeacher:
    """The student's own backbone: without its adapter, or with another one that is loaded beside it.

    Args: adapter: name of that other adapter in the ``PeftModel``; None: without any.
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
        """The model that answers."""
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
                with student.disable_adapter():
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
    """Targets that were stored before; see ``distill.cache``.

    Args:
        read: indices of examples -> their targets on the CPU. index_of: row -> index of its example in the cache.
        head: of the teacher whose hidden states are stored; None: classes or vectors are.
    """

    def __init__(
        self,
        read: Callable[[Sequence[int]], SparseTarget | Tensor],
        *,
        index_of: Mapping[int, int],
        head: ops.Head | None = None,
    ) -> None:
        self._read, self._index_of, self._head = read, index_of, head

    def __call__(self, student: nn.Module, batch: Batch) -> Taught:
        stored = _to(self._read([self._index_of[e.row] for e in batch.examples]), batch.device)
        if self._head is None or not isinstance(stored, Tensor):
            return stored
        return ops.OnlineTeacher(stored.to(self._dtype()), self._head)

    def reference(self, student: nn.Module, examples: list[Example], device: Any) -> Tensor | SparseTarget:
        stored = self._read([self._index_of[e.row] for e in examples])
        if self._head is None or not isinstance(stored, Tensor):
            return _to(stored, device)  # type: ignore[return-value]
        return ops.head_logits(stored.to(device, self._dtype()), self._head)

    def _dtype(self) -> torch.dtype:
        """The type that the teacher's own products with its head were in."""
        assert self._head is not None
        return self._head.weight.tensors()[0].dtype


def taught(outputs: Outputs, columns: Columns, kernels: str) -> Taught:
    """What a teacher's outputs hold for a student: of a head over many classes the hidden states, so that the logits of
    all positions never exist; where that head has no fused form, the logits."""
    if outputs.head is None:
        return columns.of(outputs.values).detach()
    head = outputs.head
    found = (
        None
        if kernels == "reference"
        else head_input(head.module, outputs.values, softcap=head.softcap, scale=head.scale, num_classes=columns.count)
    )
    if found is None:
        return columns.of(outputs.logits())
    return ops.OnlineTeacher(found.hidden, found.head)


def _to(found: Taught, device: Any) -> Taught:
    if isinstance(found, Tensor):
        return found.to(device)
    return found.to(device) if isinstance(found, SparseTarget) else found


def _is_at(device: torch.device, place: Any) -> bool:
    """Whether a tensor's ``device``, such as cuda:0, is ``place``, which may be the current device of its kind: cuda."""
    place = torch.device(place)
    return device.type == place.type and place.index in (None, device.index)


def _autocast_like(student: str, teacher: Any) -> contextlib.AbstractContextManager[Any]:
    """A teacher on the CPU computes in its own type, whatever a student on a GPU does."""
    kind = torch.device(teacher).type
    return contextlib.nullcontext() if kind == student else torch.autocast(kind, enabled=False)
