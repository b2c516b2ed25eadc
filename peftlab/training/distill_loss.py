"""The loss of a distillation, for the training loop: compares a task's outputs with its teachers' outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftlab import ops
from peftlab.adapters import head_input
from peftlab.distillation import GradientReport, Objective, SparseTarget, UldObjective, VectorObjective, gradient_report
from peftlab.models.inner import InnerStates
from peftlab.tasks import Batch, Example, Outputs, Task, weighted_sum
from peftlab.training.inner_losses import InnerLosses
from peftlab.training.teacher_outputs import Aligned, BackboneTeacher, Columns, ModelTeacher, Taught, Teacher


@dataclass(frozen=True)
class Share:
    """A teacher and its ``weight`` in the loss of its examples. ``takes``: whether an example is its own; None: all."""

    teacher: Teacher
    weight: float = 1.0
    takes: Callable[[Example], bool] | None = None


class DistillLoss:
    """Computes, for a student and a batch, the sum over positions of ``hard_weight * CE + (1 - hard_weight) * sum of
    weight * D(teacher, student)``, times the example's weight.

    Args:
        terms: ``(weight, objective)`` per divergence, each with ``hard_weight`` 0, or one that includes the labels' part;
            empty if only layers are compared.
        inner: losses between layers, added to those of ``terms``; they need a single live teacher that reads the
            student's own examples.
        shares: the teachers. The weights of the teachers of one example are normalised to a sum of 1.
        columns: the columns of the student's logits to compare.
        kernels: the mode of run.kernels.
    """

    def __init__(
        self,
        task: Task,
        terms: Sequence[tuple[float, Objective | VectorObjective | UldObjective]],
        shares: Sequence[Share],
        *,
        inner: InnerLosses | None = None,
        hard_weight: float = 0.0,
        columns: Columns = Columns(),  # noqa: B008  (frozen)
        kernels: str = "auto",
    ) -> None:
        self._task, self._shares, self._columns, self._kernels = task, list(shares), columns, kernels
        self._hard_weight = hard_weight
        self._terms, self._inner = list(terms), inner
        self._mixed = None
        only = len(terms) == 1 and len(shares) == 1 and shares[0].takes is None
        if only and terms[0][0] == 1 and isinstance(terms[0][1], Objective):
            # One divergence and one teacher for all rows: the labels' part shares the pass over the classes.
            self._mixed = replace(terms[0][1], hard_weight=hard_weight)

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        # Teachers first, before the student's graph takes memory.
        with self._recording(student, teacher=True) as theirs:
            parts = [(chosen, share, share.teacher(student, own)) for share, chosen, own in self._parts(batch)]
        with self._recording(student, teacher=False) as ours:
            outputs = self._task.outputs(student, batch)
        return self._loss(outputs, batch.examples, parts) + self._inner_loss(outputs, batch.examples, ours, theirs)

    def reference(self, student: nn.Module, examples: list[Example], device: Any) -> Tensor:
        """Computes the same by the reference path, with full logits and plain losses, for the parity gate."""
        parts = []
        with self._recording(student, teacher=True) as theirs:
            for share in self._shares:
                chosen = _chosen(share, examples)
                if any(chosen):
                    own = [e for e, c in zip(examples, chosen, strict=True) if c]
                    parts.append((chosen, share, share.teacher.reference(student, own, device)))
        with self._recording(student, teacher=False) as ours:
            outputs = self._task.reference_outputs(student, examples, device)
        return self._loss(outputs, examples, parts) + self._inner_loss(outputs, examples, ours, theirs)

    @torch.no_grad()
    def gradients(self, student: nn.Module, batch: Batch) -> GradientReport | None:
        """Compares the norms of the teacher's and the labels' gradients on ``batch``; None if one of them is missing, or
        with several teachers or losses."""
        if self._inner is not None or not (len(self._terms) == 1 and len(self._shares) == 1):
            return None
        objective = self._terms[0][1]
        taught = _dense(self._shares[0].teacher(student, batch)) if isinstance(objective, Objective) else None
        outputs = self._task.outputs(student, batch)
        if taught is None or outputs.targets is None or not len(outputs):
            return None
        assert isinstance(objective, Objective)
        return gradient_report(
            self._columns.of(outputs.logits()),
            taught,
            outputs.targets,
            kind=objective.kind,
            temperature=objective.temperature,
            share=objective.share,
            hard_weight=self._hard_weight,
            scale_by_t2=objective.scale_by_t2,
            hidden=None if outputs.head is None else outputs.values,
        )

    @contextlib.contextmanager
    def _recording(self, student: nn.Module, *, teacher: bool) -> Iterator[InnerStates | None]:
        """Records the inner states of the student or its teacher; yields None without losses between layers."""
        if self._inner is None:
            yield None
            return
        model = student
        if teacher:
            theirs = self._shares[0].teacher
            assert len(self._shares) == 1 and isinstance(theirs, ModelTeacher | BackboneTeacher)
            model = theirs.network(student)
        with self._inner.recording(model, teacher=teacher) as states:
            yield states

    def _inner_loss(
        self, outputs: Outputs, examples: Sequence[Example], ours: InnerStates | None, theirs: InnerStates | None
    ) -> Tensor | float:
        if self._inner is None or self._hard_weight == 1:
            return 0.0
        assert ours is not None and theirs is not None
        weights = torch.ones(len(outputs)) if outputs.weights is None else outputs.weights
        counted = torch.stack([part.double().sum() for part in weights.split(list(outputs.counts))])
        counted = counted.to(outputs.values.device)
        return (1 - self._hard_weight) * self._inner.loss_sum(ours, theirs, examples, counted)

    def _parts(self, batch: Batch) -> list[tuple[Share, list[bool], Batch]]:
        """Each teacher with its examples and their batch."""
        parts = []
        for share in self._shares:
            chosen = _chosen(share, batch.examples)
            if all(chosen):
                parts.append((share, chosen, batch))
            elif any(chosen):
                parts.append((share, chosen, _only(share, batch)))
        return parts

    def _loss(
        self,
        outputs: Outputs,
        examples: Sequence[Example],
        parts: Sequence[tuple[list[bool], Share, Taught]],
    ) -> Tensor:
        if self._mixed is not None:
            return self._loss_sum(
                self._mixed, outputs, parts[0][2] if self._mixed.hard_weight < 1 else None, outputs.weights
            )
        total = outputs.values.sum() * 0.0
        if self._hard_weight and outputs.vectors:
            total = total + self._hard_weight * weighted_sum(self._task.losses(outputs), outputs.weights)
        elif self._hard_weight:
            labels = Objective(hard_weight=1.0)
            total = total + self._hard_weight * self._loss_sum(labels, outputs, None, outputs.weights)
        sums = _sums(parts, len(examples))
        for chosen, share, taught in parts:
            positions = _positions(chosen, outputs.counts, outputs.values.device)
            own = _of(outputs, positions)
            factors = torch.tensor([share.weight / s if s else 0.0 for s in sums], dtype=torch.float64)
            weights = factors.repeat_interleave(torch.tensor(outputs.counts)).to(outputs.values.device)[positions]
            weights = weights if own.weights is None else weights * own.weights
            for weight, objective in self._terms:
                factor = weight * (1 - self._hard_weight)
                if isinstance(objective, UldObjective):
                    assert isinstance(taught, Aligned)
                    at = taught.places
                    if len(at):
                        losses = objective.losses(_picked(own, at).logits(), taught.logits)
                        total = total + factor * (losses * weights[at].to(losses.dtype)).sum()
                elif isinstance(objective, VectorObjective):
                    assert isinstance(taught, Tensor)
                    losses = objective.losses(own.values, taught)
                    total = total + factor * (losses * weights.to(losses.dtype)).sum()
                else:
                    total = total + factor * self._loss_sum(objective, own, taught, weights)
        return total

    def _loss_sum(
        self, objective: Objective, outputs: Outputs, taught: Taught | None, weights: Tensor | None
    ) -> Tensor:
        head = outputs.head
        fused = None
        if head is not None and self._kernels != "reference":
            fused = head_input(
                head.module,
                outputs.values,
                softcap=head.softcap,
                scale=head.scale,
                num_classes=self._columns.count,
            )
        if fused is None:
            return objective.loss_sum(
                self._columns.of(outputs.logits()), outputs.targets, _dense(taught), weights=weights
            )
        assert not isinstance(taught, Aligned)
        return objective.linear_loss_sum(
            fused.hidden,
            fused.head,
            outputs.targets if objective.hard_weight else None,
            taught,
            weights=weights,
            adapter_hidden=fused.adapter_hidden,
            backend=self._kernels,
        )


def _chosen(share: Share, examples: Sequence[Example]) -> list[bool]:
    return [share.takes is None or share.takes(e) for e in examples]


def _only(share: Share, batch: Batch) -> Batch:
    """The batch of the teacher's own rows of ``batch``."""
    return batch.rows([i for i, e in enumerate(batch.examples) if share.takes is None or share.takes(e)])


