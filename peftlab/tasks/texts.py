"""Tokenizes rows with one text each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from peftlab.data import Rows, Tokens, pieces, tokenize
from peftlab.data.chat_template import Part, Rendered
from peftlab.data.values import NUMBERS, plain_text
from peftlab.errors import DataError
from peftlab.tasks.inputs import EMPTY_TEXT, is_blank, unusable_rows

_KEY = "data.columns.text"


class Texts:
    """Reads the text column with the tokenizer."""

    def __init__(self, tokenizer: Any, column: str) -> None:
        self._tokenizer, self.column = tokenizer, column

    def pieces(self, rows: Rows) -> Iterator[tuple[int, Tokens]]:
        """``(index of the first row, tokens)`` for a few thousand rows at a time. Raises: DataError for an empty text."""
        rows.column(self.column)
        for first, rendered in pieces(rows, self._rendered):
            tokens = self._tokenize(rendered)
            for i in np.flatnonzero(tokens.lengths == 0).tolist():
                raise DataError(_empty(rows.where(first + i)), key=_KEY)
            yield first, tokens

    def unusable(self, rows: Rows) -> dict[int, str]:
        """Why rows cannot be read, by index. Raises: DataError if there is no such column."""
        return unusable_rows(rows, lambda part: list(self.pieces(part)), column=self.column, key=_KEY)

    def row(self, rows: Rows, index: int) -> Tokens:
        """Tokens of one row."""
        return self._tokenize(self._rendered([rows.row(index)], [rows.where(index)]))

    def _rendered(self, rows: Sequence[Mapping[str, Any]], wheres: Sequence[str]) -> list[Rendered]:
        rendered = []
        for row, where in zip(rows, wheres, strict=True):
            text = row.get(self.column)
            if is_blank(text):
                raise DataError(_empty(where), key=_KEY)
            if (written := plain_text(text)) is None:
                raise DataError(f"{where}: expected text, found {text!r}", key=_KEY)
            notes = () if written is text else (NUMBERS,)
            rendered.append(Rendered(written, [Part(0, len(written), "text")], notes=notes))
        return rendered

    def _tokenize(self, rendered: list[Rendered]) -> Tokens:
        return tokenize(self._tokenizer, rendered, chat=False, stop_ids=())


def _empty(where: str) -> str:
    return f"{where}: {EMPTY_TEXT}; fill it in, or set data.empty=drop, which leaves such rows out"


def fitted(tokens: Tokens, kept: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Index and ids of the kept rows; a truncated row keeps its last token, the end separator of encoder models."""
    for i in np.flatnonzero(kept).tolist():
        ids = tokens.ids[tokens.row(i, int(kept[i]))]
        if kept[i] < tokens.lengths[i]:
            ids = np.append(ids[:-1], tokens.ids[tokens.bounds[i + 1] - 1])
        yield i, ids
