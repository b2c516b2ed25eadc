"""Singular values of updates against torch's dense decomposition in float64, and cuts worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from peftlab.adapters.spectrum import Place, cut_at, decompose, effective_rank, places, rank_holding
from peftlab.adapters.updates import Update
from peftlab.errors import RecipeError


def factors(rows: int, rank: int, columns: int) -> Update:
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(rows, rank, generator=generator)
    return Update("m", "base_model.model.m", left=left, right=torch.randn(rank, columns, generator=generator))


@pytest.mark.parametrize(("rows", "rank", "columns"), [(40, 5, 30), (30, 5, 40), (8, 20, 40), (16, 16, 16), (7, 1, 3)])
def test_decompose_equals_dense_svd(rows: int, rank: int, columns: int) -> None:
    """Without one of the two QR factors the values are wrong; with Q_right transposed the product is."""
    update = factors(rows, rank, columns)
    parts = decompose(update)
    dense = torch.linalg.svdvals(update.matrix().double())[: min(rows, rank, columns)]
    torch.testing.assert_close(parts.values, dense, rtol=1e-10, atol=1e-12)
    left, right = parts.cut(len(parts.values))
    torch.testing.assert_close(left @ right, update.matrix().double(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


def test_decompose_cut_is_the_best_of_its_rank() -> None:
    update = factors(40, 6, 30)
    parts = decompose(update)
    left, right = parts.cut(2)
    error = (update.matrix() - left @ right).norm()  # Eckart and Young 1936
    assert float(error) == pytest.approx(float(parts.values[2:].norm()), rel=1e-9)


def test_decompose_drops_values_of_rounding() -> None:
    update = factors(40, 3, 30)
    assert update.left is not None and update.right is not None
    doubled = Update("m", "m", left=torch.cat([update.left] * 2, 1), right=torch.cat([update.right] * 2, 0))
    assert len(decompose(doubled).values) == 3
    none = Update("m", "m", left=torch.cat([update.left, -update.left], 1), right=torch.cat([update.right] * 2, 0))
    assert len(decompose(none).values) == 0
    zero = Update("m", "m", left=torch.zeros(4, 2), right=torch.ones(2, 4))
    assert len(decompose(zero).values) == 0


def test_effective_rank_of_equal_values_is_their_number() -> None:
    assert effective_rank(torch.full((5,), 0.3)) == pytest.approx(5)
    assert effective_rank(torch.tensor([2.0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([])) == 0
    share = [0.75, 0.25]  # of the values, not of their squares
    wanted = math.exp(-sum(p * math.log(p) for p in share))
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(wanted)


def test_rank_holding_counts_squares() -> None:
    values = torch.tensor([3.0, 1.0, 0.1])  # squares 9, 1, 0.01
    assert [rank_holding(values, e) for e in (0.5, 0.9, 0.99, 0.9999, 1.0)] == [1, 2, 2, 3, 3]
    assert rank_holding(torch.tensor([]), 0.9) == 0


VALUES = {"a": torch.tensor([5.0, 1.0]), "b": torch.tensor([4.0, 3.0, 0.5]), "c": torch.tensor([0.9])}
COSTS = {"a": 10, "b": 20, "c": 1}


def test_cut_at_is_one_threshold_over_all_modules() -> None:
    """A threshold per module would keep c's only value."""
    cut = cut_at(VALUES, COSTS, threshold=0.2)
    assert (cut.ranks, cut.num_parameters, cut.threshold) == ({"a": 2, "b": 2, "c": 0}, 60, 1.0)
    assert cut.energy == pytest.approx((25 + 16 + 9 + 1) / (25 + 16 + 9 + 1 + 0.81 + 0.25))


def test_cut_at_keeps_to_the_budget() -> None:
    assert cut_at(VALUES, COSTS, budget=30).ranks == {"a": 1, "b": 1, "c": 0}
    # The next value needs 20: it ends the list, though c's smaller one would fit.
    assert cut_at(VALUES, COSTS, budget=49).ranks == {"a": 1, "b": 1, "c": 0}
    with pytest.raises(RecipeError, match="needs 10 parameters, and 9 are allowed"):
        cut_at(VALUES, COSTS, budget=9)


def test_cut_at_keeps_the_energy() -> None:
    assert cut_at(VALUES, COSTS, energy=0.5).ranks == {"a": 1, "b": 1, "c": 0}
    assert cut_at(VALUES, COSTS, energy=1.0).ranks == {"a": 2, "b": 3, "c": 1}
    with pytest.raises(RecipeError, match="changes no weight"):
        cut_at({"a": torch.tensor([])}, COSTS, energy=0.9)


def test_places_splits_layer_and_kind() -> None:
    names = ["h.3.attn.q", "h.0.mlp.experts.7.up", "lm_head"]
    assert list(places(names).values()) == [Place(3, "attn.q"), Place(0, "mlp.experts.*.up"), Place(None, "lm_head")]
    towers = places(["encoder.block.1.q", "decoder.block.1.q"])
    assert [place.kind for place in towers.values()] == ["encoder.block.q", "decoder.block.q"]
