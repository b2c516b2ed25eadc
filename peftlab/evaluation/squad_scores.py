"""Exact match and F1 of answers to questions, as the official evaluation of SQuAD defines them.

A context of several windows has an answer, and a score for having none, per window; they become one answer here. Sources:
``evaluate-v1.1.py`` and ``evaluate-v2.0.py`` of Rajpurkar et al. 2016 and 2018.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# What ``evaluate`` takes per window.
FEATURES = datasets.Features(
    {
        "predictions": {
            "row": datasets.Value("int64"),
            "text": datasets.Value("string"),
            "score": datasets.Value("float64"),
            "null_score": datasets.Value("float64"),
        },
        "references": datasets.Sequence(datasets.Value("string")),
    }
)
INPUTS = (
    "predictions: per window its row, the text and score of its best answer, and null_score, which has to exceed the score in "
    "every window of the row for the answer to be none; references: per window the right answers to its row, none if there is "
    "no answer."
)


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and repeated spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(found: str, right: str) -> float:
    """1 if the normalised texts are equal, else 0."""
    return float(normalised(found) == normalised(right))


def f1(found: str, right: str) -> float:
    """The harmonic mean of the shares of words that one text has in common with the other, in 0..1."""
    ours, theirs = normalised(found).split(), normalised(right).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def answers_by_row(windows: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """The answer to each row: that of its window with the highest score, or none (an empty text)."""
    best: dict[int, tuple[float, str]] = {}
    null: dict[int, float] = {}
    for window in windows:
        row, found = int(window["row"]), (float(window["score"]), str(window["text"]))
        if row not in best or found[0] > best[row][0]:
            best[row] = found
        null[row] = min(null.get(row, float("inf")), float(window["null_score"]))
    return {row: text if score >= null[row] else "" for row, (score, text) in best.items()}


def scores_by_row(
    windows: Sequence[Mapping[str, Any]], references: Sequence[Sequence[str]]
) -> dict[int, tuple[float, float, bool]]:
    """``(exact match, F1, whether there is an answer)`` of each row, each the best over its right answers.

    Args: windows, references: as in ``INPUTS``.
    """
    right = {int(w["row"]): list(texts) for w, texts in zip(windows, references, strict=True)}
    scores = {}
    for row, found in answers_by_row(windows).items():
        # As the official evaluation: an answer of articles and punctuation only is none.
        golds = [text for text in right[row] if normalised(text)] or [""]
        scores[row] = (max(exact(found, g) for g in golds), max(f1(found, g) for g in golds), bool(right[row]))
    return scores


def averages(
    name: str, which: int, windows: Sequence[Mapping[str, Any]], references: Sequence[Sequence[str]]
) -> dict[str, float | None]:
    """``NAME`` over all rows, ``NAME_answerable`` over those with an answer and ``NAME_unanswerable`` over the others; None
    without such rows. Args: which: 0 for exact match, 1 for F1."""
    scores = scores_by_row(windows, references).values()
    parts = {
        name: [s[which] for s in scores],
        f"{name}_answerable": [s[which] for s in scores if s[2]],
        f"{name}_unanswerable": [s[which] for s in scores if not s[2]],
    }
    return {part: sum(values) / len(values) if values else None for part, values in parts.items()}
