"""Which texts are nearly the same, so that they can stay on one side of a split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_LETTERS = 3


def near_duplicates(texts: Sequence[str], others: Sequence[str], *, least: float = 0.6) -> Any:
    """Where a text and another one are nearly the same: a sparse [N, M] array of 1 and 0.

    They are if the sets of the three-letter sequences of their words, in lower case, have a Jaccard similarity of at least
    ``least``. Memory and time grow with the pairs that share a sequence: for thousands of texts, not for millions.
    """
    from scipy.sparse import coo_array
    from sklearn.feature_extraction.text import CountVectorizer

    count = CountVectorizer(analyzer="char_wb", ngram_range=(_LETTERS, _LETTERS), binary=True)
    sequences = count.fit_transform([*texts, *others])
    a, b = sequences[: len(texts)], sequences[len(texts) :]
    shared = (a @ b.T).tocoo()
    union = a.sum(axis=1).A1[shared.row] + b.sum(axis=1).A1[shared.col] - shared.data
    alike = shared.data >= least * union
    row, col = shared.row[alike], shared.col[alike]
    return coo_array(([1] * len(row), (row, col)), shape=shared.shape)


def first_alike(texts: Sequence[str]) -> list[str]:
    """For each text the first one to which a chain of near duplicates leads; without any, itself."""
    from scipy.sparse.csgraph import connected_components

    if not texts:
        return []
    _, group = connected_components(near_duplicates(texts, texts), directed=False)
    first: dict[int, str] = {}
    return [first.setdefault(number, text) for number, text in zip(group.tolist(), texts, strict=True)]