def _logits(taught: Taught, chosen: slice | Tensor) -> Tensor:
    assert not isinstance(taught, SparseTarget | Aligned)
    if isinstance(taught, Tensor):
        return taught[chosen]
    return ops.head_logits(taught.hidden[chosen], taught.head)


def _sums(parts: Sequence[tuple[list[bool], Share, Taught]], num_examples: int) -> list[float]:
    """The summed teacher weights of each example."""
    return [sum(share.weight for chosen, share, _ in parts if chosen[i]) for i in range(num_examples)]


def _positions(chosen: Sequence[bool], counts: Sequence[int], device: Any) -> Tensor:
    """[N] bool: the positions of the chosen examples."""
    return torch.tensor(chosen).repeat_interleave(torch.tensor(counts)).to(device)


def _of(outputs: Outputs, positions: Tensor) -> Outputs:
    return outputs if bool(positions.all()) else _picked(outputs, positions)


def _picked(outputs: Outputs, positions: Tensor) -> Outputs:
    """The outputs at ``positions``, a mask or indices."""
    targets, weights = (None if x is None else x[positions] for x in (outputs.targets, outputs.weights))
    return replace(outputs, values=outputs.values[positions], targets=targets, weights=weights)


def _dense(taught: Taught | None) -> Tensor | SparseTarget | None:
    assert not isinstance(taught, Aligned)
    if isinstance(taught, ops.OnlineTeacher):
        return ops.head_logits(taught.hidden, taught.head)
    return taught


