"""The inputs of a prediction: rows that cannot be one, and inputs that are longer than the model reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peftlab.data import Rows
from peftlab.data.values import is_empty
from peftlab.errors import DataError

EMPTY_TEXT, NO_LABEL, NO_IMAGE, NO_MASK, NO_SCORE = (
    "the text is empty",
    "there is no label",
    "there is no image",
    "there is no mask",
    "there is no score",
)


def empty_role(role: str) -> str:
    """The reason for a row whose column of this role is empty."""
    return f"the {'second text' if role == 'pair' else role} is empty"


def blank_values(rows: Rows, columns: Mapping[str, str], *, key: str = "data.columns") -> dict[int, str]:
    """Why rows have no value in one of the columns, by index. Args: columns: column -> the reason. Raises: DataError if there
    is no such column."""
    blank: dict[int, str] = {}
    for column, reason in columns.items():
        blank |= {
            i: reason for i, value in enumerate(rows.column(column, key=key)) if i not in blank and is_empty(value)
        }
    return dict(sorted(blank.items()))


def unusable_rows(
    rows: Rows, read: Callable[[Rows], Any], *, column: str | None, key: str = "data.columns"
) -> dict[int, str]:
    """Why rows cannot be an input, by index: a blank value in ``column``, or what ``read`` says about the row.

    Args: read: reads all rows of its argument and raises DataError for one that it cannot read.
    Raises: DataError if there is no such column.
    """
    problems: dict[int, str] = {}
    if column is not None:
        values = rows.column(column, key=key)
        problems = {i: EMPTY_TEXT for i, value in enumerate(values) if is_empty(value)}
    rest = [i for i in range(len(rows)) if i not in problems]
    try:
        read(rows.select(rest))
    except DataError:
        for i in rest:
            try:
                read(rows.select([i]))
            except DataError as reason:
                problems[i] = str(reason).removeprefix(f"{rows.where(i)}: ")
    return problems


def cut_note(length: int, kept: int) -> dict[str, str]:
    """``{"note": ...}`` of a result for an input of ``length`` tokens of which the first ``kept`` are read; {} if all are."""
    return {"note": f"cut to {kept:,} of {length:,} tokens"} if kept < length else {}
