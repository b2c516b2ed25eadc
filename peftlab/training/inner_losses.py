"""Losses between the layers of teacher and student, for the loss of a distillation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftlab.distillation import INNER_ATTENTION, INNER_HIDDEN, relation_kl
from peftlab.errors import RecipeError
from peftlab.models import base_model
from peftlab.models.inner import Attention, InnerStates, recording
from peftlab.models.student import find_stack
from peftlab.tasks import Example


@dataclass(frozen=True)
class InnerTerm:
    """One loss between layers.

    Attributes:
        kind: hidden_mse, hidden_cosine, attention_mse, attention_kl or relation_kl. layers: (student's, teacher's), from 0.
        relation_heads: for relation_kl; None: as many as the key heads of both allow.
    """

    kind: str
    weight: float
    layers: tuple[tuple[int, int], ...]
    relation_heads: int | None = None

    def loss(self, ours: InnerStates, theirs: InnerStates, our: tuple[int, slice], their: tuple[int, slice]) -> Tensor:
        """[] loss of one text, mean over tokens and layer pairs. Args: our, their: its row and tokens in each model."""
        losses = []
        for mine, other in self.layers:
            if self.kind in INNER_HIDDEN:
                a, b = ours.hidden[mine][our], theirs.hidden[other][their]
                losses.append(INNER_HIDDEN[self.kind](a, b.to(a.device)).mean())
                continue
            left, right = ours.attention[mine].row(*our), _to(theirs.attention[other].row(*their), ours, mine)
            if self.kind in INNER_ATTENTION:
                losses.append(INNER_ATTENTION[self.kind](left.scores(), right.scores(), visible=left.visible()).mean())
            else:
                losses.append(self._relations(left, right))
        return torch.stack(losses).mean()

    def _relations(self, ours: Attention, theirs: Attention) -> Tensor:
        heads = self.relation_heads or math.gcd(ours.key.shape[1], theirs.key.shape[1])
        pairs = ((ours.query, theirs.query), (ours.key, theirs.key), (ours.value, theirs.value))
        losses = [
            relation_kl(_side_by_side(a), _side_by_side(b), num_heads=heads, visible=ours.visible()[:, :1])
            for a, b in pairs
        ]
        return torch.stack(losses).mean()


class InnerLosses:
    """The sum over texts of weight * loss; a text's weight is the total weight of its scored positions in the step.

    A text's loss is the mean over its tokens, so that the sum does not depend on the micro-batches (contract C3).
    """

    def __init__(self, terms: Sequence[InnerTerm]) -> None:
        self._terms = list(terms)

    def recording(self, model: Any, *, teacher: bool) -> contextlib.AbstractContextManager[InnerStates]:
        wanted = {
            of_attention: sorted(
                {
                    pair[teacher]
                    for t in self._terms
                    for pair in t.layers
                    if (t.kind not in INNER_HIDDEN) == of_attention
                }
            )
            for of_attention in (False, True)
        }
        return recording(model, hidden=wanted[False], attention=wanted[True])

    def loss_sum(self, ours: InnerStates, theirs: InnerStates, examples: Sequence[Example], counted: Tensor) -> Tensor:
        """[] summed loss. Args: counted: [B] float64 weight of each text. Raises: RecipeError if image patch counts differ."""
        with torch.autocast(counted.device.type, enabled=False):
            losses = []
            for our, their in zip(_places(ours, examples), _places(theirs, examples), strict=True):
                if our[1] != their[1] and examples[0].image is not None:
                    raise RecipeError(
                        f"the teacher cuts an image into {their[1].stop} patches and the student into {our[1].stop}: their layers "
                        "cannot be compared",
                        key="distill.losses",
                    )
                terms = [term.weight * term.loss(ours, theirs, our, their) for term in self._terms]
                losses.append(torch.stack(terms).sum())
            per_text = torch.stack(losses)
            return (per_text * counted.to(per_text.dtype)).sum()


def _places(states: InnerStates, examples: Sequence[Example]) -> list[tuple[int, slice]]:
    """Row and tokens of each example in a model's input: padded on the right, packed, or images."""
    shapes = [(h.shape[0], h.shape[1]) for h in states.hidden.values()]
    shapes += [(a.query.shape[0], a.query.shape[2]) for a in states.attention.values()]
    rows, width = shapes[0]
    if examples[0].image is not None:
        return [(row, slice(0, width)) for row in range(rows)]
    if rows == len(examples):
        return [(row, slice(0, len(e))) for row, e in enumerate(examples)]
    places, start = [], 0
    for example in examples:
        places.append((0, slice(start, start + len(example))))
        start += len(example)
    return places


def _to(attention: Attention, ours: InnerStates, layer: int) -> Attention:
    device = ours.attention[layer].query.device
    query, key, value = (x.to(device) for x in (attention.query, attention.key, attention.value))
    return Attention(query, key, value, None, attention.causal, attention.scaling)


def _side_by_side(heads: Tensor) -> Tensor:
    """Reshapes [B, A, T, D] to [B, T, A * D]."""
    return heads.transpose(1, 2).flatten(2)


def plan_inner_losses(
    losses: Sequence[tuple[str, float, Mapping[int, int] | None, int | None]], student: Any, teacher: Any
) -> list[InnerTerm]:
    """Returns the terms for these two models, from their configs only.

    Args: losses: (kind, weight, {student's layer: teacher's layer} or None for the last layers, relation heads).
    Raises: RecipeError for a missing layer, and for widths or heads that cannot be compared.
    """
    counts = [len(find_stack(base_model(model))) for model in (student, teacher)]
    configs = [base_model(model).config.get_text_config() for model in (student, teacher)]
    terms = []
    for kind, weight, layers, heads in losses:
        pairs = tuple((layers or {counts[0] - 1: counts[1] - 1}).items())
        for place, who, count in ((0, "student", counts[0]), (1, "teacher", counts[1])):
            outside = [pair[place] for pair in pairs if not 0 <= pair[place] < count]
            if outside:
                raise RecipeError(
                    f"{kind}: the {who} has {count} layers, 0 to {count - 1}; found layer {outside[0]}",
                    key="distill.losses",
                )
        _check_comparable(kind, configs[0], configs[1], heads)
        terms.append(InnerTerm(kind, weight, pairs, heads))
    return terms


def _check_comparable(kind: str, student: Any, teacher: Any, heads: int | None) -> None:
    if kind in INNER_HIDDEN and student.hidden_size != teacher.hidden_size:
        raise RecipeError(
            f"{kind}: the student's hidden states have {student.hidden_size:,} values, the teacher's "
            f"{teacher.hidden_size:,}; use relation_kl, which compares any widths",
            key="distill.losses",
        )
    if kind in INNER_ATTENTION and student.num_attention_heads != teacher.num_attention_heads:
        raise RecipeError(
            f"{kind}: the student has {student.num_attention_heads} attention heads, the teacher "
            f"{teacher.num_attention_heads}; use relation_kl, which compares any number",
            key="distill.losses",
        )
    for who, config in (("student", student), ("teacher", teacher)):
        if kind == "relation_kl" and heads is not None and any(width % heads for width in _widths(config)):
            raise RecipeError(
                f"relation_kl: the {who}'s queries, keys and values have {' and '.join(map(str, _widths(config)))} values, not a "
                f"multiple of {heads} relation heads",
                key="distill.losses",
            )


def _widths(config: Any) -> list[int]:
    """The widths of queries, and of keys and values if different."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return sorted({heads * width, (getattr(config, "num_key_value_heads", None) or heads) * width}, reverse=True)
