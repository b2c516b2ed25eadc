"""The class of each row, from the values of a label column."""

from __future__ import annotations

import bisect
import difflib
import math
import re
import statistics
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal
from typing import Any

from peftlab.data.rows import Rows
from peftlab.errors import DataError, listed

_ROWS_SHOWN = 5
# More different numbers with a fraction are measurements rather than names of classes.
_MOST_FRACTIONS = 20
_MOST_WHOLE_NUMBERS = 100
_NUMBERS = re.compile(r"\s*(?:[+-]?[0-9.]+(?:\s*,\s*|\s*$))*")  # the inside of a list of numbers, or of an empty one
_DECIMAL = re.compile(r"[+-]?[0-9]+\.[0-9]+")


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

    A value becomes text first, the same for every file format: stripped; decimals in their shortest form and whole ones
    without ``.0``, also if they are text as in csv; booleans as ``true`` and ``false``, also if all values of the column
    are such texts. ``label_names`` may name a value as it is in the file, or a class by the number that the file gives it.

    Args:
        key: the recipe key that names the column.
        label_names: value as text -> class name; if not empty, every value must be in it.
        bins: (ascending edges, a class name per bin, one more than edges); a value above an edge is in the next bin.
        all_names_used: an unused key of ``label_names`` is an error. False for held-out data, which may lack a class.

    Returns: N class names.

    Raises: DataError: missing column, a row without label or with several, a value missing in ``label_names``, or a value
        for ``bins`` that is not a number.
    """
    if label_names and bins is not None:
        raise DataError("set label_names or bins, not both: bins have their own class names", key="data.bins")
    raw = rows.column(column, key=key)
    for i, value in enumerate(raw):
        if isinstance(value, (list, dict, bytes)) or (isinstance(value, str) and _is_list(value)):
            remedy = f"; a row has one label here; for several set data.columns={{labels: {column}}} (task: seq_cls)"
            if isinstance(value, dict | bytes):
                remedy = "; store the label as text" if isinstance(value, bytes) else ""
            raise DataError(
                f"{rows.where(i)}: expected text, a number or true/false as label in the column {column!r}, "
                f"found {'a list as text' if isinstance(value, str) else type(value).__name__}{remedy}",
                key=key,
            )
    values = [label_text(value) for value in raw]
    _require_all_present(rows, values, column, key)
    if bins is not None:
        edges, names = bins
        return [names[bisect.bisect_left(edges, _number(rows, i, value, column))] for i, value in enumerate(values)]
    if label_names:
        return _renamed(rows, values, label_names, column, all_names_used)
    return values


def class_names(labels: Sequence[str], *, key: str = "data.columns.label") -> list[str]:
    """The distinct labels, in order: by number when all are integers, else by text.

    Raises: DataError: fewer than two, or scores rather than classes.
    """
    names = set(labels)
    if not names:
        raise DataError("no labels, because there are no rows; classification needs at least two classes", key=key)
    if len(names) == 1:
        raise DataError(
            f"one class only: {labels[0]!r} in all {len(labels)} rows; classification needs at least two", key=key
        )
    _refuse_measurements(labels, names)
    if all(re.fullmatch(r"[+-]?[0-9]{1,4000}", label) for label in names):
        return sorted(names, key=lambda label: (int(label), label))
    return sorted(names)


def similar_labels(names: Sequence[str]) -> list[list[str]]:
    """Groups of labels that differ only by case, spaces, invisible characters or Unicode form."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_folded(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _folded(label: str) -> str:
    plain = unicodedata.normalize("NFKC", label).casefold()
    return "".join(c for c in plain if not c.isspace() and unicodedata.category(c) != "Cf")


def nearest_label(label: str, names: Sequence[str]) -> str:
    """``; did you mean 'ham'?`` for a label that is not among ``names``; empty if none is near."""
    folded = next((name for name in names if _folded(name) == _folded(label)), None)
    if folded is not None:
        return f"; did you mean {folded!r}? It differs by case, spaces or Unicode form only"
    near = difflib.get_close_matches(label, names[:1000], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def label_text(value: Any) -> str:
    """The label as text, the same for every file format; empty when there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = value.strip()
        if text in ("True", "TRUE", "False", "FALSE"):
            return text.lower()
        if not _DECIMAL.fullmatch(text):
            return text
        short = re.sub(r"(\.[0-9]+?)0+$", r"\1", text)
        # More digits than a float has would change.
        return label_text(float(short)) if len(short) <= 16 else short
    if isinstance(value, Decimal):
        return label_text(format(value, "f"))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _is_list(value: str) -> bool:
    """Whether a text is a list that was written to a csv file."""
    text = value.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return False
    return "'" in text or '"' in text or _NUMBERS.fullmatch(text[1:-1]) is not None


def _refuse_measurements(labels: Sequence[str], names: Collection[str]) -> None:
    """Raises DataError if the labels are many different numbers with a fraction, or whole ones with hardly two rows each:
    a score, not a class."""
    if len(names) <= _MOST_FRACTIONS:
        return
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return
    few_rows = len(names) > _MOST_WHOLE_NUMBERS and len(labels) <= 2 * len(names)
    if all(number.is_integer() for number in numbers) and not few_rows:
        return
    middle = statistics.median(numbers)
    edge = middle if min(numbers) <= middle < max(numbers) else statistics.mean(numbers)
    raise DataError(
        f"the labels are {len(names):,} different numbers from {min(numbers):g} to {max(numbers):g}: a score, not a class; "
        "to learn the numbers themselves, name the column data.columns={score: COLUMN} (task: seq_cls); or cut them into "
        f"classes, such as data.bins={{edges: [{edge:g}], names: [low, high]}}",
        key="data.bins",
    )


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
    key_of = _keys_by_value(rows, column, values, label_names)
    for i, value in enumerate(values):
        if value not in key_of:
            raise DataError(
                f"{rows.where(i)}: the column {column!r} contains {value!r}, which is missing in data.label_names; "
                f"it has {listed(label_names)}{nearest_label(value, list(label_names))}",
                key="data.label_names",
            )
    unused = set(label_names).difference(key_of.values()) if all_names_used else set()
    if unused:
        raise DataError(
            f"{rows.name}: no row has {listed(sorted(unused))} in the column {column!r}, found "
            f"{listed(sorted(set(values)))}; remove it from data.label_names or correct it",
            key="data.label_names",
        )
    return [label_names[key_of[value]] for value in values]


def _keys_by_value(rows: Rows, column: str, values: list[str], label_names: Mapping[str, str]) -> dict[str, str]:
    """Label -> the key of ``label_names`` that means it: itself, as it is in the file, or its number in the file."""
    numbers = {name: str(i) for i, name in enumerate(rows.class_names.get(column, ()))}
    keys = {label_text(key): key for key in label_names}
    in_file: dict[str, set[str]] = {}
    for raw, value in zip(rows.columns[column], values, strict=True):
        in_file.setdefault(value, set()).add(str(raw).strip())
    found = {}
    for value in dict.fromkeys(values):
        for candidate in (value, *sorted(in_file[value]), numbers.get(value, value)):
            key = candidate if candidate in label_names else keys.get(candidate)
            if key is not None:
                found[value] = key
                break
    return found
