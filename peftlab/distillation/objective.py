"""The step loss: hard_weight * CE + (1 - hard_weight) * T^2 * D on the positions that predict a trained token.

All functions return sums. Each sum is divided by ``num_targets`` of the whole optimizer step, over all micro-batches
and ranks (contract C3), so that a step does not depend on its micro-batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftlab import ops
from peftlab.distillation.features import VECTOR_LOSSES
from peftlab.distillation.losses import cross_entropy, divergence, sparse_divergence
from peftlab.distillation.targets import SparseTarget
from peftlab.errors import RecipeError


def select(values: Tensor, trained: Tensor) -> Tensor:
    """[N, ...] rows of ``values`` [B, T, ...] at positions whose *next* token is trained, text by text in order.

    Values are hidden states or logits of either model, of any width. ``trained`` is [B, T] bool. The position before a
    trained token predicts it, so a token at position 0 has no prediction. ``trained`` is False for prompts, padding and the
    first token of each packed text.
    """
    _check(values, trained)
    return values[:, :-1][trained[:, 1:]]


def select_targets(input_ids: Tensor, trained: Tensor) -> Tensor:
    """[N] the tokens that the rows of ``select`` predict. Args: input_ids: [B, T] int64. trained: [B, T] bool."""
    _check(input_ids, trained)
    return input_ids[:, 1:][trained[:, 1:]]


def num_targets(trained: Tensor) -> int:
    """The number of rows that ``select`` gives, which a micro-batch adds to the divisor of its step."""
    return int(trained[:, 1:].sum())


@contextlib.contextmanager
def as_teacher(model: nn.Module) -> Iterator[None]:
    """Inside the block ``model`` has no dropout and builds no graph; afterwards every module is back in its mode.

    The teacher may share modules with the student, such as the base model of an adapter.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def combine(hard: Tensor | None, soft: Tensor | None, *, hard_weight: float, weights: Tensor | None = None) -> Tensor:
    """Sum over rows of ``hard_weight * hard + (1 - hard_weight) * soft``; a part of weight 0 is ignored.

    Args: hard: [N] per-token CE in nats, None at weight 0. soft: [N] per-token T^2 D, None at weight 1.
    hard_weight: 0 to 1; at 1 the result is bit-identical to ``hard.sum()``. weights: [N] factors of the rows, None: all 1.
    Raises: ValueError if a part with a weight is missing, or the rows of the parts differ.
    """
    if (hard is None and hard_weight > 0) or (soft is None and hard_weight < 1):
        raise ValueError(f"expected losses of both parts, or weight 0 for the missing one, found {hard_weight}")
    if hard is not None and soft is not None and hard.shape != soft.shape:
        raise ValueError(f"expected losses of the same rows, found {list(hard.shape)} and {list(soft.shape)}")
    hard_sum, soft_sum = (
        None if x is None else x.sum() if weights is None else (x * weights.to(x.dtype)).sum() for x in (hard, soft)
    )
    if hard_weight == 1:
        assert hard_sum is not None
        return hard_sum
    assert soft_sum is not None
    if hard_weight == 0:
        return soft_sum
    assert hard_sum is not None
    return hard_weight * hard_sum + (1.0 - hard_weight) * soft_sum


