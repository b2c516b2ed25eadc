"""Exact match and F1 of SQuAD against torchmetrics, by hand, and over the windows of a row."""

from __future__ import annotations

import random
from typing import Any

import pytest

from peftlab.evaluation.scorer import Scorer
from peftlab.evaluation.squad_scores import answers_by_row, exact, f1, normalised, scores_by_row

WORDS = ["The", "cat", "a", "dog", "in", "Paris,", "an", "U.S.", "2.5", "(red)", "caf\u00e9", "--", "It's"]


def window(row: int, text: str, score: float = 1.0, null: float = 0.0) -> dict[str, Any]:
    return {"row": row, "text": text, "score": score, "null_score": null}


def test_normalisation_by_hand() -> None:
    assert normalised("  The U.S.\u00a0 an  (Red)-cat! ") == "us redcat"
    assert exact("the cat", "Cat.") == 1 and exact("cat", "cats") == 0
    assert f1("the red cat", "a cat sat") == pytest.approx(2 * 0.5 * 0.5)
    assert f1("cat cat dog", "cat") == pytest.approx(2 * (1 / 3) / (1 / 3 + 1))
    assert f1("", "") == 1 and f1("cat", "") == 0 and f1("dog", "cat") == 0


def test_scores_equal_torchmetrics() -> None:
    from torchmetrics.text import SQuAD

    rng = random.Random(0)
    predictions = [" ".join(rng.choices(WORDS, k=rng.randint(1, 5))) for _ in range(300)]
    targets = [
        [" ".join(rng.choices(WORDS, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3))] for _ in range(300)
    ]
    theirs = SQuAD()(
        [{"prediction_text": text, "id": str(i)} for i, text in enumerate(predictions)],
        [{"answers": {"answer_start": [0] * len(t), "text": t}, "id": str(i)} for i, t in enumerate(targets)],
    )
    scorer = Scorer(["squad_exact", "squad_f1"])
    for first in range(0, 300, 7):  # in batches
        part = range(first, min(300, first + 7))
        scorer.add(
            {"found_answers": [window(i, predictions[i]) for i in part], "right_answers": [targets[i] for i in part]}
        )
    ours = scorer.compute()
    # torchmetrics keeps an answer of articles only; the official evaluation of SQuAD 2 does not.
    assert ours["squad_exact"] == pytest.approx(float(theirs["exact_match"]) / 100, abs=0.01)
    assert ours["squad_f1"] == pytest.approx(float(theirs["f1"]) / 100, abs=0.01)
    assert ours["squad_f1_answerable"] == ours["squad_f1"] and ours["squad_f1_unanswerable"] is None
    plain = [i for i in range(300) if all(normalised(t) for t in targets[i])]
    theirs = SQuAD()(
        [{"prediction_text": predictions[i], "id": str(i)} for i in plain],
        [{"answers": {"answer_start": [0] * len(targets[i]), "text": targets[i]}, "id": str(i)} for i in plain],
    )
    scores = scores_by_row([window(i, predictions[i]) for i in plain], [targets[i] for i in plain]).values()
    assert sum(s[0] for s in scores) / len(plain) == pytest.approx(float(theirs["exact_match"]) / 100, abs=1e-6)
    assert sum(s[1] for s in scores) / len(plain) == pytest.approx(float(theirs["f1"]) / 100, abs=1e-6)


def test_a_row_takes_the_best_of_its_windows() -> None:
    windows = [
        window(0, "cat", 3.0, 9.0),
        window(1, "dog", 2.0, 1.0),
        window(0, "hen", 5.0, 4.0),
        window(1, "ox", 1.0, 8.0),
    ]
    assert answers_by_row(windows) == {0: "hen", 1: "dog"}
    # No answer only if it scores higher in every window.
    assert answers_by_row([window(0, "cat", 3.0, 9.0), window(0, "hen", 5.0, 6.0)]) == {0: ""}
    assert answers_by_row([window(0, "cat", 3.0, 3.0)]) == {0: "cat"}
    assert answers_by_row([window(0, "cat", 3.0, float("-inf"))]) == {0: "cat"}


def test_rows_without_answer_are_counted_apart() -> None:
    scorer = Scorer(["squad_exact", "squad_f1_unanswerable"])
    found = [window(0, "cat"), window(1, "", -1.0), window(2, "dog"), window(3, "red cat")]
    scorer.add({"found_answers": found, "right_answers": [["cat", "ox"], [], [], ["cat"]]})
    values = scorer.compute()
    assert values["squad_exact"] == 0.5
    assert values["squad_exact_answerable"] == 0.5 and values["squad_exact_unanswerable"] == 0.5
    assert values["squad_f1_unanswerable"] == 0.5 and "squad_f1" not in values
