"""The simple baseline of the recipe docstring-questions: the most frequent training answer to the same kind of question."""

from __future__ import annotations

from collections import Counter

from peftlab.data import Rows
from peftlab.evaluation.squad_scores import scores_by_row


def kind_of(question: str) -> str:
    """``What is the default`` and the like, without the name that is asked about."""
    return question.partition(" of ")[0]


def baseline(train: Rows, held_out: Rows) -> dict[str, float]:
    """Exact match and F1 of two answers to every question: none, and the most frequent one of its kind that is in the context
    (none if there is no such)."""
    counts: dict[str, Counter[str]] = {}
    for question, answers in zip(train.columns["question"], train.columns["answers"], strict=True):
        counts.setdefault(kind_of(question), Counter()).update(answers["text"])
    none, frequent = [], []
    for i in range(len(held_out)):
        row = held_out.row(i)
        likely = (text for text, _ in counts.get(kind_of(row["question"]), Counter()).most_common())
        window = {"row": i, "score": 1.0, "null_score": 0.0}
        none.append({**window, "text": ""})
        frequent.append({**window, "text": next((text for text in likely if text in row["context"]), "")})
    right = [answers["text"] for answers in held_out.columns["answers"]]
    values = {}
    for name, found in (("none", none), ("frequent", frequent)):
        scores = scores_by_row(found, right).values()
        values[f"{name}_exact"] = sum(s[0] for s in scores) / len(scores)
        values[f"{name}_f1"] = sum(s[1] for s in scores) / len(scores)
    return values
