"""Draws the masks of masked language modelling."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from peftlab.errors import RecipeError

# Of the chosen tokens, these shares become the mask token and a random token; the rest stay as they are.
# Source: BERT, Devlin et al. 2019, section 3.1.
_MASKED, _RANDOM = 0.8, 0.1
_FIXED = 15  # a seed of its own, so that fixed masks are not those of a step


class Masker:
    """Chooses tokens of a row to be predicted, and what the model sees in their place.

    A row with n tokens other than special ones gets ``round(share * n)`` of them, at least one: an exact number, so that the
    weight of an example does not depend on the draw.

    Args: num_embeddings: rows of the model's input embeddings, see ``TaskParts``.
    Raises: RecipeError without a mask token.
    """

    def __init__(self, tokenizer: Any, share: float, num_embeddings: int | None) -> None:
        self._mask, self._share = tokenizer.mask_token_id, share
        if self._mask is None:
            raise RecipeError(
                "the tokenizer has no mask token, so its model is no masked language model; use a model such as BERT, or "
                "task: causal_lm",
                key="model.name",
            )
        special = set(tokenizer.all_special_ids) | {
            i for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._special = np.array(sorted(special), dtype=np.int64)
        count = min(len(tokenizer), num_embeddings or len(tokenizer))
        self._ordinary = np.setdiff1d(np.arange(count), self._special)

    def fixed(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """``draw`` with the same result for the same tokens, in every run."""
        seed = zlib.crc32(np.ascontiguousarray(ids, dtype="<i4").tobytes())
        return self.draw(ids, np.random.default_rng([_FIXED, seed]))

    def draw(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
        """``ids`` [T] as the model sees them, and the ascending positions to predict; None without an ordinary token."""
        candidates = np.flatnonzero(~np.isin(ids, self._special))
        if not len(candidates):
            return None
        count = max(1, int(self._share * len(candidates) + 0.5))
        chosen = np.sort(rng.choice(candidates, size=count, replace=False))
        seen, draw = np.array(ids, dtype=np.int32), rng.random(count)
        seen[chosen[draw < _MASKED]] = self._mask
        random = chosen[(draw >= _MASKED) & (draw < _MASKED + _RANDOM)]
        seen[random] = rng.choice(self._ordinary, size=len(random))
        return seen, chosen
