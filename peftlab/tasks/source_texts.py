"""Rows with a source and a target text as tokens of both sides."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from peftlab.data import Rows, Tokens
from peftlab.data.values import NUMBERS, is_empty, plain_text
from peftlab.errors import DataError, RecipeError, listed
from peftlab.tasks.base import TaskParts
from peftlab.tasks.inputs import EMPTY_TEXT

EMPTY_TARGET = "the target is empty"
_ROWS = 4096
Ids = npt.NDArray[np.int32]
# Key of a limit, the limit, and [N] tokens of that side of each row before it.
Limit = tuple[str, int, npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Sides:
    """N rows. Attributes: sources, targets: their tokens. target_texts: as in the data. ends: tokens that end a target.
    source_end: number of tokens that the tokenizer writes after each source. author: who wrote the targets. notes: see
    ``Tokens``."""

    sources: list[Ids]
    targets: list[Ids]
    target_texts: list[str]
    ends: frozenset[int]
    suffix: Ids
    source_end: int
    author: str = "target"
    notes: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return len(self.sources)

    def limits(self, max_length: int, max_target_length: int | None) -> list[Limit]:
        """The limit of each side that has one."""
        limits = [("data.max_length", max_length, _lengths(self.sources))]
        if max_target_length is not None:
            limits.append(("data.max_target_length", max_target_length, _lengths(self.targets)))
        return limits

    def tokens(self, limits: Sequence[Limit] | None) -> Tokens:
        """Each source followed by its target. Args: limits: cut both to these; None: whole.

        A source that is cut keeps its end. A target that is cut loses it, so that it does not teach to stop there; a
        language token after the end stays.
        """
        most = {key: limit for key, limit, _ in limits or ()}
        sources = [cut_source(ids, most.get("data.max_length", 2**31), self.source_end) for ids in self.sources]
        targets = [self._cut_target(ids, most.get("data.max_target_length", 2**31)) for ids in self.targets]
        counts = np.array([[len(s), len(t)] for s, t in zip(sources, targets, strict=True)], dtype=np.int64).reshape(
            -1, 2
        )
        bounds = np.concatenate([[0], np.cumsum(counts.sum(1))])
        in_target = np.repeat(np.tile([False, True], len(sources)), counts.ravel())
        ended = [any(int(i) in self.ends for i in t[-1 - len(self.suffix) :]) for t in targets]
        return Tokens(
            ids=np.concatenate([part for pair in zip(sources, targets, strict=True) for part in pair] or [_NONE]),
            bounds=bounds,
            trained=in_target,
            roles=in_target.astype(np.int16),
            role_names=("source", self.author),
            answer_rows=np.arange(len(sources), dtype=np.int64),
            answer_starts=bounds[:-1] + counts[:, 0],
            answer_ends=bounds[1:] - np.where(counts[:, 1] > len(self.suffix), len(self.suffix), 0),
            answer_ended=np.array(ended, dtype=np.bool_),
            answer_flaws=np.full(len(sources), "", dtype="U9"),
            unwritten=(),
            notes=self.notes,
        )

    def _cut_target(self, ids: Ids, limit: int) -> Ids:
        if len(ids) <= limit:
            return ids
        return np.concatenate([ids[: limit - len(self.suffix)], self.suffix])


class SourceTexts:
    """Reads the columns source and target with the tokenizer.

    Args:
        prefix: text before each source. source_language, target_language: codes of a tokenizer with languages.
        max_target_length: longest target in tokens.
    Raises: RecipeError for an unknown language.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        source: str = "source",
        target: str = "target",
        prefix: str = "",
        source_language: str | None = None,
        target_language: str | None = None,
        max_target_length: int | None = None,
    ) -> None:
        self.tokenizer, self.source, self.target, self._prefix = tokenizer, source, target, prefix
        self.max_target_length = max_target_length
        self._set_languages(source_language, target_language)
        self._target_language = target_language
        self.end_id: int | None = (
            tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        )
        self._appended: np.int32 | None = None
        self._source_end = _num_special_at_end(tokenizer, self._encode(["a"], target=False)[0])
        written = self._encode(["a"], target=True)[0].tolist()
        at = max((i for i, token in enumerate(written) if token == self.end_id), default=None)
        # Tokens after the end of text, such as mBART's language.
        self._suffix = _array([] if at is None else written[at + 1 :])
        self._appended = np.int32(self.end_id) if at is None and self.end_id is not None else None

    @classmethod
    def make(cls, parts: TaskParts) -> SourceTexts:
        return cls(
            parts.reader,
            source=parts.column("source"),
            target=parts.column("target"),
            prefix=parts.settings["data.prefix"],
            source_language=parts.settings["data.source_language"],
            target_language=parts.settings["data.target_language"],
            max_target_length=parts.max_target_length,
        )

    def _set_languages(self, source: str | None, target: str | None) -> None:
        tokenizer = self.tokenizer
        for key, name, code in (("source", "src_lang", source), ("target", "tgt_lang", target)):
            if code is None:
                continue
            if not hasattr(tokenizer, name):
                raise RecipeError(
                    f"the tokenizer {type(tokenizer).__name__} has no languages; remove it, or write the languages into "
                    "data.prefix, as T5 expects them",
                    key=f"data.{key}_language",
                )
            if code not in (codes := _language_codes(tokenizer)):
                near = difflib.get_close_matches(code, codes, n=1, cutoff=0.3)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise RecipeError(
                    f"unknown language {code!r}{hint} The tokenizer has {listed(codes)}", key=f"data.{key}_language"
                )
            setattr(tokenizer, name, code)
        if target is None and hasattr(tokenizer, "tgt_lang") and (codes := _language_codes(tokenizer)):
            raise RecipeError(
                f"missing: the tokenizer {type(tokenizer).__name__} writes the language of each target; it has "
                f"{listed(codes)}",
                key="data.target_language",
            )

    def _language_id(self, code: str) -> int:
        """The token of a language."""
        lookup = getattr(self.tokenizer, "get_lang_id", None)  # M2M100 writes __de__ for de
        return int(lookup(code) if lookup is not None else self.tokenizer.convert_tokens_to_ids(code))

    def first_of_target(self) -> dict[str, int]:
        """Arguments of ``generate`` for the token of the target language: the first that is written, or where the tokenizer
        puts it after the end of text, the one that starts the decoder."""
        if self._target_language is None:
            return {}
        token = self._language_id(self._target_language)
        return {"decoder_start_token_id" if token in self._suffix else "forced_bos_token_id": token}

    def pieces(self, rows: Rows) -> Iterator[tuple[int, Sides]]:
        """``(index of the first row, sides)`` for a few thousand rows at a time. Raises: DataError for an empty text."""
        for name, key in ((self.source, "source"), (self.target, "target")):
            rows.column(name, key=f"data.columns.{key}")
        for first in range(0, len(rows), _ROWS):
            yield first, self.sides(rows.select(range(first, min(first + _ROWS, len(rows)))))

    def sides(self, rows: Rows) -> Sides:
        texts, notes = [], []
        for name, key, empty in ((self.source, "source", EMPTY_TEXT), (self.target, "target", EMPTY_TARGET)):
            read = [
                _text(v, rows.where(i), empty, key) for i, v in enumerate(rows.column(name, key=f"data.columns.{key}"))
            ]
            texts.append([text for text, _ in read])
            notes += [(i, NUMBERS) for i, (_, is_number) in enumerate(read) if is_number]
        sources = self._encode([self._prefix + text for text in texts[0]], target=False)
        return self._sides(sources, self._encode(texts[1], target=True), texts[1], notes=tuple(notes))

    def with_answers(self, rows: Rows, answers: Sequence[np.ndarray], ends: Collection[int]) -> Sides:
        """The sources of ``rows`` with the tokens that a model wrote; an answer with nothing but its end is empty."""
        written = [a if set(a.tolist()) - set(ends) else a[:0] for a in answers]
        targets = [np.concatenate([a, self._suffix]).astype(np.int32) if len(a) else _NONE for a in written]
        return self._sides(self.source_ids(rows), targets, [""] * len(targets), author="model")

    def source_text(self, row: dict[str, Any], where: str) -> str:
        return self._prefix + _text(row.get(self.source), where, EMPTY_TEXT, "source")[0]

    def source_ids(self, rows: Rows) -> list[Ids]:
        """The tokens of each source. Raises: DataError for an empty text."""
        values = rows.column(self.source, key="data.columns.source")
        texts = [self._prefix + _text(v, rows.where(i), EMPTY_TEXT, "source")[0] for i, v in enumerate(values)]
        return self._encode(texts, target=False)

    def cut(self, ids: Ids, limit: int) -> Ids:
        """A source of at most ``limit`` tokens, with its end."""
        return cut_source(ids, limit, self._source_end)

    def _sides(self, sources: list[Ids], targets: list[Ids], texts: list[str], **more: Any) -> Sides:
        ends = frozenset(() if self.end_id is None else (self.end_id,))
        return Sides(sources, targets, texts, ends, self._suffix, self._source_end, **more)

    def _encode(self, texts: list[str], *, target: bool) -> list[Ids]:
        if not texts:
            return []
        side = {"text_target": texts} if target else {"text": texts}
        rows = [_array(ids) for ids in self.tokenizer(**side, verbose=False)["input_ids"]]
        if target and self._appended is not None:  # a decoder has to learn where to stop
            rows = [np.append(ids, self._appended) for ids in rows]
        return rows


