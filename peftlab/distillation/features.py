"""Losses between inner representations: hidden states, attention, token relations, sentence embeddings.

Every function returns one value per position or text, without reducing over them: the caller selects the valid ones.
Computation is in float32 (float64 stays); the teacher never receives a gradient. Divergences are in nats.
"""

# Shapes: N rows, B texts, T positions, A heads, H width; H_s and H_t may differ.

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from peftlab.errors import RecipeError
from peftlab.ops import token_divergence

Projector = Callable[[Tensor], Tensor]


def hidden_mse(student: Tensor, teacher: Tensor, *, projector: Projector | None = None) -> Tensor:
    """[...] mean over the width of the squared difference, ``((projector(student) - teacher) ** 2).mean(-1)``.

    Args: student: [..., H_s] hidden states or sentence embeddings. teacher: [..., H_t]. projector: trained map from H_s
    to H_t, such as ``nn.Linear(H_s, H_t, bias=False)``; required if the widths differ.
    Raises: RecipeError if widths differ. Source: Jiao et al. 2020 (TinyBERT), section 3.1; Reimers and Gurevych 2020.
    """
    student, teacher = _projected(student, teacher, projector)
    return (student - teacher).square().mean(-1)


def hidden_cosine(student: Tensor, teacher: Tensor, *, projector: Projector | None = None) -> Tensor:
    """[...] 1 - cosine of ``projector(student)`` and ``teacher``, from 0 to 2; arguments and errors as ``hidden_mse``.

    Source: Sanh et al. 2019 (DistilBERT), section 3.
    """
    student, teacher = _projected(student, teacher, projector)
    return 1.0 - F.cosine_similarity(student, teacher, dim=-1)


def attention_mse(student_scores: Tensor, teacher_scores: Tensor, *, visible: Tensor | None = None) -> Tensor:
    """[B, T] squared difference of attention scores before the softmax, mean over heads and the keys a query sees.

    Args: student_scores, teacher_scores: [B, A, T, S], scaled by 1 / sqrt(head width). visible: bool, broadcasts to
    them, True where a query sees a key; a query that sees nothing gives 0.
    Raises: RecipeError if the numbers of heads differ. Source: Jiao et al. 2020 (TinyBERT), section 3.1.
    """
    student, teacher, seen = _attention(student_scores, teacher_scores, visible)
    squares = torch.where(seen, student, 0.0).sub(torch.where(seen, teacher, 0.0)).square().sum(-1)
    return (squares / seen.sum(-1).clamp_min(1)).mean(1)


def attention_kl(student_scores: Tensor, teacher_scores: Tensor, *, visible: Tensor | None = None) -> Tensor:
    """[B, T] KL(teacher || student) of the attention distributions in nats, mean over heads; arguments and errors as
    ``attention_mse``.

    Source: Wang et al. 2020 (MiniLM), section 3.1.
    """
    return _masked_kl(*_attention(student_scores, teacher_scores, visible)).mean(1)


def relation_kl(student: Tensor, teacher: Tensor, *, num_heads: int, visible: Tensor | None = None) -> Tensor:
    """[B, T] KL(teacher || student) of self-relations in nats, mean over ``num_heads`` relation heads.

    The states are split into relation heads x, whose relation is ``softmax(x x' / sqrt(width of a head))``. The models may
    differ in width and number of attention heads. Call it once for each of Q-Q, K-K and V-V.

    Args: student: [B, T, H_s] queries, keys or values of all heads, concatenated. teacher: [B, T, H_t]. visible: as in
    ``attention_mse``, with ``num_heads`` heads.
    Raises: RecipeError if a width is not a multiple of ``num_heads``. Source: Wang et al. 2021 (MiniLMv2), section 3.1.
    """
    if student.dim() != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(f"expected states [B, T, H], found {list(student.shape)} and {list(teacher.shape)}")
    return attention_kl(_relation(student, num_heads), _relation(teacher.detach(), num_heads), visible=visible)


def similarity_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """[N] squared difference of cosines with the other texts of the batch, mean over them; 0 for a batch of one.

    Depends on which texts share a batch. Args: student: [N, H_s] embeddings. teacher: [N, H_t].
    Source: Tung and Mori 2019 (similarity-preserving knowledge distillation), on cosines.
    """
    student, teacher, others = _similarities(student, teacher)
    return (student - teacher).square().mul(others).sum(-1) / max(len(student) - 1, 1)


