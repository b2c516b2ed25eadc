"""Tokenizes rows of one text, of two texts in one sequence, or of several texts each alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from peftlab.data import Rows, Tokens, pieces, tokenize
from peftlab.data.chat_template import Part, Rendered
from peftlab.data.values import NUMBERS, is_empty, plain_text
from peftlab.errors import DataError
from peftlab.tasks.inputs import empty_role, unusable_rows

_ROWS = 4096


class Texts:
    """Reads the text column with the tokenizer.

    Args:
        pair: column of a second text. The tokenizer writes both as one row; if it puts no token between them, peftlab puts
            a line break there.
        types: whether the model tells the two texts apart by ``token_type_ids``.
        roles: what the columns are for the task.
    """

    def __init__(
        self,
        tokenizer: Any,
        column: str,
        *,
        pair: str | None = None,
        types: bool = False,
        roles: Sequence[str] = ("text", "pair"),
    ) -> None:
        self._tokenizer, self.column, self.pair = tokenizer, column, pair
        self.roles, self.key = tuple(roles), f"data.columns.{roles[0]}"
        self._types = types and pair is not None
        self._between = "" if pair is None or _separates(tokenizer) else "\n"

    @property
    def columns(self) -> set[str]:
        """The columns that it reads."""
        return {self.column} | ({self.pair} if self.pair is not None else set())

    def pieces(self, rows: Rows) -> Iterator[tuple[int, Tokens]]:
        """``(index of the first row, tokens)`` for a few thousand rows at a time. Raises: DataError for an empty text."""
        for column, key in self._keys().items():
            rows.column(column, key=key)
        for first, rendered in pieces(rows, self._rendered):
            tokens = self._tokenize(rendered)
            for i in np.flatnonzero(tokens.lengths == 0).tolist():
                raise DataError(_empty(rows.where(first + i), self.roles[0]), key=self.key)
            yield first, tokens

    def unusable(self, rows: Rows) -> dict[int, str]:
        """Why rows cannot be read, by index. Raises: DataError if there is no such column."""
        if self.pair is not None:
            rows.column(self.pair, key=f"data.columns.{self.roles[1]}")
        return unusable_rows(rows, lambda part: list(self.pieces(part)), column=self.column, key=self.key)

    def row(self, rows: Rows, index: int) -> Tokens:
        """Tokens of one row."""
        return self._tokenize(self._rendered([rows.row(index)], [rows.where(index)]))

    def row_from_text(self, text: str) -> dict[str, Any]:
        """The row for a single text. Raises: DataError if a row has two."""
        if self.pair is not None:
            raise DataError(
                f"this model reads two texts, found one: {text[:40]!r}; give rows with the columns {self.column!r} and "
                f"{self.pair!r}, in a file (--file) or as dicts",
                key=f"data.columns.{self.roles[1]}",
            )
        return {self.column: text}

    def used(self, tokens: Tokens, kept: np.ndarray) -> np.ndarray:
        """[T] bool: the tokens that remain of each row of ``kept`` [N] tokens. A truncated row keeps its last token, the
        end separator of encoder models; of two texts the longer one is cut first, at its end."""
        use = _first_tokens(tokens, kept)
        for i in np.flatnonzero((kept > 0) & (kept < tokens.lengths)).tolist():
            row = tokens.row(i)
            if self.pair is not None:
                use[row] = _cut_pair(tokens.roles[row], int(kept[i]))
            else:
                _keep_last(use, tokens, i, int(kept[i]))
        return use

    def fitted(self, tokens: Tokens, kept: np.ndarray) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray]]]:
        """Index, ids and additional inputs of the kept rows, truncated as ``used`` says."""
        use = self.used(tokens, kept)
        for i in np.flatnonzero(kept).tolist():
            row = tokens.row(i)
            extra = {}
            if self._types:
                # As tokenizers of this kind write them: the second text and the separator after it are of type 1.
                second = np.maximum.accumulate(tokens.roles[row] == 2)
                extra = {"token_type_ids": second[use[row]].astype(np.int32)}
            yield i, tokens.ids[row][use[row]], extra

    def _keys(self) -> dict[str, str]:
        names = [self.column] if self.pair is None else [self.column, self.pair]
        return {name: f"data.columns.{role}" for name, role in zip(names, self.roles, strict=False)}

    def _rendered(self, rows: Sequence[Mapping[str, Any]], wheres: Sequence[str]) -> list[Rendered]:
        rendered = []
        for row, where in zip(rows, wheres, strict=True):
            text, parts = "", []
            notes: tuple[str, ...] = ()
            for role, (column, key) in zip(self.roles, self._keys().items(), strict=False):
                value = row.get(column)
                if is_empty(value):
                    raise DataError(_empty(where, role), key=key)
                if (written := plain_text(value)) is None:
                    raise DataError(f"{where}: expected text, found {value!r}", key=key)
                notes = notes if written is value else (NUMBERS,)
                parts.append(Part(len(text), len(text) + len(written), role))
                text += written
            rendered.append(Rendered(text, parts, notes=notes))
        return rendered

    def _tokenize(self, rendered: list[Rendered]) -> Tokens:
        if self.pair is None:
            return tokenize(self._tokenizer, rendered, chat=False, stop_ids=())
        firsts = [row.text[: row.parts[0].end] + self._between for row in rendered]
        seconds = [row.text[row.parts[1].start :] for row in rendered]
        batch = self._tokenizer(
            firsts,
            seconds,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            verbose=False,
        )
        encodings = batch.encodings or ()
        lengths = np.array([len(e.ids) for e in encodings], dtype=np.int64)
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), dtype=np.int32, count=int(lengths.sum()))
        owners = chain.from_iterable((0 if i is None else i + 1 for i in e.sequence_ids) for e in encodings)
        return Tokens.untrained(
            ids,
            lengths,
            np.fromiter(owners, dtype=np.int16, count=len(ids)),
            ("tokenizer", *self.roles),
            notes=tuple((i, note) for i, row in enumerate(rendered) for note in row.notes),
        )


def _first_tokens(tokens: Tokens, kept: np.ndarray) -> np.ndarray:
    """[T] bool: the first ``kept`` [N] tokens of each row."""
    position = np.arange(len(tokens.ids)) - np.repeat(tokens.bounds[:-1], tokens.lengths)
    use: np.ndarray = position < np.repeat(kept, tokens.lengths)
    return use


def _keep_last(use: np.ndarray, tokens: Tokens, row: int, kept: int) -> None:
    """Puts the last token of a row in the place of the last of its first ``kept`` ones."""
    at = tokens.row(row)
    use[at.start + kept - 1], use[at.stop - 1] = False, True


def _separates(tokenizer: Any) -> bool:
    """Whether the tokenizer writes a token between two texts."""
    (encoding,) = tokenizer(["a"], ["b"], verbose=False).encodings
    owners = encoding.sequence_ids
    return None in owners[owners.index(0) : owners.index(1)]


def _cut_pair(roles: np.ndarray, kept: int) -> np.ndarray:
    """[T] bool: the ``kept`` tokens of a row of two texts, as ``longest_first`` of transformers chooses them."""
    counts = [int((roles == role).sum()) for role in (1, 2)]
    room = max(0, kept - int((roles == 0).sum()))
    short, long = sorted(counts)
    long = min(long, max(short, room - short))
    if short + long > room:
        short, long = room // 2, room - room // 2
    limits = (long, short) if counts[0] > counts[1] else (short, long)
    use: np.ndarray = roles == 0
    for role, limit in zip((1, 2), limits, strict=True):
        use[np.flatnonzero(roles == role)[:limit]] = True
    return use


def _empty(where: str, role: str) -> str:
    return f"{where}: {empty_role(role)}; fill it in, or set data.empty=drop, which leaves such rows out"


class TextSets:
    """Reads several columns of texts, each text tokenized alone; a row holds one of each.

    Args: columns: role -> column.
    """

    def __init__(self, tokenizer: Any, columns: Mapping[str, str]) -> None:
        self.texts = [Texts(tokenizer, column, roles=[role]) for role, column in columns.items()]

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
    return Tokens.untrained(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.roles for part in parts]),
        max((part.role_names for part in parts), key=len),
        notes=tuple((row + at, note) for part, at in zip(parts, first, strict=False) for row, note in part.notes),
    )


def cut(tokens: Tokens, kept: np.ndarray) -> Tokens:
    """Each row of one text with as many tokens as ``kept`` says; one that is cut keeps its last token (see ``Texts.used``)."""
    use = _first_tokens(tokens, kept)
    for i in np.flatnonzero((kept > 0) & (kept < tokens.lengths)).tolist():
        _keep_last(use, tokens, i, int(kept[i]))
    lengths = np.minimum(kept, tokens.lengths)
    return Tokens.untrained(tokens.ids[use], lengths, tokens.roles[use], tokens.role_names, tokens.notes)


def side_by_side(parts: Sequence[Tokens]) -> Tokens:
    """The texts of each row one after the other, as one row; ``parts`` have one text of each row."""
    names = tuple(dict.fromkeys(name for part in parts for name in part.role_names))
    number = {name: i for i, name in enumerate(names)}
    rows = np.concatenate([np.repeat(np.arange(len(part)), part.lengths) for part in parts])
    order = np.argsort(rows, kind="stable")
    roles = [np.array([number[n] for n in part.role_names], dtype=np.int16)[part.roles] for part in parts]
    return Tokens.untrained(
        np.concatenate([part.ids for part in parts])[order],
        np.sum([part.lengths for part in parts], axis=0),
        np.concatenate(roles)[order],
        names,
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )
