"""The number of each row, from a column of scores."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from peftlab.data.rows import Rows
from peftlab.data.values import is_empty
from peftlab.errors import DataError


def read_numbers(rows: Rows, column: str, *, key: str = "data.columns.score") -> npt.NDArray[np.float64]:
    """[N] the numbers of a column; text such as ``"3.5"`` is one. Raises: DataError for the first value that is none."""
    return np.array([_number(rows, i, value, column, key) for i, value in enumerate(rows.column(column, key=key))])


def _number(rows: Rows, index: int, value: Any, column: str, key: str) -> float:
    if is_empty(value):
        raise DataError(
            f"{rows.where(index)}: no number in the column {column!r}; fill it in, or set data.empty=drop, which leaves such "
            "rows out",
            key=key,
        )
    try:
        number = float(value) if isinstance(value, str | int | float | Decimal) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"{rows.where(index)}: expected a finite number in the column {column!r}, found {value!r}", key=key
        )
    return number