def similarity_kl(student: Tensor, teacher: Tensor, *, temperature: float = 0.05) -> Tensor:
    """[N] KL(teacher || student) in nats of ``softmax(cosine / temperature)`` over the other texts of the batch.

    Depends on which texts share a batch. Args: as ``similarity_mse``; temperature: above 0, without a factor T^2, because
    it is part of the definition on both sides. Source: Fang et al. 2021 (SEED).
    """
    if not temperature > 0:
        raise ValueError(f"expected a temperature above 0, found {temperature}")
    student, teacher, others = _similarities(student, teacher)
    return _masked_kl(student / temperature, teacher / temperature, others)


def _projected(student: Tensor, teacher: Tensor, projector: Projector | None) -> tuple[Tensor, Tensor]:
    mapped = student if projector is None else projector(student)
    if mapped.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"expected states of the same rows, found {list(mapped.shape)} and {list(teacher.shape)}")
    if mapped.shape[-1] != teacher.shape[-1]:
        raise RecipeError(
            f"hidden states of the student have {mapped.shape[-1]:,} values and those of the teacher {teacher.shape[-1]:,}: "
            "pass a projector, or compare relations or similarities, which need none"
        )
    return _exact(mapped), _exact(teacher.detach())


def _attention(student: Tensor, teacher: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if student.dim() != 4 or student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(f"expected scores [B, A, T, S], found {list(student.shape)} and {list(teacher.shape)}")
    if student.shape[1] != teacher.shape[1]:
        raise RecipeError(
            f"the student has {student.shape[1]} attention heads and the teacher {teacher.shape[1]}: attention of layers "
            "with different heads cannot be compared; use relation_kl (MiniLMv2), which splits both into its own heads"
        )
    seen = torch.ones_like(student, dtype=torch.bool) if visible is None else visible.expand_as(student)
    return _exact(student), _exact(teacher.detach()), seen


def _relation(states: Tensor, num_heads: int) -> Tensor:
    batch, length, width = states.shape
    if num_heads < 1 or width % num_heads:
        raise RecipeError(
            f"a width of {width:,} cannot be split into {num_heads} relation heads of equal width; use a common divisor of "
            "both models' widths"
        )
    heads = _exact(states).view(batch, length, num_heads, width // num_heads).transpose(1, 2)
    return heads @ heads.transpose(-1, -2) / math.sqrt(width // num_heads)


def _similarities(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, N] cosines of both, and a mask of the pairs of different texts."""
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher):
        raise ValueError(f"expected embeddings [N, H], found {list(student.shape)} and {list(teacher.shape)}")
    own, other = (F.normalize(_exact(x), dim=-1) for x in (student, teacher.detach()))
    others = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    return own @ own.T, other @ other.T, others


def _masked_kl(student: Tensor, teacher: Tensor, seen: Tensor) -> Tensor:
    """KL over the last dimension among the ``seen`` entries; 0 if there are none."""
    any_seen = seen.any(-1, keepdim=True)
    # A softmax over nothing is NaN, and so is its gradient: such rows compare zeros instead.
    rows = [torch.where(seen, x, torch.where(any_seen, -math.inf, 0.0)).flatten(0, -2) for x in (student, teacher)]
    return token_divergence(rows[0], rows[1], kind="forward_kl").view(seen.shape[:-1])


def _exact(states: Tensor) -> Tensor:
    return states if states.dtype == torch.float64 else states.float()


# The losses between output vectors, by name as in ``specs.losses``.
VECTOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hidden_cosine": hidden_cosine,
    "hidden_mse": hidden_mse,
    "similarity_mse": similarity_mse,
    "similarity_kl": similarity_kl,
}
# The losses between layers: of hidden states, and of attention scores. relation_kl compares queries, keys and values.
INNER_HIDDEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hidden_mse": hidden_mse,
    "hidden_cosine": hidden_cosine,
}
INNER_ATTENTION: dict[str, Callable[..., Tensor]] = {"attention_mse": attention_mse, "attention_kl": attention_kl}
