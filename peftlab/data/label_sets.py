"""The labels of each row, any number of them: from lists, from separated text, or from columns of 0 and 1."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from peftlab.data.labels import label_text, nearest_label
from peftlab.data.rows import Rows
from peftlab.data.values import is_null
from peftlab.errors import DataError, listed

_KEY = "data.columns.labels"
_YES, _NO = {"1", "true", "yes"}, {"0", "false", "no", ""}


def label_columns(column: str, available: Collection[str]) -> list[str]:
    """The columns that ``data.columns.labels`` names: one, or several separated by commas."""
    if column in available or "," not in column:
        return [column]
    return [name.strip() for name in column.split(",") if name.strip()]


def read_label_sets(
    rows: Rows, column: str, *, separator: str | None = None, label_names: Mapping[str, str] | None = None
) -> list[list[str]]:
    """The labels of each row, in the order of the file, each once; a row may have none.

    Args:
        column: one column of lists, of lists as JSON text, or of text with ``separator`` between the labels; or several
            columns of 0 and 1, separated by commas, whose names are the labels.
        label_names: value as text -> label; if not empty, every value must be in it.
    Raises: DataError: a missing column, or a value of another kind.
    """
    columns = label_columns(column, rows.columns)
    if len(columns) > 1:
        if separator is not None:
            raise DataError("has no effect on columns of 0 and 1; remove it", key="data.separator")
        flags = [_flags(rows, name) for name in columns]
        sets = [[name for name, flag in zip(columns, row, strict=True) if flag] for row in zip(*flags, strict=True)]
    else:
        values = rows.column(columns[0], key=_KEY)
        sets = [_labels(rows, i, value, columns[0], separator) for i, value in enumerate(values)]
    return [_named(rows, i, labels, columns[0], label_names or {}) for i, labels in enumerate(sets)]


def label_set_names(sets: Sequence[Sequence[str]]) -> list[str]:
    """The distinct labels, sorted. Raises: DataError if no row has one."""
    names = {label for labels in sets for label in labels}
    if not names:
        raise DataError("no row has a label", key=_KEY)
    return sorted(names)


def _labels(rows: Rows, index: int, value: Any, column: str, separator: str | None) -> list[str]:
    where = rows.where(index)
    if is_null(value):
        return []
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str):
        value = _split(value, separator, where, column)
    if not isinstance(value, list):
        remedy = "; for one label per row set data.columns={label: " + column + "}"
        raise DataError(
            f"{where}: expected a list of labels in the column {column!r}, found {value!r}{remedy}", key=_KEY
        )
    labels = []
    for item in value:
        if isinstance(item, list | dict | bytes) or not label_text(item):
            raise DataError(f"{where}: expected text or a number as label, found {item!r}", key=_KEY)
        labels.append(label_text(item))
    return list(dict.fromkeys(labels))


def _split(text: str, separator: str | None, where: str, column: str) -> list[Any]:
    """The labels in a text."""
    if separator is not None:
        return [part for part in text.split(separator) if part.strip()]
    if not text.strip():
        return []
    if text.strip().startswith("["):
        try:
            parsed = json.loads(text if '"' in text else text.replace("'", '"'))
        except ValueError:
            parsed = None
        if isinstance(parsed, list):
            return parsed
    raise DataError(
        f"{where}: expected a list of labels in the column {column!r}, found the text {text[:60]!r}; set data.separator to "
        "what stands between the labels, such as ';'",
        key="data.separator",
    )


def _flags(rows: Rows, column: str) -> list[bool]:
    flags = []
    for i, value in enumerate(rows.column(column, key=_KEY)):
        text = label_text(value).lower()
        if text not in _YES | _NO:
            raise DataError(
                f"{rows.where(i)}: expected 0 or 1 in the column {column!r}, found {value!r}; a column of lists is named alone",
                key=_KEY,
            )
        flags.append(text in _YES)
    return flags


def _named(rows: Rows, index: int, labels: list[str], column: str, names: Mapping[str, str]) -> list[str]:
    if not names:
        return labels
    texts = {label_text(key): name for key, name in names.items()}
    for label in labels:
        if label not in texts:
            raise DataError(
                f"{rows.where(index)}: the column {column!r} contains {label!r}, which is missing in data.label_names; it has "
                f"{listed(names)}{nearest_label(label, list(names))}",
                key="data.label_names",
            )
    return list(dict.fromkeys(texts[label] for label in labels))