@dataclass(frozen=True, slots=True)
class Objective:
    """The step loss with its settings.

    Args:
        kind, share, temperature: see ``losses.divergence``. scale_by_t2: the factor T^2 on D; CE never has it.
        hard_weight: share of CE, 0 to 1.
    Raises: RecipeError on a value out of range.
    """

    kind: str = "forward_kl"
    temperature: float = 1.0
    share: float = 0.5
    hard_weight: float = 0.0
    scale_by_t2: bool = True

    def __post_init__(self) -> None:
        try:
            ops.check_divergence(self.kind, self.share, self.temperature)
        except ValueError as error:
            raise RecipeError(str(error)) from error
        if not 0 <= self.hard_weight <= 1:
            raise RecipeError(
                f"expected a hard_weight from 0 (teacher only) to 1 (labels only), found {self.hard_weight}"
            )

    def soft_losses(self, student_logits: Tensor, teacher: Tensor | SparseTarget) -> Tensor:
        """[N] per-token T^2 D in nats. Raises: RecipeError for stored classes with another kind than forward KL."""
        if isinstance(teacher, Tensor):
            return divergence(
                student_logits,
                teacher,
                kind=self.kind,
                temperature=self.temperature,
                share=self.share,
                scale_by_t2=self.scale_by_t2,
            )
        if self.kind != "forward_kl":
            raise RecipeError(
                f"stored classes of the teacher only support forward_kl, found {self.kind}: other losses need the teacher's "
                "probability of every class; store hidden states, or use a live teacher"
            )
        return sparse_divergence(student_logits, teacher, temperature=self.temperature, scale_by_t2=self.scale_by_t2)

    def loss_sum(
        self,
        student_logits: Tensor,
        targets: Tensor | None,
        teacher: Tensor | SparseTarget | None,
        *,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The step loss summed over rows; without rows a differentiable 0.

        Args:
            student_logits: [N, V] from ``select``, with soft-cap and logit scale applied, cut to the shared width.
            targets: [N] int64; None at hard_weight 0. teacher: logits [N, V] or stored classes; None at hard_weight 1.
            weights: [N] factors of the rows, None: all 1.
        """
        hard = cross_entropy(student_logits, targets) if self.hard_weight and targets is not None else None
        soft = self.soft_losses(student_logits, teacher) if self.hard_weight < 1 and teacher is not None else None
        return combine(hard, soft, hard_weight=self.hard_weight, weights=weights)

    def linear_loss_sum(
        self,
        hidden: Tensor,
        head: ops.Head,
        targets: Tensor | None,
        teacher: ops.OnlineTeacher | Tensor | SparseTarget | None,
        *,
        weights: Tensor | None = None,
        adapter_hidden: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Like ``loss_sum``, on the fused operation: the logits of all rows never exist at once.

        Args: hidden: [N, H] of the student from ``select``. head: the student's head, with soft-cap, scale and
        ``num_classes`` of the shared width. teacher: may also be its hidden states and head. adapter_hidden: [N, H] input
        of an adapter on the head, from ``adapters.head.head_input``. backend: auto, triton or torch.
        """
        if self.hard_weight == 1:
            assert targets is not None
            return ops.linear_cross_entropy(
                hidden, head, targets, weights=weights, adapter_hidden=adapter_hidden, backend=backend
            ).total
        assert teacher is not None
        source: ops.OnlineTeacher | ops.DenseTeacher | ops.SparseTeacher
        if isinstance(teacher, SparseTarget):
            teacher.require_temperature(self.temperature)
            source = ops.SparseTeacher(teacher.ids, teacher.probs, teacher.tail)
        else:
            source = ops.DenseTeacher(teacher) if isinstance(teacher, Tensor) else teacher
        return ops.linear_kl(
            hidden,
            head,
            source,
            targets if self.hard_weight else None,
            divergence=self.kind,
            share=self.share,
            temperature=self.temperature,
            scale_by_t2=self.scale_by_t2,
            hard_weight=self.hard_weight,
            weights=weights,
            adapter_hidden=adapter_hidden,
            backend=backend,
        ).total


@dataclass(frozen=True, slots=True)
class VectorObjective:
    """A loss between output vectors, such as sentence embeddings.

    Args: kind: hidden_cosine or hidden_mse (equal widths), similarity_mse or similarity_kl (any widths).
    """

    kind: str = "hidden_cosine"

    def __post_init__(self) -> None:
        if self.kind not in VECTOR_LOSSES:
            raise RecipeError(f"expected a loss between vectors ({', '.join(VECTOR_LOSSES)}), found {self.kind!r}")

    def losses(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[N] loss per text. Args: student: [N, H_s]. teacher: [N, H_t]. Raises: RecipeError on incompatible widths."""
        return VECTOR_LOSSES[self.kind](student, teacher)


def _check(values: Tensor, trained: Tensor) -> None:
    if trained.dim() != 2 or values.shape[:2] != trained.shape or trained.dtype != torch.bool:
        raise ValueError(
            f"expected values [B, T, ...] and trained [B, T] bool, found {list(values.shape)} and {list(trained.shape)} "
            f"{trained.dtype}"
        )
