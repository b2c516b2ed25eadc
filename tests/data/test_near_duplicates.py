"""Near duplicates against the definition, and chains of them."""

from __future__ import annotations

import pytest

from peftlab.data.near_duplicates import first_alike, near_duplicates

TEXTS = ["Enter a valid number.", "Enter a valid  Number.", "Enter a whole number.", "Delete", "of", ""]


def sequences(text: str) -> set[str]:
    words = [f" {word} " for word in text.lower().split()]
    return {word[i : i + 3] for word in words for i in range(max(1, len(word) - 2))}


@pytest.mark.parametrize("least", [0.3, 0.6, 1.0])
def test_pairs_are_those_with_that_jaccard_similarity(least: float) -> None:
    found = near_duplicates(TEXTS, TEXTS, least=least).toarray()
    for i, a in enumerate(map(sequences, TEXTS)):
        for j, b in enumerate(map(sequences, TEXTS)):
            assert bool(found[i, j]) == (bool(a & b) and len(a & b) >= least * len(a | b)), (i, j)


def test_chain_of_near_duplicates_leads_to_its_first_text() -> None:
    words = ["aaaa", "bbbb", "cccc", "dddd", "eeee", "ffff", "gggg", "hhhh"]
    chain = [" ".join(words[i : i + 6]) for i in range(3)]
    assert not near_duplicates(chain[:1], chain[2:]).nnz
    assert first_alike([*chain, "other text"]) == [chain[0]] * 3 + ["other text"]
    assert first_alike(["alone", "Alone", "apart"]) == ["alone", "alone", "apart"]
    assert first_alike([]) == []
