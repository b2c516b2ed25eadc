"""Losses of vectors of several texts per row: in-batch negatives, triplets, scores, at one or several widths."""

# Shapes: B rows, K texts of each, H width of a vector.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peftlab.tasks.batch import Batch, StepShare
from peftlab.tasks.outputs import Outputs, weighted_sum


@dataclass(frozen=True)
class Objective:
    """How vectors are trained (``specs.objectives``).

    Attributes:
        scale: factor on cosines before the softmax. margin: of the triplets, in cosine.
        widths: the loss is the sum of the losses of the first numbers of each vector, for each width; empty: of whole vectors.
    """

    name: str
    scale: float = 20.0
    margin: float = 0.5
    widths: Sequence[int] = ()

    def losses(self, vectors: Tensor, targets: Tensor) -> Tensor:
        """[B] the loss of each row. Args: vectors: [B, K, H]. targets: [B, K], see the functions below."""
        by_name: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "in_batch": lambda v, t: in_batch(v, t, scale=self.scale),
            "triplet": lambda v, _: triplet(v, margin=self.margin),
            "cosine": lambda v, t: cosine(v, t[:, 0]),
            "cosent": lambda v, t: cosent(v, t[:, 0], scale=self.scale),
        }
        # Similarities in 16 bits are off by 0.004, times the scale.
        with torch.autocast(vectors.device.type, enabled=False):
            parts = [by_name[self.name](vectors[..., :width], targets) for width in self.widths or (vectors.shape[-1],)]
            return torch.stack(parts).sum(0)


def in_batch(vectors: Tensor, keys: Tensor, *, scale: float) -> Tensor:
    """[B] cross-entropy of each anchor's own positive among all positives and negatives, by scaled cosine.

    A text that is another right answer is no negative: the positive of a row with an equal anchor, in any row, and the anchor.

    Args: vectors: [B, K, H] anchor, positive, negatives. keys: [B, K] equal for equal texts.
    """
    unit = F.normalize(vectors, dim=-1)
    rows, count = len(unit), unit.shape[1] - 1
    scores = scale * (unit[:, 0] @ unit[:, 1:].transpose(0, 1).flatten(0, 1).T)  # all positives, then all negatives
    candidates = keys[:, 1:].T.flatten()
    same = keys[:, 0, None] == keys[:, 0]
    positives = keys[:, 1, None] == candidates
    if int(same.sum()) > rows:  # of all rows with an equal anchor
        positives = (same.float() @ positives.float()) > 0
    right = positives | (candidates == keys[:, 0, None])
    right[torch.arange(rows), torch.arange(rows)] = False
    assert scores.shape == (rows, rows * count)
    return F.cross_entropy(
        scores.masked_fill(right, -torch.inf), torch.arange(rows, device=scores.device), reduction="none"
    )


def triplet(vectors: Tensor, *, margin: float) -> Tensor:
    """[B] by how much each cosine of anchor and positive is less than ``margin`` above that of anchor and negative.

    Args: vectors: [B, 3, H].
    """
    near, far = (F.cosine_similarity(vectors[:, 0], vectors[:, i], dim=-1) for i in (1, 2))
    return F.relu(far - near + margin)


def cosine(vectors: Tensor, scores: Tensor) -> Tensor:
    """[B] squared difference of cosine and score. Args: vectors: [B, 2, H]. scores: [B]."""
    found = F.cosine_similarity(vectors[:, 0], vectors[:, 1], dim=-1)
    return (found - scores.to(found.dtype)) ** 2


def cosent(vectors: Tensor, scores: Tensor, *, scale: float) -> Tensor:
    """[B] the same for each row: log(1 + sum of exp(scale * (cosine_j - cosine_i)) over all pairs with score_i > score_j).

    Args: as ``cosine``.
    """
    found = scale * F.cosine_similarity(vectors[:, 0], vectors[:, 1], dim=-1)
    differences = (found - found[:, None])[scores[:, None] > scores]
    return torch.cat([differences.new_zeros(1), differences]).logsumexp(0).expand(len(found))


def step_shares(
    batches: Sequence[Batch], outputs: Sequence[Outputs], losses: Callable[[Outputs], Tensor]
) -> list[StepShare]:
    """The shares of the first ``batches`` of a step in its loss (Gao et al. 2021, gradient cache).

    Args: outputs: of ``batches``, then those of other processes, without gradients. losses: ``Task.losses``.
    """
    values = torch.cat([part.values for part in outputs]).detach().requires_grad_()
    every = Outputs(
        values,
        [n for part in outputs for n in part.counts],
        vectors=True,
        targets=_joined([part.targets for part in outputs]),
        weights=_joined([part.weights for part in outputs]),
    )
    with torch.enable_grad():
        by_position = losses(every)
        (gradients,) = torch.autograd.grad(weighted_sum(by_position, every.weights), values)
    sizes = [len(part) for part in outputs]
    weights = [part.weights for part in outputs]
    sums = [weighted_sum(own, weight) for own, weight in zip(by_position.detach().split(sizes), weights, strict=True)]
    return [StepShare(total, own) for total, own, _ in zip(sums, gradients.split(sizes), batches, strict=False)]


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None])


def share_loss(outputs: Outputs, share: StepShare) -> Tensor:
    """[] the micro-batch's part of the step's loss, whose gradient is that of the whole step's loss in its rows."""
    surrogate = (outputs.values * share.gradients).sum()
    return share.loss + (surrogate - surrogate.detach())
