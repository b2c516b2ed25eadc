"""Tokenizes rows with one text each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from peftlab.data import Rows, Tokens, pieces, tokenize
from peftlab.data.chat_template import Part, Rendered
from peftlab.errors import DataError

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
                raise DataError(f"{rows.where(first + i)}: the text is empty", key=_KEY)
            yield first, tokens

    def row(self, rows: Rows, index: int) -> Tokens:
        """Tokens of one row."""
        return self._tokenize(self._rendered([rows.row(index)], [rows.where(index)]))

    def _rendered(self, rows: Sequence[Mapping[str, Any]], wheres: Sequence[str]) -> list[Rendered]:
        rendered = []
        for row, where in zip(rows, wheres, strict=True):
            text = row.get(self.column)
            if not isinstance(text, str):
                raise DataError(f"{where}: expected text, found {text!r}", key=_KEY)
            rendered.append(Rendered(text, [Part(0, len(text), "text")]))
        return rendered

    def _tokenize(self, rendered: list[Rendered]) -> Tokens:
        return tokenize(self._tokenizer, rendered, chat=False, stop_ids=())


def fitted(tokens: Tokens, kept: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Index and ids of the kept rows; a truncated row keeps its last token, the end separator of encoder models."""
    for i in np.flatnonzero(kept).tolist():
        ids = tokens.ids[tokens.row(i, int(kept[i]))]
        if kept[i] < tokens.lengths[i]:
            ids = np.append(ids[:-1], tokens.ids[tokens.bounds[i + 1] - 1])
        yield i, ids
