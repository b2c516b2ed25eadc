"""Masks: an exact number of tokens, none of them special, 80/10/10, and the same again from the same seed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from peftlab.errors import RecipeError
from peftlab.tasks.masks import Masker
from tests.masked_examples import masked_tokenizer

SPECIAL = {0, 1, 2, 3}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return masked_tokenizer()


def ids_of(length: int, seed: int = 0) -> np.ndarray:
    """[length + 2] ordinary tokens between the tokenizer's own."""
    body = np.random.default_rng(seed).integers(4, 260, length)
    return np.concatenate([[3], body, [2]]).astype(np.int32)


@pytest.mark.parametrize("share", [0.15, 0.4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 10, 17, 126])
def test_number_of_masks_depends_on_the_length_only(tokenizer: Any, length: int, share: float) -> None:
    masker, rng = Masker(tokenizer, share, 260), np.random.default_rng(1)
    want = max(1, int(np.floor(share * length + 0.5)))
    for _ in range(5):
        drawn = masker.draw(ids_of(length), rng)
        assert drawn is not None and len(drawn[1]) == len(set(drawn[1])) == want


def test_special_tokens_are_neither_masked_nor_drawn(tokenizer: Any) -> None:
    masker, rng = Masker(tokenizer, 0.5, 260), np.random.default_rng(0)
    ids = ids_of(60)
    ids[10:20] = 2
    for _ in range(50):
        seen, chosen = masker.draw(ids, rng) or (ids, np.arange(0))
        assert not set(ids[chosen].tolist()) & SPECIAL
        assert set(seen[chosen].tolist()) & SPECIAL <= {tokenizer.mask_token_id}
        rest = np.setdiff1d(np.arange(len(ids)), chosen)
        assert (seen[rest] == ids[rest]).all()


def test_eight_of_ten_become_the_mask_and_one_a_random_token(tokenizer: Any) -> None:
    masker, rng, ids = Masker(tokenizer, 0.5, 260), np.random.default_rng(0), ids_of(200)
    kinds = np.zeros(3)
    for _ in range(200):
        seen, chosen = masker.draw(ids, rng) or (ids, np.arange(0))
        masked = seen[chosen] == tokenizer.mask_token_id
        same = seen[chosen] == ids[chosen]
        kinds += [masked.sum(), same.sum(), (~masked & ~same).sum()]
    # 20,000 draws: three standard deviations are 0.85 %; a random token equals the old one once in 256.
    assert np.abs(kinds / kinds.sum() - [0.8, 0.1, 0.1]).max() < 0.01


def test_every_position_is_chosen_as_often(tokenizer: Any) -> None:
    masker, rng, ids = Masker(tokenizer, 0.2, 260), np.random.default_rng(0), ids_of(20)
    counts = np.zeros(len(ids))
    for _ in range(2000):
        counts[(masker.draw(ids, rng) or (ids, np.arange(0)))[1]] += 1
    assert counts[0] == counts[-1] == 0
    assert np.abs(counts[1:-1] / 2000 - 0.2).max() < 0.04


def test_fixed_masks_follow_from_the_tokens(tokenizer: Any) -> None:
    one, other = Masker(tokenizer, 0.15, 260), Masker(masked_tokenizer(), 0.15, 260)
    first, again = one.fixed(ids_of(40)), other.fixed(ids_of(40).astype(np.int64))
    assert first is not None and again is not None
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    different = one.fixed(ids_of(40, seed=1))
    assert different is not None and different[1].tolist() != first[1].tolist()


def test_random_tokens_have_an_embedding_row(tokenizer: Any) -> None:
    masker, rng = Masker(tokenizer, 0.9, 20), np.random.default_rng(0)
    ids = np.full(500, 5, dtype=np.int32)
    seen, _ = masker.draw(ids, rng) or (ids, ids)
    assert seen.max() < 20 and len(set(seen.tolist())) > 10


def test_row_of_special_tokens_has_no_masks(tokenizer: Any) -> None:
    assert Masker(tokenizer, 0.15, 260).fixed(np.array([3, 2, 2], dtype=np.int32)) is None


def test_tokenizer_without_a_mask_token_is_refused() -> None:
    plain = SimpleNamespace(mask_token_id=None)
    with pytest.raises(RecipeError, match=r"no mask token.*such as BERT, or task: causal_lm") as error:
        Masker(plain, 0.15, None)
    assert error.value.key == "model.name"