def cut_source(ids: Ids, limit: int, end: int) -> Ids:
    """``ids`` without tokens before their last ``end`` ones, so that ``limit`` remain."""
    return ids if len(ids) <= limit else np.concatenate([ids[: limit - end], ids[len(ids) - end :]])


_NONE = np.zeros(0, dtype=np.int32)


def _array(ids: Sequence[int]) -> Ids:
    return np.asarray(ids, dtype=np.int32)


def _lengths(rows: Sequence[Ids]) -> npt.NDArray[np.int64]:
    return np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))


def _num_special_at_end(tokenizer: Any, ids: Ids) -> int:
    special = [int(i) in set(tokenizer.all_special_ids) for i in ids]
    return next((n for n, is_special in enumerate(reversed(special)) if not is_special), len(special))


def _language_codes(tokenizer: Any) -> list[str]:
    for name in ("lang_code_to_id", "lang_code_to_token"):
        if codes := getattr(tokenizer, name, None):
            return sorted(codes)
    return sorted(str(t) for t in tokenizer.all_special_tokens if not str(t).startswith("<"))


def _text(value: Any, where: str, empty: str, role: str) -> tuple[str, bool]:
    """The text of a value, and whether it is a number."""
    key = f"data.columns.{role}"
    if is_empty(value):
        raise DataError(f"{where}: {empty}; fill it in, or set data.empty=drop, which leaves such rows out", key=key)
    if (written := plain_text(value)) is None:
        raise DataError(f"{where}: expected text, found {value!r}", key=key)
    return written, written is not value
