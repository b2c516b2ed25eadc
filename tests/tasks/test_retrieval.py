"""The metrics of retrieval, triplets and scores: against scikit-learn, SciPy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score
from torch.nn import functional as F

from peftlab.evaluation.scorer import Scorer
from peftlab.tasks.retrieval import gathered_ranks

RANKED = ["recall_at_1", "recall_at_10", "mrr", "ndcg_at_10"]


def test_ranks_of_distinct_pairs_equal_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors = F.normalize(torch.randn(600, 8, generator=generator), dim=-1)  # more than one block of queries
    positives = F.normalize(anchors + 0.5 * torch.randn(600, 8, generator=generator), dim=-1)
    columns = gathered_ranks(anchors, positives, torch.arange(1200).reshape(2, 600).T.contiguous())
    scores = (anchors @ positives.T).numpy()
    ranks = [1 + int((row > row[i]).sum()) for i, row in enumerate(scores)]
    assert columns["found_at"] == ranks
    scorer = Scorer(RANKED)
    scorer.add(columns)
    values = scorer.compute()
    assert values["recall_at_1"] == pytest.approx(np.mean([r == 1 for r in ranks]))
    assert values["recall_at_10"] == pytest.approx(np.mean([r <= 10 for r in ranks]))
    assert values["mrr"] == pytest.approx(np.mean([1 / r for r in ranks]))
    assert values["ndcg_at_10"] == pytest.approx(ndcg_score(np.eye(600), scores, k=10))


def test_other_right_answers_are_no_candidates_and_equal_texts_are_one() -> None:
    """By hand, in the plane: pairs 0 and 1 have one anchor; pairs 2 and 3 have one positive; 4 has the anchor as a positive."""
    angles = torch.tensor([[0, 30], [0, 20], [90, 80], [100, 80], [50, 0]]).deg2rad()
    unit = torch.stack([angles.cos(), angles.sin()], dim=-1)
    keys = torch.tensor([[1, 10], [1, 11], [2, 12], [3, 12], [4, 1]])
    ranks = gathered_ranks(unit[:, 0], unit[:, 1], keys)["found_at"]
    # Candidates: 30, 20, 80 and 0 degrees. Pair 4, at 50, has its positive at 0: last of four.
    assert ranks == [1, 1, 1, 1, 4]


def test_equal_vectors_earn_nothing() -> None:
    same = torch.ones(4, 2) / 2**0.5
    columns = gathered_ranks(same, same, torch.arange(8).reshape(2, 4).T.contiguous())
    assert columns["found_at"] == [4, 4, 4, 4]


def test_spearman_and_triplet_accuracy() -> None:
    scorer = Scorer(["spearman_cosine", "triplet_accuracy"])
    cosines, scores = [0.1, 0.5, 0.5, -0.2, 0.9], [0.0, 0.4, 0.6, 0.1, 0.6]
    scorer.add({"cosines": cosines[:2], "scores": scores[:2], "triplets_right": [1, 0]})
    scorer.add({"cosines": cosines[2:], "scores": scores[2:], "triplets_right": [1, 1, 1]})
    values = scorer.compute()
    assert values["spearman_cosine"] == pytest.approx(spearmanr(cosines, scores).statistic)
    assert values["triplet_accuracy"] == 0.8
    constant = Scorer(["spearman_cosine"])
    constant.add({"cosines": [0.1, 0.2], "scores": [1.0, 1.0]})
    assert constant.compute()["spearman_cosine"] is None
