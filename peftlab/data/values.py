"""Values of columns that become text, the same for every file format."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from peftlab.errors import DataError

# The note of a text that was a number (``Rendered.notes``).
NUMBERS = "numbers"


class EmptyValueError(DataError):
    """A row has nothing in ``column``, which its text needs; ``data.empty: drop`` leaves such rows out."""

    def __init__(self, message: str, *, column: str, key: str) -> None:
        super().__init__(message, key=key)
        self.column = column


def is_null(value: Any) -> bool:
    """Whether it is null, or NaN, which pandas writes for null."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_empty(value: Any) -> bool:
    """Whether a column holds nothing: null, a text of white space (text files have no null), or an empty list."""
    if isinstance(value, str):
        return not value.strip()
    # An array has a size; a number of NumPy has one too, which is 1.
    return is_null(value) or (not value if isinstance(value, list) else getattr(value, "size", None) == 0)


def plain_text(value: Any) -> str | None:
    """Text as it is, and a number or a boolean as JSON writes it; None for any other value."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or (isinstance(value, int | float) and math.isfinite(value)):
        return json.dumps(value)
    return str(value) if isinstance(value, Decimal) and value.is_finite() else None
