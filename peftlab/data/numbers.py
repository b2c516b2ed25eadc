"""The number of each row, from a column of numbers or scores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from peftlab.data.rows import Rows
from peftlab.data.values import is_empty
from peftlab.errors import DataError

_KEY = "data.columns.score"


def read_numbers(rows: Rows, column: str, *, key: str = _KEY) -> npt.NDArray[np.float64]:
    """[N] the numbers of a column; text such as ``"3.5"`` is one. Raises: DataError for the first value that is none."""
    return np.array([_number(rows, i, value, column, key) for i, value in enumerate(rows.column(column, key=key))])


def read_scores(
    rows: Rows, column: str, *, scale: tuple[float, float] | None = None, lowest: float = 0.0
) -> npt.NDArray[np.float64]:
    """[N] the score of each row, from ``lowest`` to 1.

    Args: scale: the lowest and the highest score of the data, which become 0 and 1; None: scores are used as they are.
    Raises: DataError with the row: no column, no number, or a score outside the range.
    """
    scores = read_numbers(rows, column)
    low, high = scale if scale is not None else (lowest, 1.0)
    outside = np.flatnonzero((scores < low) | (scores > high))
    if len(outside):
        first = int(outside[0])
        remedy = "" if scale else "; data.score_range=[LOWEST,HIGHEST] maps the scores of the data to 0..1"
        raise DataError(
            f"{rows.where(first)}: the score {scores[first]:g} is outside {low:g}..{high:g}; the scores of {rows.name} are "
            f"{scores.min():g}..{scores.max():g}{remedy}",
            key="data.score_range" if scale else _KEY,
        )
    return scores if scale is None else (scores - low) / (high - low)


def _number(rows: Rows, index: int, value: Any, column: str, key: str) -> float:
    if is_empty(value):
        raise DataError(
            f"{rows.where(index)}: no number in the column {column!r}; fill it in, or set data.empty=drop, which leaves such "
            "rows out",
            key=key,
        )
    try:
        # Also a Decimal and NumPy's numbers; a list is none.
        number = float(value) if isinstance(value, str) or hasattr(value, "__float__") else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"{rows.where(index)}: expected a finite number in the column {column!r}, found {value!r}", key=key
        )
    return number