class TaughtLogits:
    """The combined outputs of all teachers at the scored positions of a batch, for comparing a model with them.

    If several teachers share an example, the result is their mixture, weighted by their shares.

    Args: counts: number of positions of each example.
    """

    def __init__(self, shares: Sequence[Share], student: nn.Module, batch: Batch, counts: Sequence[int]) -> None:
        self._parts: list[tuple[Share, Tensor, Taught]] = []
        for share in shares:
            chosen = _chosen(share, batch.examples)
            if any(chosen):
                own = batch if all(chosen) else _only(share, batch)
                places = _positions(chosen, counts, batch.device)
                self._parts.append((share, places, share.teacher(student, own)))

    def rows(self, chosen: slice) -> Tensor:
        """[n, C] logits; for a mixture, log-probabilities."""
        if len(self._parts) == 1:
            return _logits(self._parts[0][2], chosen)
        mixed: Tensor | None = None
        total = cast(Tensor, sum(share.weight * places[chosen].double() for share, places, _ in self._parts))
        for share, places, taught in self._parts:
            here = places[chosen]
            own = (places.cumsum(0) - 1)[chosen][here]
            probs = _logits(taught, own).softmax(-1)
            mixed = probs.new_zeros(len(here), probs.shape[1]) if mixed is None else mixed
            mixed[here] += (share.weight / total[here]).to(probs.dtype)[:, None] * probs
        assert mixed is not None
        return mixed.log()
