"""The losses of pairs, triplets and scores against those of sentence-transformers, on the same vectors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as theirs
from torch import Tensor, nn

from peftlab.tasks.contrast import Objective, in_batch

ROWS, WIDTH = 7, 12
WIDTHS = [12, 6, 3]


class Given(nn.Module):
    """Stands for a model of sentence-transformers whose vectors are given."""

    def get_embedding_dimension(self) -> int:
        return WIDTH

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(features)


def their_loss(name: str) -> Any:
    return {
        "in_batch": lambda: theirs.MultipleNegativesRankingLoss(Given(), scale=13.0),
        "triplet": lambda: theirs.TripletLoss(Given(), theirs.TripletDistanceMetric.COSINE, triplet_margin=0.7),
        "cosine": lambda: theirs.CosineSimilarityLoss(Given()),
        "cosent": lambda: theirs.CoSENTLoss(Given(), scale=13.0),
    }[name]()


def vectors(count: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, count, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)


def targets(name: str, count: int) -> Tensor:
    if name in ("in_batch", "triplet"):
        return torch.arange(ROWS * count).reshape(ROWS, count)
    scores = torch.tensor([0.125, 0.875, 0.5, 0.5, 1.0, 0.0, 0.75], dtype=torch.float64)  # theirs are float32
    return scores[:, None].expand(ROWS, count)


CASES = [("in_batch", 2), ("in_batch", 3), ("in_batch", 4), ("triplet", 3), ("cosine", 2), ("cosent", 2)]


@pytest.mark.parametrize("widths", [[], WIDTHS], ids=["whole", "matryoshka"])
@pytest.mark.parametrize(("name", "count"), CASES)
def test_loss_and_gradient_equal_those_of_sentence_transformers(name: str, count: int, widths: list[int]) -> None:
    ours, reference = vectors(count), vectors(count)
    compared = targets(name, count)
    loss = Objective(name, scale=13.0, margin=0.7, widths=widths).losses(ours, compared).mean()
    their = their_loss(name)
    their = theirs.MatryoshkaLoss(Given(), their, WIDTHS) if widths else their
    if widths:
        their.loss.model = their.model  # the model whose vectors it cuts
    features = [{"sentence_embedding": reference[:, i]} for i in range(count)]
    wanted = their(features, compared[:, 0])
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-12)
    (slope,) = torch.autograd.grad(loss, ours)
    (wanted_slope,) = torch.autograd.grad(wanted, reference)
    torch.testing.assert_close(slope, wanted_slope, rtol=1e-7, atol=1e-12)


def test_other_right_answers_are_no_negatives() -> None:
    """By hand: rows 0 and 1 have one anchor, row 2 has the positive of row 0, row 3 is the anchor of row 0 as a positive."""
    keys = torch.tensor([[1, 10], [1, 11], [2, 10], [3, 1], [4, 14]])
    given = vectors(2)[:5].detach()
    unit = given / given.norm(dim=-1, keepdim=True)
    candidates = {0: [0, 4], 1: [1, 4], 2: [2, 1, 3, 4], 3: [3, 0, 1, 2, 4], 4: [4, 0, 1, 2, 3]}
    found = in_batch(given, keys, scale=5.0)
    for row, others in candidates.items():
        scores = [5.0 * float(unit[row, 0] @ unit[i, 1]) for i in others]
        wanted = -scores[0] + math.log(sum(map(math.exp, scores)))
        assert math.isclose(float(found[row]), wanted, rel_tol=1e-9), row


def test_loss_of_rows_without_negatives_is_zero() -> None:
    keys = torch.tensor([[1, 9], [2, 9]])
    assert in_batch(vectors(2)[:2], keys, scale=20.0).tolist() == [0.0, 0.0]


def test_half_precision_does_not_reach_the_similarities() -> None:
    given, keys = vectors(2).float().detach(), targets("in_batch", 2)
    wanted = Objective("in_batch").losses(given, keys)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Objective("in_batch").losses(given, keys), wanted)
