"""The class of each row, from the values of a label column."""

from __future__ import annotations

import bisect
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from peftlab.data.rows import Rows
from peftlab.errors import DataError

_ROWS_SHOWN = 5


def read_labels(
    rows: Rows,
    column: str,
    *,
    key: str = "data.columns.label",
    label_names: Mapping[str, str] | None = None,
    bins: tuple[list[float], list[str]] | None = None,
    all_names_used: bool = True,
) -> list[str]:
    """The class name of each row.

    A value becomes text first: stripped; whole numbers without ``.0``; booleans as ``true`` and ``false``.

    Args:
        key: the recipe key that names the column.
        label_names: value as text -> class name; if not empty, every value must be in it.
        bins: (ascending edges, a class name per bin, one more than edges); a value above an edge is in the next bin.
        all_names_used: an unused key of ``label_names`` is an error. False for held-out data, which may lack a class.

    Returns: N class names.

    Raises: DataError: missing column, a row without label, a value missing in ``label_names``, or a value for ``bins``
        that is not a number.
    """
    if label_names and bins is not None:
        raise DataError("set label_names or bins, not both: bins have their own class names", key="data.bins")
    raw = rows.column(column, key=key)
    for i, value in enumerate(raw):
        if isinstance(value, (list, dict, bytes)):
            raise DataError(
                f"{rows.where(i)}: expected text, a number or true/false as label in the column {column!r}, "
                f"found {type(value).__name__}",
                key=key,
            )
    values = [_as_text(value) for value in raw]
    _require_all_present(rows, values, column, key)
    if bins is not None:
        edges, names = bins
        return [names[bisect.bisect_left(edges, _number(rows, i, value, column))] for i, value in enumerate(values)]
    if label_names:
        return _renamed(rows, values, label_names, column, all_names_used)
    return values


def class_names(labels: Sequence[str], *, key: str = "data.columns.label") -> list[str]:
    """The distinct labels, in order: by number when all are integers, else by text.

    Raises: DataError: fewer than two.
    """
    names = set(labels)
    if not names:
        raise DataError("no labels, because there are no rows; classification needs at least two classes", key=key)
    if len(names) == 1:
        raise DataError(
            f"one class only: {labels[0]!r} in all {len(labels)} rows; classification needs at least two", key=key
        )
    if all(re.fullmatch(r"[+-]?[0-9]{1,4000}", label) for label in names):
        return sorted(names, key=lambda label: (int(label), label))
    return sorted(names)


def _as_text(value: Any) -> str:
    """The label as text; empty when there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _require_all_present(rows: Rows, values: list[str], column: str, key: str) -> None:
    missing = [i for i, value in enumerate(values) if not value]
    if missing:
        more = ", ..." if len(missing) > _ROWS_SHOWN else ""
        first = ", ".join(rows.where(i) for i in missing[:_ROWS_SHOWN])
        raise DataError(
            f"{len(missing)} of {len(rows)} rows have no label in the column {column!r}: {first}{more}; "
            "fill them in, or set data.empty=drop, which leaves such rows out",
            key=key,
        )


def _number(rows: Rows, index: int, value: str, column: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise DataError(
            f"{rows.where(index)}: expected a number in the column {column!r} to cut into bins, found {value!r}",
            key="data.bins",
        )
    return number


def _renamed(
    rows: Rows, values: list[str], label_names: Mapping[str, str], column: str, all_names_used: bool
) -> list[str]:
    known = ", ".join(map(repr, label_names))
    for i, value in enumerate(values):
        if value not in label_names:
            near = difflib.get_close_matches(value, label_names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"{rows.where(i)}: the column {column!r} contains {value!r}, which is missing in data.label_names; "
                f"it has {known}{hint}",
                key="data.label_names",
            )
    unused = set(label_names).difference(values) if all_names_used else set()
    if unused:
        values_found = ", ".join(map(repr, sorted(set(values))))
        raise DataError(
            f"{rows.name}: no row has {', '.join(map(repr, sorted(unused)))} in the column {column!r}, found {values_found}; "
            "remove it from data.label_names or correct it",
            key="data.label_names",
        )
    return [label_names[value] for value in values]
