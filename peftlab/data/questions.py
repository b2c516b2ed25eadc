"""Rows with a question, a context, and the answers as parts of the context: in the layouts of SQuAD and simple ones."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftlab.data.rows import Rows
from peftlab.data.values import is_empty, is_null, plain_text
from peftlab.errors import DataError, listed

# Names of the column with answers, in this order, if the recipe names none.
_ANSWER_COLUMNS = ("answers", "answer")
_STARTS = ("answer_start", "start")
_MOST_SHOWN = 60


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        answers: the right answers, the one to train first; empty if the context has none.
        start: where the first answer starts in the context; None without an answer. ambiguous: whether the row does not say
            where, and it occurs more than once.
    """

    question: str
    context: str
    answers: tuple[str, ...] = ()
    start: int | None = None
    ambiguous: bool = False


class Questions:
    """Reads the columns of questions. Args: columns: part -> name of its column, as in data.columns."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._columns = columns

    def column(self, part: str) -> str:
        return self._columns.get(part, part)

    def read_columns(self) -> set[str]:
        """Every column that may be read."""
        own = {self.column(part) for part in ("question", "context", "answer_start", "is_impossible", "id")}
        return own | ({self._columns["answers"]} if "answers" in self._columns else set(_ANSWER_COLUMNS))

    def require(self, rows: Rows, *, answers: bool) -> None:
        """Raises DataError for a missing column."""
        for part in ("question", "context"):
            rows.column(self.column(part), key=f"data.columns.{part}")
        if not answers or self.column("is_impossible") in rows.columns or self._answers(rows.columns) is not None:
            return
        if "answers" in self._columns:
            rows.column(self._columns["answers"], key="data.columns.answers")
        raise DataError(
            f"{rows.name}: no column with answers; expected 'answers' or 'answer', found the columns "
            f"{listed(rows.columns)}; name it in data.columns.answers",
            key="data.columns.answers",
        )

    def where(self, row: Mapping[str, Any], where: str) -> str:
        """The place of a row with its id, if it has one."""
        name = row.get(self.column("id"))
        return where if is_null(name) or name == "" else f"{where} (id {name})"

    def unanswered(self, row: Mapping[str, Any]) -> bool:
        """Whether a row says neither what the answer is nor that there is none."""
        name = self._answers(row)
        return (name is None or is_null(row[name])) and not self._impossible(row)

    def read(self, row: Mapping[str, Any], where: str, *, labelled: bool) -> Question:
        """The question of a row. Raises: DataError with the place and the id.

        Args: labelled: False to ignore the answers.
        """
        where = self.where(row, where)
        question, context = (self._text(row, part, where) for part in ("question", "context"))
        if not labelled or self._impossible(row):
            return Question(question, context)
        if self.unanswered(row):
            raise DataError(
                f"{where}: there is no answer; rows to train on and held-out rows need one, and a question without answer "
                "an empty one ([] or an empty text) or is_impossible: true",
                key="data.columns.answers",
            )
        name = self._answers(row)
        assert name is not None
        found = self._read_answers(row[name], row, where)
        if not found:
            return Question(question, context)
        (start, ambiguous), *_ = [_located(text, start, context, where) for text, start in found]
        return Question(question, context, tuple(text for text, _ in found), start, ambiguous)

    def _answers(self, columns: Mapping[str, Any]) -> str | None:
        """The column with answers; None if there is none."""
        names = [self._columns["answers"]] if "answers" in self._columns else _ANSWER_COLUMNS
        return next((name for name in names if name in columns), None)

    def _impossible(self, row: Mapping[str, Any]) -> bool:
        value = row.get(self.column("is_impossible"))
        return value.strip().lower() in ("true", "1") if isinstance(value, str) else value in (True, 1)

    def _text(self, row: Mapping[str, Any], part: str, where: str) -> str:
        value = row.get(self.column(part))
        if is_empty(value):
            raise DataError(
                f"{where}: the {part} is empty; fill it in, or set data.empty=drop, which leaves such rows out",
                key=f"data.columns.{part}",
            )
        if (text := plain_text(value)) is None:
            raise DataError(
                f"{where}: expected text as {part}, found {type(value).__name__}", key=f"data.columns.{part}"
            )
        return text

    def _read_answers(self, value: Any, row: Mapping[str, Any], where: str) -> list[tuple[str, int | None]]:
        """The text and start of each answer of a row. A start that the row does not give is None."""
        value = _unquoted(value.tolist() if hasattr(value, "tolist") else value)
        if isinstance(value, dict):
            texts = _as_list(value.get("text"))
            starts = next((_as_list(value[name]) for name in _STARTS if name in value), [None] * len(texts))
            if len(starts) != len(texts):
                raise _wrong(f"{where}: {len(texts)} answers with {len(starts)} starts")
            pairs = list(zip(texts, starts, strict=True))
        elif isinstance(value, list):
            pairs = [
                (v.get("text"), next((v[n] for n in _STARTS if n in v), None)) if isinstance(v, dict) else (v, None)
                for v in value
            ]
        else:
            blank = isinstance(value, str) and not value.strip()
            pairs = [] if blank else [(value, row.get(self.column("answer_start")))]
        read = []
        for text, start in pairs:
            if (written := plain_text(text)) is None or not written.strip():
                shown = "an empty text" if written is not None else _shown(text)
                raise _wrong(f"{where}: expected the text of an answer, found {shown}")
            read.append(_stripped(written, _number(start, where)))
        return read


def _as_list(value: Any) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _unquoted(value: Any) -> Any:
    """A list or an object that was written to a csv file as text; any other value unchanged."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not text.startswith(("{", "[")):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError):
            continue
        if isinstance(found, list | dict):
            return found
    return value


def _number(value: Any, where: str) -> int | None:
    if is_null(value) or value == "":
        return None
    try:
        if isinstance(value, bool) or not float(value).is_integer():
            raise ValueError
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        raise _wrong(
            f"{where}: expected a whole number as start of the answer, found {_shown(value)}", "answer_start"
        ) from None


def _stripped(text: str, start: int | None) -> tuple[str, int | None]:
    """An answer without white space at its ends."""
    ahead = len(text) - len(text.lstrip())
    return text.strip(), None if start is None else start + ahead


def _located(text: str, start: int | None, context: str, where: str) -> tuple[int, bool]:
    """Where an answer starts in ``context``, and whether that is one of several places. Raises: DataError."""
    places = _places(text, context)
    if not places:
        raise _wrong(
            f"{where}: the answer {_shown(text)} is not in the context; it has to be a part of it, as it is written"
        )
    if start is None:
        return places[0], len(places) > 1
    if start in places:
        return start, False
    nearest = min(places, key=lambda place: abs(place - start))
    off = nearest - start
    there = context[start : start + len(text)] if 0 <= start < len(context) else ""
    found = f"there is {_shown(there)}" if there else f"the context has {len(context):,} characters"
    raise _wrong(
        f"{where}: answer_start is {start:,}, where {found}; the answer {_shown(text)} starts at {nearest:,}, "
        f"{abs(off):,} character{'' if abs(off) == 1 else 's'} {'later' if off > 0 else 'earlier'}. Starts count characters "
        "from 0",
        "answer_start",
    )


def _places(text: str, context: str) -> Sequence[int]:
    places, at = [], context.find(text)
    while at >= 0:
        places.append(at)
        at = context.find(text, at + 1)
    return places


def _wrong(message: str, part: str = "answers") -> DataError:
    return DataError(message, key=f"data.columns.{part}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
