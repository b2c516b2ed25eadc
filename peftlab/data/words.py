"""The words of a text, and the token that stands for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import regex

from peftlab.data.control_tokens import ControlTokens
from peftlab.data.tokens import Tokens

# A letter of a script without spaces between words is a word. Marks and joiners stay with what they modify.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(
    rf"[{_UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{N}}_]--[{_UNSPACED}]][[\p{{L}}\p{{N}}\p{{M}}_]--[{_UNSPACED}]]*"
    r"|(?![\s\p{Cc}\p{Cf}])\X",
    regex.VERSION1,
)

Span = tuple[int, int]


def words_of(text: str) -> list[Span]:
    """The characters ``[start, end)`` of each word: letters, digits and underscores in a row, and any other visible character."""
    return [match.span() for match in _WORD.finditer(text)]


def joined_words(words: Sequence[str]) -> tuple[str, list[Span]]:
    """A text with one space between words, and the characters of each."""
    ends = np.cumsum([len(word) + 1 for word in words]).tolist()
    return " ".join(words), [(end - 1 - len(word), end - 1) for word, end in zip(words, ends, strict=True)]


@dataclass(frozen=True)
class Positions:
    """The scored tokens of one row.

    Attributes:
        tokens: [P] int64 ascending token indices in the row.
        firsts, lasts: [P] the first and last word of each. Words share a position if one token stands for both.
        missing: words without a token, such as characters that the tokenizer drops; they have no position.
    """

    tokens: npt.NDArray[np.int64]
    firsts: npt.NDArray[np.int64]
    lasts: npt.NDArray[np.int64]
    missing: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)


def tokenize_words(
    tokenizer: Any, texts: Sequence[str], words: Sequence[Sequence[Span]], *, last: bool
) -> tuple[Tokens, list[Positions]]:
    """The tokens of texts and the scored ones among them, which ``trained`` marks.

    A word's position is the first token with characters of it, or the last one with ``last``: a model that reads from left
    to right knows the whole word only there.
    """
    encoded = ControlTokens(tokenizer).encode(texts, [()] * len(texts), add_special_tokens=True)
    lengths = np.fromiter((len(e.ids) for e in encoded), dtype=np.int64, count=len(encoded))
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.fromiter(chain.from_iterable(e.ids for e in encoded), dtype=np.int32, count=int(bounds[-1]))
    trained = np.zeros(len(ids), dtype=np.bool_)
    written = np.zeros(len(ids), dtype=np.int16)
    positions = []
    for start, encoding, own in zip(bounds[:-1].tolist(), encoded, words, strict=True):
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        found = _positions(offsets, np.array(own, dtype=np.int64).reshape(-1, 2), last=last)
        written[start : start + len(offsets)] = offsets[:, 1] > offsets[:, 0]
        trained[start + found.tokens] = True
        positions.append(found)
    none = np.zeros(0, dtype=np.int64)
    return Tokens(
        ids,
        bounds,
        trained,
        written,
        ("tokenizer", "text"),
        answer_rows=none,
        answer_starts=none,
        answer_ends=none,
        answer_ended=np.zeros(0, dtype=np.bool_),
        answer_flaws=np.zeros(0, dtype="U9"),
        unwritten=(),
    ), positions


def _positions(offsets: npt.NDArray[np.int64], words: npt.NDArray[np.int64], *, last: bool) -> Positions:
    """Args: offsets: [T, 2] characters of each token; without any for tokens that the tokenizer adds. words: [W, 2]."""
    real = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
    starts, ends = np.maximum.accumulate(offsets[real, 0]), np.maximum.accumulate(offsets[real, 1])
    first_of = np.searchsorted(ends, words[:, 0], side="right")
    last_of = np.searchsorted(starts, words[:, 1], side="left") - 1
    has = first_of <= last_of
    index = np.arange(len(words), dtype=np.int64)[has]
    tokens, at = np.unique(real[(last_of if last else first_of)[has]], return_index=True)
    return Positions(tokens.astype(np.int64), index[at], np.append(index[at[1:] - 1], index[-1:]), np.flatnonzero(~has))
