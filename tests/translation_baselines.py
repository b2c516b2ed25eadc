"""Simple baselines of the recipes that write texts: what needs no model, measured on their held-out rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from sklearn.feature_extraction.text import TfidfVectorizer

from peftlab.evaluation import text_scores


def first_sentences(texts: Sequence[str]) -> list[str]:
    return [re.split(r"(?<=[.!?:])\s", text)[0] for text in texts]


def nearest(train: Sequence[str], answers: Sequence[str], texts: Sequence[str]) -> list[str]:
    """The answer to the most similar training text (TF-IDF of two to four letters)."""
    count = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4))
    known = count.fit_transform(train)
    return [answers[int(row.argmax())] for row in count.transform(texts) @ known.T]


def word_by_word(train: Sequence[str], answers: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Each word as it is most often translated in the training rows with equally many words; others are copied."""
    votes: dict[str, Counter[str]] = {}
    for text, answer in zip(train, answers, strict=True):
        words, others = text.split(), answer.split()
        for word, other in zip(words, others, strict=True) if len(words) == len(others) else ():
            votes.setdefault(word, Counter())[other] += 1
    table = {word: counts.most_common(1)[0][0] for word, counts in votes.items()}
    return [" ".join(table.get(word, word) for word in text.split()) for text in texts]


def scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """chrF and BLEU (0 to 100), ROUGE and exact match (0 to 1)."""
    rouge = {kind: text_scores.rouge_rows(kind, answers, references) for kind in ("rouge1", "rougeL")}
    return {
        "chrf": text_scores.corpus_score(text_scores.chrf(), answers, references),
        "bleu": text_scores.corpus_score(text_scores.bleu(), answers, references),
        "exact": sum(a == r for a, r in zip(answers, references, strict=True)) / len(references),
        **{kind: sum(values) / len(values) for kind, values in rouge.items()},
    }
