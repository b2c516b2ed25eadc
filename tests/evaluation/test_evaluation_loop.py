"""The batches that ranks share out in an evaluation."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from peftlab.evaluation import loop
from peftlab.evaluation.loop import evaluate_examples

LENGTHS = np.array([9, 3, 7, 5, 8, 2, 6, 4, 1])


class Task:
    """Every row scores its own index, so that a row that is missing or counted twice changes the mean."""

    spec = SimpleNamespace(gathers=False, answer_scores=frozenset())
    class_names = None

    def collate(self, examples: list[int], device: Any) -> list[int]:
        return examples

    def score(self, model: Any, batch: list[int]) -> dict[str, Any]:
        return {"nll_sum": float(sum(batch)), "num_scored": len(batch)}


def evaluated(shared: bool) -> dict[str, float | None]:
    rows = SimpleNamespace(lengths=LENGTHS, examples=list(range(len(LENGTHS))))
    return evaluate_examples(
        torch.nn.Linear(1, 1),
        Task(),
        rows,
        metrics=["loss"],
        batch_tokens=9,
        device="cpu",
        autocast=contextlib.nullcontext,
        shared=shared,
    )


@pytest.mark.parametrize(("num_ranks", "num_heard"), [(2, 2), (3, 3), (4, 4), (4, 3)])
def test_ranks_score_each_batch_once_and_in_order(
    num_ranks: int, num_heard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each rank scores is recorded first. Then one of them gets the parts of all; in the last case, the fault, one
    rank's part is missing."""
    rounds: list[list[Any]] = []
    alone = evaluated(shared=False)
    monkeypatch.setattr(loop, "num_ranks", lambda: num_ranks)
    for number in range(num_heard):
        own: list[Any] = []
        monkeypatch.setattr(loop, "rank", lambda number=number: number)
        monkeypatch.setattr(loop, "_of_all_ranks", lambda scored, own=own: own.append(scored) or scored)
        evaluated(shared=True)
        rounds.append(own)
    together = [[part for own in rounds for part in own[i]] for i in range(len(rounds[0]))]
    monkeypatch.setattr(loop, "rank", lambda: 0)
    monkeypatch.setattr(loop, "_of_all_ranks", lambda scored: together.pop(0))
    assert (evaluated(shared=True) == alone) == (num_heard == num_ranks)
