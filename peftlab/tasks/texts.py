"""Tokenizes rows of one text, or of several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from peftlab.data import Rows, Tokens, pieces, tokenize
from peftlab.data.chat_template import Part, Rendered
from peftlab.data.values import NUMBERS, plain_text
from peftlab.errors import DataError
from peftlab.tasks.inputs import empty_role, is_blank, unusable_rows

_ROWS = 4096


class Texts:
    """Reads a column of texts with the tokenizer. Args: role: what the column is for the task."""

    def __init__(self, tokenizer: Any, column: str, role: str = "text") -> None:
        self._tokenizer, self.column, self.role = tokenizer, column, role
        self.key = f"data.columns.{role}"

    def pieces(self, rows: Rows) -> Iterator[tuple[int, Tokens]]:
        """``(index of the first row, tokens)`` for a few thousand rows at a time. Raises: DataError for an empty text."""
        rows.column(self.column, key=self.key)
        for first, rendered in pieces(rows, self._rendered):
            tokens = self._tokenize(rendered)
            for i in np.flatnonzero(tokens.lengths == 0).tolist():
                raise DataError(self._empty(rows.where(first + i)), key=self.key)
            yield first, tokens

    def unusable(self, rows: Rows) -> dict[int, str]:
        """Why rows cannot be read, by index. Raises: DataError if there is no such column."""
        return unusable_rows(rows, lambda part: list(self.pieces(part)), column=self.column, key=self.key)

    def row(self, rows: Rows, index: int) -> Tokens:
        """Tokens of one row."""
        return self._tokenize(self._rendered([rows.row(index)], [rows.where(index)]))

    def _rendered(self, rows: Sequence[Mapping[str, Any]], wheres: Sequence[str]) -> list[Rendered]:
        rendered = []
        for row, where in zip(rows, wheres, strict=True):
            text = row.get(self.column)
            if is_blank(text):
                raise DataError(self._empty(where), key=self.key)
            if (written := plain_text(text)) is None:
                raise DataError(f"{where}: expected text, found {text!r}", key=self.key)
            notes = () if written is text else (NUMBERS,)
            rendered.append(Rendered(written, [Part(0, len(written), self.role)], notes=notes))
        return rendered

    def _tokenize(self, rendered: list[Rendered]) -> Tokens:
        return tokenize(self._tokenizer, rendered, chat=False, stop_ids=())

    def _empty(self, where: str) -> str:
        return f"{where}: {empty_role(self.role)}; fill it in, or set data.empty=drop, which leaves such rows out"


def fitted(tokens: Tokens, kept: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Index and ids of the kept rows; a truncated row keeps its last token, the end separator of encoder models."""
    for i in np.flatnonzero(kept).tolist():
        ids = tokens.ids[tokens.row(i, int(kept[i]))]
        if kept[i] < tokens.lengths[i]:
            ids = np.append(ids[:-1], tokens.ids[tokens.bounds[i + 1] - 1])
        yield i, ids


class TextSets:
    """Reads several columns of texts, each text tokenized alone; a row holds one of each.

    Args: columns: role -> column.
    """

    def __init__(self, tokenizer: Any, columns: Mapping[str, str]) -> None:
        self.texts = [Texts(tokenizer, column, role) for role, column in columns.items()]

    @property
    def columns(self) -> list[str]:
        return [texts.column for texts in self.texts]

    def present(self, rows: Rows) -> TextSets:
        """The first column and the others that the rows have."""
        chosen = TextSets(None, {})
        chosen.texts = [t for i, t in enumerate(self.texts) if i == 0 or t.column in rows.columns]
        return chosen

    def pieces(self, rows: Rows) -> Iterator[tuple[int, list[Tokens]]]:
        """``(index of the first row, tokens of each column)`` for a few thousand rows at a time. Raises: DataError for an empty
        text."""
        for texts in self.texts:
            rows.column(texts.column, key=texts.key)
        for first in range(0, len(rows), _ROWS):
            part = rows.select(range(first, min(first + _ROWS, len(rows))))
            yield first, [stacked([tokens for _, tokens in texts.pieces(part)]) for texts in self.texts]

    def row(self, rows: Rows, index: int) -> list[Tokens]:
        """Tokens of each text of one row."""
        return [texts.row(rows, index) for texts in self.texts]

    def unusable(self, rows: Rows) -> dict[int, str]:
        """Why rows cannot be read, by index. Raises: DataError if there is no first column."""
        problems: dict[int, str] = {}
        for texts in self.present(rows).texts:
            problems = texts.unusable(rows) | problems
        return dict(sorted(problems.items()))


def stacked(parts: Sequence[Tokens]) -> Tokens:
    """The rows of ``parts``, which have the same roles and no answers, one after the other."""
    first = np.cumsum([0, *map(len, parts)]).tolist()
    starts = np.cumsum([0, *(len(part.ids) for part in parts)])
    bounds = [part.bounds[:-1] + start for part, start in zip(parts, starts, strict=False)]
    names = max((part.role_names for part in parts), key=len)
    return _untrained(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([*bounds, starts[-1:]]),
        np.concatenate([part.roles for part in parts]),
        names,
        tuple((row + at, note) for part, at in zip(parts, first, strict=False) for row, note in part.notes),
    )


def cut(tokens: Tokens, kept: np.ndarray) -> Tokens:
    """Each row with as many tokens as ``kept`` says; one that is cut keeps its last token (see ``fitted``)."""
    position = np.arange(len(tokens.ids)) - np.repeat(tokens.bounds[:-1], tokens.lengths)
    use = position < np.repeat(kept, tokens.lengths)
    shorter = np.flatnonzero((kept > 0) & (kept < tokens.lengths))
    use[tokens.bounds[:-1][shorter] + kept[shorter] - 1] = False
    use[tokens.bounds[1:][shorter] - 1] = True
    bounds = np.concatenate([[0], np.cumsum(np.minimum(kept, tokens.lengths))])
    return _untrained(tokens.ids[use], bounds, tokens.roles[use], tokens.role_names, tokens.notes)


def side_by_side(parts: Sequence[Tokens]) -> Tokens:
    """The texts of each row one after the other, as one row; ``parts`` have one text of each row."""
    names = tuple(dict.fromkeys(name for part in parts for name in part.role_names))
    number = {name: i for i, name in enumerate(names)}
    order = np.argsort(np.concatenate([np.repeat(np.arange(len(part)), part.lengths) for part in parts]), kind="stable")
    roles = [np.array([number[n] for n in part.role_names], dtype=np.int16)[part.roles] for part in parts]
    return _untrained(
        np.concatenate([part.ids for part in parts])[order],
        np.concatenate([[0], np.cumsum(sum(part.lengths for part in parts))]),
        np.concatenate(roles)[order],
        names,
        tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def _untrained(
    ids: np.ndarray, bounds: np.ndarray, roles: np.ndarray, names: tuple[str, ...], notes: tuple[tuple[int, str], ...]
) -> Tokens:
    none = np.zeros(0, dtype=np.int64)
    return Tokens(
        ids=ids,
        bounds=bounds,
        trained=np.zeros(len(ids), dtype=bool),
        roles=roles,
        role_names=names,
        answer_rows=none,
        answer_starts=none,
        answer_ends=none,
        answer_ended=none.astype(bool),
        answer_flaws=none.astype("U9"),
        unwritten=(),
        notes=notes,
    )
