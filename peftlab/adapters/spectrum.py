"""The singular values of updates, and what they say: norm, effective rank, and where one threshold cuts all of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peftlab.adapters.updates import Update
from peftlab.errors import RecipeError

# Singular values below this share of the module's largest are rounding errors of float32 factors.
_NOISE = 1e-6
# What remains of factors that cancel each other, relative to the factors.
_CANCELLED = 1e-12


class Decomposed(NamedTuple):
    """A matrix as ``left @ diag(values) @ right``. left: [N, k] orthonormal columns. values: [k], sorted, all above rounding.
    right: [k, K] orthonormal rows."""

    left: Tensor
    values: Tensor
    right: Tensor

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """Left [N, rank] and right [rank, K] factors of equal norm, whose product has the first ``rank`` values."""
        root = self.values[:rank].sqrt()
        return self.left[:, :rank] * root, root[:, None] * self.right[:rank]


@torch.no_grad()
def decompose(update: Update) -> Decomposed:
    """The singular value decomposition of an update.

    For factors [N, R] and [R, K] with R below the width it costs two QR decompositions and one SVD of [R, R], in float64; the
    matrix [N, K] is never made.
    """
    if update.left is None or update.right is None or update.left.shape[1] >= min(update.shape):
        return decompose_matrix(update.matrix())
    q_left, r_left = torch.linalg.qr(update.left.double())
    q_right, r_right = torch.linalg.qr(update.right.double().T)
    left, values, right = torch.linalg.svd(r_left @ r_right.T)
    return _above_noise(
        q_left @ left, values, right @ q_right.T, least=_CANCELLED * float(r_left.norm() * r_right.norm())
    )


def decompose_matrix(matrix: Tensor) -> Decomposed:
    """The singular value decomposition of a dense [N, K] matrix."""
    # On consumer GPUs a dense float64 decomposition is 32 to 64 times slower; its values are needed to 1e-6.
    precise = matrix.float() if matrix.device.type == "cuda" else matrix.double()
    return _above_noise(*torch.linalg.svd(precise, full_matrices=False))


def _above_noise(left: Tensor, values: Tensor, right: Tensor, *, least: float = 0.0) -> Decomposed:
    count = int((values > max(_NOISE * float(values[0]), least)).sum()) if len(values) else 0
    return Decomposed(left[:, :count], values[:count], right[:count])


def effective_rank(values: Tensor) -> float:
    """``exp(H(p))`` with ``p = values / sum(values)`` and the entropy H in nats: k for k equal values, 0 for none.

    Source: Roy and Vetterli 2007, The effective rank, definition 1.
    """
    if not len(values):
        return 0.0
    share = values.double() / values.double().sum()
    return float((-(share * share.log()).sum()).exp())


def rank_holding(values: Tensor, energy: float) -> int:
    """The smallest number of leading ``values`` whose squares sum to at least ``energy`` of all squares."""
    if not len(values):
        return 0
    sums = values.double().square().cumsum(0)
    return int((sums < energy * sums[-1] * (1 - 1e-12)).sum()) + 1


class Place(NamedTuple):
    """Where a module is. layer: the first number in its name, if it has one. kind: the rest of its name."""

    layer: int | None
    kind: str


def places(names: Collection[str]) -> dict[str, Place]:
    """The place of each module by name: ``encoder.layer.3.attention.self.query`` is layer 3 of ``attention.self.query``.

    Further numbers become ``*``. If numbered layers are in several towers, the kind starts with that of the tower.
    """
    parts = {name: re.match(r"(.*?)\.(\d+)\.(.+)$", f".{name}") for name in names}
    towers = {match[1] for match in parts.values() if match}
    found = {}
    for name, match in parts.items():
        if match is None:
            found[name] = Place(None, name)
            continue
        rest = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", f".{match[3]}")[1:]
        found[name] = Place(int(match[2]), f"{match[1][1:]}.{rest}" if len(towers) > 1 else rest)
    return found


@dataclass(frozen=True)
class Cut:
    """threshold: the smallest singular value that is kept. ranks: how many are kept, by module. num_parameters: of the factors
    that remain. energy: share of the sum of all squared values that remains."""

    threshold: float
    ranks: dict[str, int]
    num_parameters: int
    energy: float


def cut_at(
    values: Mapping[str, Tensor],
    costs: Mapping[str, int],
    *,
    threshold: float | None = None,
    budget: int | None = None,
    energy: float | None = None,
) -> Cut:
    """The cut of all modules' singular values at ONE threshold, so that modules get different ranks or vanish.

    Exactly one of the three is given. PARA cuts the same way: a value that is small next to those of other modules changes
    the model little, whatever its rank in its own module.

    Args:
        values: sorted singular values by module. costs: parameters of one rank, N + K, by module.
        threshold: keeps values of at least this share of the largest of all.
        budget: keeps the largest values whose factors have at most this many parameters.
        energy: keeps the fewest values that hold this share of the sum of all squares.
    Raises: RecipeError if nothing would be left.
    Source: PARA, arXiv 2604.27796.
    """
    assert sum(option is not None for option in (threshold, budget, energy)) == 1
    ranked = sorted(((float(v), name) for name, own in values.items() for v in own), key=lambda pair: -pair[0])
    if not ranked:
        raise RecipeError("the adapter changes no weight: all its updates are zero, so there is nothing to cut")
    total = sum(value**2 for value, _ in ranked)
    ranks, used, held, last = dict.fromkeys(values, 0), 0, 0.0, 0.0
    for value, name in ranked:
        if threshold is not None and value < threshold * ranked[0][0]:
            break
        if budget is not None and used + costs[name] > budget:
            break
        if energy is not None and held >= energy * total * (1 - 1e-12):
            break
        ranks[name] += 1
        used, held, last = used + costs[name], held + value**2, value
    if not used:
        smallest = costs[ranked[0][1]]
        raise RecipeError(
            f"nothing would be left of the adapter: its largest singular value alone needs {smallest:,} parameters, and "
            f"{budget:,} are allowed"
            if budget is not None
            else "nothing would be left of the adapter; keep more of it"
        )
    return Cut(last, ranks, used, held / total)
