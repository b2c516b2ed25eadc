"""The ranks of right answers, for the metrics of retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Queries per block of similarities to all answers.
_QUERIES = 512
_FIRST = 10


def gathered_ranks(queries: Tensor, answers: Tensor, keys: Tensor) -> dict[str, Any]:
    """The columns of the metrics of retrieval, from all held-out pairs: 8 H bytes a pair.

    The candidates of a query are all distinct answers, without the answers of other pairs with an equal query and without the
    text of the query itself. An answer that is as similar as the right one is ranked before it, so equal vectors earn nothing.

    Args: queries, answers: [N, H] unit vectors of the pairs. keys: [N, 2] equal for equal texts.
    """
    _, first, place = np.unique(keys[:, 1].numpy(), return_index=True, return_inverse=True)
    candidates, candidate_keys = answers[torch.from_numpy(first)], keys[torch.from_numpy(first), 1]
    of_answer = torch.from_numpy(place)
    others: dict[int, list[int]] = {}
    for query, at in zip(keys[:, 0].tolist(), place.tolist(), strict=True):
        others.setdefault(query, []).append(at)
    ranks: list[int] = []
    for start in range(0, len(queries), _QUERIES):
        block = slice(start, start + _QUERIES)
        similar = queries[block] @ candidates.T
        own = of_answer[block]
        at = torch.arange(len(own))
        best = similar[at, own]
        skipped = keys[block, 0, None] == candidate_keys
        for row, query in enumerate(keys[block, 0].tolist()):
            skipped[row, others[query]] = True
        skipped[at, own] = True
        before = (similar >= best[:, None]) & ~skipped
        ranks += (1 + before.sum(-1)).tolist()
    return ranked(ranks)


def ranked(ranks: list[int]) -> dict[str, Any]:
    """The columns for queries with one right answer each, of rank 1 or more."""
    gains = [[float(place == rank) for place in range(1, _FIRST + 1)] for rank in ranks]
    return {"found_at": ranks, "first_relevant": ranks, "gains": gains, "ideal_gains": [[1.0]] * len(ranks)}


def ranked_groups(
    queries: Sequence[int], logits: Sequence[float], scores: Sequence[float], *, relevant: float
) -> dict[str, Any]:
    """The columns of ranked documents, one entry for each query.

    Of equal logits the document with the lower score is ranked first. A query whose documents have one score, so that no order
    is better than another, has no rank (None) and no gains.

    Args: queries: [N] equal for the documents of one query. scores: [N] their relevance, 0 to 1. relevant: the lowest score of
        a right answer.
    """
    groups: dict[int, list[tuple[float, float]]] = {}
    for query, logit, score in zip(queries, logits, scores, strict=True):
        groups.setdefault(query, []).append((-logit, score))
    ranks: list[int | None] = []
    gains, ideal = list[list[float]](), list[list[float]]()
    for documents in groups.values():
        found = [score for _, score in sorted(documents)]
        varied = len(set(found)) > 1
        right = [place for place, score in enumerate(found, start=1) if score >= relevant]
        ranks.append(right[0] if right and varied else None)
        gains.append(found[:_FIRST] if varied else [])
        ideal.append(sorted(found, reverse=True)[:_FIRST] if varied else [])
    return {"first_relevant": ranks, "gains": gains, "ideal_gains": ideal}
