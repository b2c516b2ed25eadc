"""Files of SQuAD (versions 1.1 and 2.0): articles with paragraphs, each a context with questions. They become a row per
question."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peftlab.data.table import Options, Table
from peftlab.errors import DataError, listed

_PARAGRAPHS, _QUESTIONS = "paragraphs", "qas"


def is_nested(columns: Mapping[str, list[Any]]) -> bool:
    """Whether records hold paragraphs with questions, or are such paragraphs."""
    named = next((columns[name] for name in (_PARAGRAPHS, _QUESTIONS) if name in columns), None)
    return named is not None and any(isinstance(value, list) for value in named)


def questions_of(table: Table, path: Path, options: Options) -> Table:
    """A row per question with its context, and with what else its paragraph and its article say of it.

    A row of a file of lines keeps the line of its record; of other files the questions are counted.

    Raises: DataError for a paragraph without context or questions.
    """
    rows: list[dict[str, Any]] = []
    positions: list[int] = []
    for i, position in enumerate(table.positions.tolist()):
        record = {name: values[i] for name, values in table.columns.items() if values[i] is not None}
        where = f"{path}:{position}" if table.unit == "line" else f"{path}, article {position}"
        for row in _of_record(record, where, options):
            rows.append(row)
            positions.append(position if table.unit == "line" else len(rows))
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    return table._replace(columns=columns, positions=np.array(positions, dtype=np.int64))


def _of_record(record: dict[str, Any], where: str, options: Options) -> Iterator[dict[str, Any]]:
    if _PARAGRAPHS not in record:
        paragraphs: Any = [record] if _QUESTIONS in record else []  # a line that describes the file has none
        about = {}
    else:
        paragraphs = record[_PARAGRAPHS]
        about = {name: value for name, value in record.items() if name != _PARAGRAPHS}
    for number, paragraph in enumerate(_list(paragraphs, _PARAGRAPHS, where, options), 1):
        place = f"{where}, paragraph {number}" if _PARAGRAPHS in record else where
        if not isinstance(paragraph, dict) or not {"context", _QUESTIONS} <= paragraph.keys():
            found = f"the keys {listed(paragraph)}" if isinstance(paragraph, dict) else type(paragraph).__name__
            raise DataError(f"{place}: expected a paragraph with 'context' and 'qas', found {found}", key=options.key)
        shared = about | {name: value for name, value in paragraph.items() if name != _QUESTIONS}
        for question in _list(paragraph[_QUESTIONS], _QUESTIONS, place, options):
            if not isinstance(question, dict):
                raise DataError(f"{place}: expected objects in 'qas', found {type(question).__name__}", key=options.key)
            yield shared | question


def _list(value: Any, name: str, where: str, options: Options) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{where}: expected a list in {name!r}, found {type(value).__name__}", key=options.key)
    return value
