"""The answer that a row ends with, which a model writes again in evaluation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from peftlab.data import Tokens


class Turn(NamedTuple):
    """The answer that a row ends with. Attributes: start: number of tokens before it. answer: its tokens, also those that
    did not fit."""

    start: int
    answer: np.ndarray


def last_answer(tokens: Tokens, row: int, length: int) -> Turn:
    """The last answer that begins in the first ``length`` tokens of a row."""
    turns = np.flatnonzero(tokens.answer_rows == row)
    starts = tokens.answer_starts[turns] - tokens.bounds[row]
    turn = turns[np.flatnonzero(starts < length)[-1]]
    start, end = int(tokens.answer_starts[turn]), int(tokens.answer_ends[turn])
    return Turn(max(1, start - int(tokens.bounds[row])), tokens.ids[start:end])
