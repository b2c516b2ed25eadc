"""Tokenizes questions with their contexts, and cuts long contexts into overlapping windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from peftlab.data import Question, Tokens
from peftlab.errors import DataError

Ints = npt.NDArray[np.int32]
# The roles of tokens, as indices.
ROLES = ("tokenizer", "question", "context")


@dataclass(frozen=True)
class Pair:
    """A tokenized row.

    Attributes:
        question: [Q] ids. context: [C] ids. starts, ends: [C] where each token of the context is in it, in characters.
        answer: first and last token of the answer; None without one. aligned: whether these tokens are the answer exactly.
    """

    question: Ints
    context: Ints
    starts: Ints
    ends: Ints
    answer: tuple[int, int] | None = None
    aligned: bool = True


@dataclass(frozen=True)
class Window:
    """A window of a row: the question and some tokens of its context.

    Attributes:
        ids: [T]. types: [T] type of each token: question or context. roles: [T] indices of ``ROLES``.
        can_answer: [T] whether a span may start or end there: at the tokens of the context, and at ``null``.
        null: the position that stands for no answer. first: the position of its first token of the context.
        context: the tokens of the context that it holds.
        label: positions of the start and the end of the answer; ``null`` twice if the window does not hold all of it.
    """

    ids: Ints
    types: npt.NDArray[np.int8]
    roles: npt.NDArray[np.int16]
    can_answer: npt.NDArray[np.int8]
    null: int
    first: int
    context: slice
    label: tuple[int, int]

    @property
    def holds_answer(self) -> bool:
        return self.label != (self.null, self.null)


class WindowTokenizer:
    """Pairs of question and context as the tokenizer writes them, in windows of at most ``max_length`` tokens.

    A tokenizer that writes nothing between the two gets a line break there, and one that writes no token after them gets its
    end of text. No answer is at the CLS token, wherever the tokenizer writes it; without one at the last token, which a
    decoder reads after everything else.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        (encoded,) = tokenizer(["a"], ["a"], verbose=False, return_token_type_ids=True).encodings
        ids, types = np.array(encoded.ids, dtype=np.int32), np.array(encoded.type_ids, dtype=np.int8)
        of = [-1 if part is None else part for part in encoded.sequence_ids]
        cuts = [of.index(0), len(of) - of[::-1].index(0), of.index(1), len(of) - of[::-1].index(1)]
        before, _, between, _, after = ((ids[a:b], types[a:b]) for a, b in pairwise([0, *cuts, len(of)]))
        self._question_type, self._context_type = int(types[cuts[0]]), int(types[cuts[2]])
        self._before = before
        self._between = between if len(between[0]) else self._line_break()
        self._after = after
        cls_id = tokenizer.cls_token_id
        self._null_before = _index(before[0], cls_id)
        self._null_after = _index(after[0], cls_id)
        if self._null_before is None and self._null_after is None:
            if not len(after[0]):
                end = tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
                self._after = (np.array([end], dtype=np.int32), np.array([self._context_type], dtype=np.int8))
            self._null_after = len(self._after[0]) - 1

    def _line_break(self) -> tuple[Ints, npt.NDArray[np.int8]]:
        ids = np.array(self._tokenizer("\n", add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)
        return ids, np.full(len(ids), self._question_type, dtype=np.int8)

    @property
    def num_types(self) -> int:
        """The number of types of tokens that the tokenizer writes."""
        parts = (self._before, self._between, self._after)
        return 1 + max(self._question_type, self._context_type, *(int(t.max(initial=0)) for _, t in parts))

    @property
    def num_special(self) -> int:
        """Tokens of a window that are neither of the question nor of the context."""
        return len(self._before[0]) + len(self._between[0]) + len(self._after[0])

    def pairs(self, questions: Sequence[Question]) -> list[Pair]:
        """The tokens of rows. A context that several rows share is tokenized once."""
        asked = self._tokenizer([q.question for q in questions], add_special_tokens=False, verbose=False)["input_ids"]
        texts = list(dict.fromkeys(q.context for q in questions))
        contexts = {}
        for text, e in zip(
            texts, self._tokenizer(texts, add_special_tokens=False, verbose=False).encodings, strict=True
        ):
            contexts[text] = _placed(e.ids, e.offsets)
        return [
            _pair(np.array(ids, dtype=np.int32), *contexts[q.context], q)
            for ids, q in zip(asked, questions, strict=True)
        ]

    def windows(self, pair: Pair, *, max_length: int, stride: int | None, where: str) -> Iterator[Window]:
        """The windows of a row. Raises: DataError if the question leaves no room.

        Args: stride: tokens of the context that neighbouring windows share; None: a third of ``max_length``, and at most half
            of those in a window.
        """
        start, count = 0, len(pair.context)
        room = max_length - self.num_special - len(pair.question)
        overlap = min(max_length // 3, room // 2) if stride is None else stride
        if room < min(count, overlap + 1):
            repeats = (
                f", and {overlap:,} of them repeat those of the window before (data.stride)" if overlap > 0 else ""
            )
            raise DataError(
                f"{where}: the question has {len(pair.question):,} tokens, which leaves {max(room, 0):,} of a window of "
                f"{max_length:,} for the context{repeats}; shorten it, raise data.max_length, or lower data.stride",
                key="data.max_length",
            )
        while True:
            end = min(count, start + room)
            yield self._window(pair, slice(start, end))
            if end == count:
                return
            start += room - overlap

    def _window(self, pair: Pair, context: slice) -> Window:
        body = pair.context[context]
        parts: list[tuple[Ints, Any, int]] = [
            (*self._before, 0),
            (pair.question, self._question_type, 1),
            (*self._between, 0),
            (body, self._context_type, 2),
            (*self._after, 0),
        ]
        ids = np.concatenate([ids for ids, _, _ in parts]).astype(np.int32)
        types = np.concatenate([np.broadcast_to(kind, len(ids)) for ids, kind, _ in parts]).astype(np.int8)
        roles = np.repeat(np.array([role for *_, role in parts], dtype=np.int16), [len(ids) for ids, _, _ in parts])
        null = self._null_before
        if null is None:
            assert self._null_after is not None
            null = len(ids) - len(self._after[0]) + self._null_after
        first = len(self._before[0]) + len(pair.question) + len(self._between[0])
        can_answer = (roles == 2).astype(np.int8)
        can_answer[null] = 1
        label = (null, null)
        if pair.answer is not None and context.start <= pair.answer[0] and pair.answer[1] < context.stop:
            label = (first + pair.answer[0] - context.start, first + pair.answer[1] - context.start)
        return Window(ids, types, roles, can_answer, null, first, context, label)

    def probe(self, ids: Ints) -> Window:
        """A window with these tokens as question and context, and of their number."""
        own = np.asarray(ids, dtype=np.int32)
        count = max(2, len(own) - self.num_special)
        body = np.resize(own, count)
        places = np.arange(count - 1, dtype=np.int32)
        window = self._window(Pair(body[:1], body[1:], places, places + 1), slice(0, count - 1))
        if len(window.ids) == len(own):
            return window
        everywhere = np.ones(len(own), dtype=np.int8)  # too short for a pair
        return Window(own, 0 * everywhere, everywhere.astype(np.int16), everywhere, 0, 0, slice(0, len(own)), (0, 0))


def whole_rows(pairs: Sequence[Pair], windows: WindowTokenizer) -> Tokens:
    """The rows with their whole contexts, for a ledger: no token is trained."""
    whole = [windows._window(pair, slice(0, len(pair.context))) for pair in pairs]
    bounds = np.concatenate([[0], np.cumsum([len(w.ids) for w in whole])]).astype(np.int64)
    nothing = np.zeros(0, dtype=np.int64)
    return Tokens(
        ids=np.concatenate([w.ids for w in whole]) if whole else np.zeros(0, dtype=np.int32),
        bounds=bounds,
        trained=np.zeros(int(bounds[-1]), dtype=np.bool_),
        roles=np.concatenate([w.roles for w in whole]) if whole else np.zeros(0, dtype=np.int16),
        role_names=ROLES,
        answer_rows=nothing,
        answer_starts=nothing,
        answer_ends=nothing,
        answer_ended=nothing.astype(np.bool_),
        answer_flaws=nothing.astype("U9"),
        unwritten=(),
        notes=tuple((i, "unaligned") for i, pair in enumerate(pairs) if not pair.aligned),
    )


def _placed(ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> tuple[Ints, Ints, Ints]:
    """Ids, starts and ends of the tokens of a context. A token without characters, such as a space that a tokenizer leaves
    out of the offsets, gets the end of the one before it."""
    starts, ends = np.array(offsets, dtype=np.int32).reshape(-1, 2).T
    real = ends > starts
    ends = np.maximum.accumulate(np.where(real, ends, 0)) if len(ends) else ends
    return np.array(ids, dtype=np.int32), np.where(real, starts, ends), ends


def _pair(question: Ints, context: Ints, starts: Ints, ends: Ints, row: Question) -> Pair:
    if not row.answers or row.start is None:
        return Pair(question, context, starts, ends)
    start, text = row.start, row.answers[0]
    within = np.flatnonzero((ends > start) & (starts < start + len(text)) & (ends > starts))
    if not len(within):  # the tokenizer drops all its characters
        return Pair(question, context, starts, ends, aligned=False)
    first, last = int(within[0]), int(within[-1])
    found = row.context[starts[first] : ends[last]].strip()
    return Pair(question, context, starts, ends, (first, last), aligned=found == text)


def _index(ids: Ints, wanted: int | None) -> int | None:
    found = [] if wanted is None else np.flatnonzero(ids == wanted).tolist()
    return found[0] if found else None
