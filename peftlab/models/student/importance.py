"""Ranks layers by importance: compares a model's outputs without each layer with its full outputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.errors import RecipeError, VerificationError
from peftlab.models.student.stack import LAYERS_KEY, Part, Stack, can_cut, find_stack, only_layers

# Runs a model over the sample and yields its outputs, [n, V] or [n, H] at a time, always in the same order.
Outputs = Callable[[nn.Module], Iterator[Tensor]]
# From reference and measured outputs, both [n, V], to [n] distances, 0 for equal outputs.
Distance = Callable[[Tensor, Tensor], Tensor]
# Rows compared at a time: two float32 blocks of 256 x 152k columns are 311 MB.
_ROWS = 256


@dataclass(frozen=True)
class Importance:
    """The cost of removing layers, as mean distance per position (nats for ``kl_divergence``).

    Attributes:
        kept: the layers left, ascending. removed: the others, in the order of removal.
        distance: distance between the model with only ``kept`` and the full model.
        rounds: for each round of measuring, (layer, distance without it and without those removed before).
        num_positions: number of positions measured. seconds: wall time.
    """

    kept: tuple[int, ...]
    removed: tuple[int, ...]
    distance: float
    rounds: tuple[tuple[tuple[int, float], ...], ...]
    num_positions: int
    seconds: float


def kl_divergence(reference: Tensor, output: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(output)) in nats, [n], from [n, V] logits; a class masked by -inf adds nothing."""
    log_p, log_q = F.log_softmax(reference, -1), F.log_softmax(output, -1)
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


def cosine_distance(reference: Tensor, output: Tensor) -> Tensor:
    """1 - cosine of [n, H] embeddings, [n]: for models without class logits."""
    return 1.0 - F.cosine_similarity(reference, output, dim=-1)


@torch.no_grad()
def layers_by_importance(
    model: nn.Module,
    keep: int,
    *,
    outputs: Outputs,
    distance: Distance = kl_divergence,
    search: Literal["greedy", "once"] = "greedy",
    part: Part | None = None,
    max_positions: int = 4096,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> Importance:
    """The ``keep`` layers for which removing the others changes the outputs least.

    ``greedy`` removes the least important layer, measures the others again without it, and so on: the cost of removing two
    layers is not the sum of their costs. ``once`` measures each layer alone and removes the cheapest ones together, in one
    round. SmolLM2-135M from 30 to 20 layers by 256 tokens of pydoc's topics, perplexity on 1,024 others (full model: 15.6),
    without training: 84 greedy (255 passes), 90 once (30 passes), 16,202 evenly spaced.

    A layer that the architecture fixes in its position (see ``cut_layers``) is never removed. Layers are bypassed in place;
    no weights are copied.

    Args:
        max_positions: maximum number of outputs to use; they are kept as float32.
        on_round: called with the number of finished rounds and of all rounds.
    Raises: RecipeError if the architecture does not allow removing that many layers.
    """
    start = time.perf_counter()
    stack = find_stack(model, part)
    assert 1 <= keep < len(stack)
    training = model.training
    model.eval()
    try:
        reference = _Reference(model, outputs, distance, max_positions)
        kept, removed = list(range(len(stack))), []
        rounds: list[tuple[tuple[int, float], ...]] = []
        num_rounds = len(stack) - keep if search == "greedy" else 1
        while len(kept) > keep:
            costs = _costs(model, stack, kept, reference)
            rounds.append(tuple(costs))
            take = 1 if search == "greedy" else len(kept) - keep
            cheapest = [layer for layer, _ in sorted(costs, key=lambda cost: cost[1])[:take]]
            if len(cheapest) < take or not can_cut(model, stack, [i for i in kept if i not in cheapest]):
                raise RecipeError(
                    f"{type(model).__name__} cannot be cut to {keep} layers by importance: its layers differ, and too few "
                    f"can be removed; list the layers to keep in {LAYERS_KEY}",
                    key=LAYERS_KEY,
                )
            removed += cheapest
            kept = [i for i in kept if i not in cheapest]
            on_round(len(rounds), num_rounds)
        final = _without(model, stack, kept, reference) if search == "once" else min(c for _, c in rounds[-1])
    finally:
        model.train(training)
    seconds = time.perf_counter() - start
    return Importance(tuple(kept), tuple(removed), final, tuple(rounds), reference.num_positions, seconds)


def _costs(model: nn.Module, stack: Stack, kept: list[int], reference: _Reference) -> list[tuple[int, float]]:
    costs = []
    for layer in kept:
        rest = [i for i in kept if i != layer]
        if rest and can_cut(model, stack, rest):
            costs.append((layer, _without(model, stack, rest, reference)))
    return costs


def _without(model: nn.Module, stack: Stack, kept: Sequence[int], reference: _Reference) -> float:
    with only_layers(model, stack, kept):
        return reference.distance_of(model)


class _Reference:
    """The outputs of the full model in float32, to measure the distance of another model's outputs."""

    def __init__(self, model: nn.Module, outputs: Outputs, distance: Distance, max_positions: int) -> None:
        self._outputs, self._distance = outputs, distance
        self._chunks: list[Tensor] = []
        self.num_positions = 0
        for chunk in outputs(model):
            self._chunks.append(chunk[: max_positions - self.num_positions].float().clone())
            self.num_positions += len(self._chunks[-1])
            if self._chunks[-1].isnan().any():
                raise VerificationError("the teacher's outputs are NaN on the sample, before any cut")
            if self.num_positions >= max_positions:
                break
        if not self.num_positions:
            raise ValueError("the sample gave no outputs to compare")

    def distance_of(self, model: nn.Module) -> float:
        """Mean distance over all positions, summed in float64; infinite for NaN outputs."""
        total, stream = 0.0, self._outputs(model)
        for reference in self._chunks:
            output = next(stream)
            rows = zip(torch.split(reference, _ROWS), torch.split(output[: len(reference)].float(), _ROWS), strict=True)
            total += sum(float(self._distance(a, b).double().sum()) for a, b in rows)
        return total / self.num_positions if not math.isnan(total) else math.inf
