"""Tokenized rows: which tokens are trained, who wrote them, and how each answer ends."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from peftlab.data.chat_template import Rendered
from peftlab.data.control_tokens import ControlTokens
from peftlab.data.rows import Rows


class HasText(Protocol):
    """A row that has become text."""

    @property
    def text(self) -> str: ...


Row = TypeVar("Row", bound=HasText)


@dataclass(frozen=True)
class Tokens:
    """N rows with T tokens in total, concatenated.

    Attributes:
        ids: [T] int32 token ids. bounds: [N + 1] int64; row i is ``bounds[i]:bounds[i + 1]``.
        trained: [T] bool, tokens whose prediction is trained.
        roles: [T] int16, the writer of each token, as an index into ``role_names``.
        answer_rows: [A] int64, the row of each trained part. answer_starts, answer_ends: [A] int64, its tokens.
        answer_ended: [A] bool, whether its last token can end an answer.
        answer_flaws: [A] ``Part.flaw`` of each.
        unwritten: ``(row, role)`` of each other message whose words are missing in the text.
        masked: ``(row, tokens)`` of each answer that the data says not to train.
        notes: ``(row, note)`` of what was noticed while the text was made, as in ``Rendered``.
    """

    ids: npt.NDArray[np.int32]
    bounds: npt.NDArray[np.int64]
    trained: npt.NDArray[np.bool_]
    roles: npt.NDArray[np.int16]
    role_names: tuple[str, ...]
    answer_rows: npt.NDArray[np.int64]
    answer_starts: npt.NDArray[np.int64]
    answer_ends: npt.NDArray[np.int64]
    answer_ended: npt.NDArray[np.bool_]
    answer_flaws: npt.NDArray[np.str_]
    unwritten: tuple[tuple[int, str], ...]
    masked: tuple[tuple[int, int], ...] = ()
    notes: tuple[tuple[int, str], ...] = ()

    @classmethod
    def untrained(
        cls,
        ids: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int64],
        roles: npt.NDArray[np.int16],
        role_names: tuple[str, ...],
        notes: tuple[tuple[int, str], ...] = (),
    ) -> Tokens:
        """Rows of [N] ``lengths`` without answers, for tasks whose answers are no tokens."""
        none = np.zeros(0, dtype=np.int64)
        return cls(
            ids,
            np.concatenate([[0], np.cumsum(lengths)]),
            np.zeros(len(ids), dtype=bool),
            roles,
            role_names,
            answer_rows=none,
            answer_starts=none,
            answer_ends=none,
            answer_ended=none.astype(bool),
            answer_flaws=none.astype("U9"),
            unwritten=(),
            notes=notes,
        )

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[N] tokens of each row."""
        return np.diff(self.bounds)

    def num_trained(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[N] trained tokens among the first ``lengths`` of each row."""
        before = np.concatenate([[0], np.cumsum(self.trained)])
        starts = self.bounds[:-1]
        inside: npt.NDArray[np.int64] = before[starts + np.minimum(lengths, self.lengths)] - before[starts]
        return inside

    def row(self, index: int, length: int | None = None) -> slice:
        """The slice of ``ids``, ``trained`` and ``roles`` with row ``index``, or with its first ``length`` tokens."""
        start, end = int(self.bounds[index]), int(self.bounds[index + 1])
        return slice(start, end if length is None else min(end, start + length))


def pieces(
    rows: Rows,
    render: Callable[[Sequence[dict[str, Any]], Sequence[str]], list[Row]],
    *,
    max_rows: int = 4096,
    max_characters: int = 4_000_000,
) -> Iterator[tuple[int, list[Row]]]:
    """Yields ``(index of the first row, rendered rows)`` for consecutive rows, at most ``max_rows`` or, beyond one row,
    ``max_characters`` at a time: the lists that tokenizing makes take far more memory than the tokens.
    """
    # The automatic garbage collector would scan all rows again and again. Here it scans new objects once per piece.
    automatic = gc.isenabled()
    gc.disable()
    try:
        for first in range(0, len(rows), max_rows):
            part = range(first, min(first + max_rows, len(rows)))
            rendered = render([rows.row(i) for i in part], [rows.where(i) for i in part])
            start = characters = 0
            for i, row in enumerate(rendered):
                if characters and characters + len(row.text) > max_characters:
                    yield first + start, rendered[start:i]
                    start, characters = i, 0
                characters += len(row.text)
            yield first + start, rendered[start:]
            gc.collect(1)
    finally:
        if automatic:
            gc.enable()


def tokenize(
    tokenizer: Any,
    rendered: Sequence[Rendered],
    *,
    chat: bool,
    stop_ids: Collection[int],
    special_ids: Collection[int] = (),
    control: ControlTokens | None = None,
) -> Tokens:
    """The tokens of ``rendered``. A row without an end token gets a trained end-of-text token.

    A token that straddles the start of a part belongs to it. White space after the stop token that ends a trained part is
    not trained: a template often writes a newline there, which the model never has to produce. The first token of a row
    is not trained either, because no token before it can predict it.

    Args:
        chat: a chat template wrote the text, with all the special tokens it needs.
        stop_ids: tokens that can end an answer. special_ids: all tokens that are not text.
        control: encodes rows with ``Rendered.plain``; default: made here.
    Raises: DataError, as ``ControlTokens.encode``.
    """
    encoded = (control or ControlTokens(tokenizer)).encode(
        [row.text for row in rendered], [row.plain for row in rendered], add_special_tokens=not chat
    )
    token_ids = [e.ids for e in encoded]
    lengths = np.fromiter(map(len, token_ids), dtype=np.int64, count=len(rendered))
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.fromiter(chain.from_iterable(token_ids), dtype=np.int32, count=int(bounds[-1]))
    # Characters are numbered across all rows, so that one search serves them all.
    bases = np.concatenate([[0], np.cumsum([len(row.text) + 1 for row in rendered])]).astype(np.int64)
    flat = chain.from_iterable(chain.from_iterable(e.offsets for e in encoded))
    offsets = np.fromiter(flat, dtype=np.int64, count=2 * len(ids)).reshape(-1, 2)
    starts, ends = (offsets + np.repeat(bases[:-1], lengths)[:, None]).T
    real = ends > starts
    if not real.all():  # tokens added by the tokenizer, and white space that it excludes from the offsets
        added = chain.from_iterable(e.special_tokens_mask for e in encoded)
        real |= ~np.fromiter(added, dtype=np.bool_, count=len(ids))
    ends = np.maximum.accumulate(ends)
    starts = np.maximum.accumulate(np.where(real, starts, ends))
    tokens = _owned(
        rendered, bases, ids, bounds, starts, ends, real, stop_ids, special_ids, "template" if chat else "tokenizer"
    )
    tokens = _closed(tokens, tokenizer.eos_token_id, stop_ids)
    tokens.trained[tokens.bounds[:-1][tokens.lengths > 0]] = False
    return tokens


def answered(
    prompts: Sequence[npt.NDArray[np.integer]],
    answers: Sequence[npt.NDArray[np.integer]],
    *,
    author: str,
    stop_ids: Collection[int],
) -> Tokens:
    """Prompts, each followed by the tokens that the model ``author`` generated; only the generated tokens are trained.

    No end token is added: a truncated answer must not teach the model to stop there. An answer with nothing but its end
    has no trained token.
    """
    written = [a if len(set(a.tolist()) - set(stop_ids)) else a[:0] for a in answers]
    counts = np.array([[len(p), len(a)] for p, a in zip(prompts, written, strict=True)], dtype=np.int64).reshape(-1, 2)
    bounds = np.concatenate([[0], np.cumsum(counts.sum(1))])
    ids = [part.astype(np.int32) for pair in zip(prompts, written, strict=True) for part in pair]
    generated = np.repeat(np.tile([False, True], len(prompts)), counts.ravel())
    return Tokens(
        ids=np.concatenate(ids) if ids else np.zeros(0, dtype=np.int32),
        bounds=bounds,
        trained=generated,
        roles=generated.astype(np.int16),
        role_names=("prompt", author),
        answer_rows=np.arange(len(prompts), dtype=np.int64),
        answer_starts=bounds[:-1] + counts[:, 0],
        answer_ends=bounds[1:],
        answer_ended=np.array([len(a) > 0 and int(a[-1]) in set(stop_ids) for a in written], dtype=np.bool_),
        answer_flaws=np.full(len(prompts), "", dtype="U9"),
        unwritten=(),
    )


def _owned(
    rendered: Sequence[Rendered],
    bases: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int32],
    bounds: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    real: npt.NDArray[np.bool_],
    stop_ids: Collection[int],
    special_ids: Collection[int],
    rest: str,
) -> Tokens:
    """The tokens with roles and mask, by the characters that each part covers; tokens outside all parts get role ``rest``."""
    parts = [(i, part) for i, row in enumerate(rendered) for part in row.parts]
    names = (rest, *dict.fromkeys(part.role for _, part in parts if part.role != rest))
    number = {name: i for i, name in enumerate(names)}
    rows = np.array([i for i, _ in parts], dtype=np.int64)
    role = np.array([number[part.role] for _, part in parts], dtype=np.int16)
    answers = np.array([part.trained for _, part in parts], dtype=bool)
    flaws = np.array([part.flaw for _, part in parts], dtype="U9")
    unwritten = tuple((i, part.role) for i, part in parts if part.flaw and not part.trained)
    notes = tuple((i, note) for i, row in enumerate(rendered) for note in row.notes)
    first = np.searchsorted(ends, bases[rows] + [part.start for _, part in parts], side="right")
    last = np.searchsorted(starts, bases[rows] + [part.end for _, part in parts], side="left")
    last = np.maximum(first, last)

    stops = np.flatnonzero(np.isin(ids, list(stop_ids)) & real)
    special = np.isin(ids, list(special_ids))
    ended = np.zeros(len(parts), dtype=bool)
    for k in np.flatnonzero(answers & (last > first)).tolist():
        at = np.searchsorted(stops, last[k]) - 1
        if at < 0 or stops[at] < first[k]:
            continue
        i, part = parts[k]
        text, after = rendered[i].text, stops[at] + 1
        if not text[ends[after - 1] - bases[i] : part.end].strip():
            last[k], ended[k] = after, True
        elif special[after : last[k]].any() and all(
            special[t] or not text[starts[t] - bases[i] : ends[t] - bases[i]].strip() for t in range(after, last[k])
        ):
            # Some templates write two end tokens; the model learns both.
            last[k], ended[k] = after + np.flatnonzero(special[after : last[k]])[-1] + 1, True

    counts = last - first
    covered = np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
    roles = np.zeros(len(ids), dtype=np.int16)
    roles[covered] = np.repeat(role, counts)
    trained = np.zeros(len(ids), dtype=bool)
    trained[covered] = np.repeat(answers, counts)
    trained &= real
    return Tokens(
        ids,
        bounds,
        trained,
        roles,
        names,
        answer_rows=rows[answers],
        answer_starts=first[answers],
        answer_ends=last[answers],
        answer_ended=ended[answers],
        answer_flaws=flaws[answers],
        unwritten=unwritten,
        masked=tuple((i, int(counts[k])) for k, (i, part) in enumerate(parts) if part.masked),
        notes=notes,
    )


def _closed(tokens: Tokens, eos: int | None, stop_ids: Collection[int]) -> Tokens:
    """Adds a trained end-of-text token to an answer if neither template nor tokenizer wrote an end."""
    if eos is None or not tokens.trained.any():
        return tokens
    at = np.flatnonzero(tokens.trained)
    row_of = np.searchsorted(tokens.bounds, at, side="right") - 1
    final = at[np.append(row_of[1:] != row_of[:-1], True)]  # the last trained token of each row that has one
    ended = tokens.answer_ends[tokens.answer_ended] - 1
    open_ = final[~np.isin(tokens.ids[final], list(stop_ids)) & ~np.isin(final, ended)]
    rows = np.searchsorted(tokens.bounds, open_, side="right") - 1
    # Not if a message follows: the end token would come after that message.
    written_by = np.flatnonzero(tokens.roles)
    closes = written_by[np.searchsorted(written_by, tokens.bounds[rows + 1]) - 1] == open_
    open_, rows = open_[closes], rows[closes]
    ends = tokens.bounds[rows + 1]
    written = tokens.ids[ends - 1] == eos  # by the tokenizer, outside the text
    trained, roles = tokens.trained.copy(), tokens.roles.copy()
    trained[ends[written] - 1] = True
    roles[ends[written] - 1] = roles[open_[written]]

    insert = ends[~written]
    shift = np.zeros(len(tokens), dtype=np.int64)
    shift[rows[~written]] = 1
    moved = np.concatenate([[0], np.cumsum(shift)])
    answer_ends = tokens.answer_ends + moved[tokens.answer_rows]
    answer_ended = tokens.answer_ended.copy()
    if len(tokens.answer_rows):
        # The last answer of a row is the one that was closed.
        is_last = np.append(tokens.answer_rows[1:] != tokens.answer_rows[:-1], True)
        closing = np.flatnonzero(is_last & np.isin(tokens.answer_rows, rows))
        answer_ended[closing] = True
        answer_ends[closing] = tokens.bounds[tokens.answer_rows[closing] + 1] + moved[tokens.answer_rows[closing] + 1]
    return replace(
        tokens,
        ids=np.insert(tokens.ids, insert, np.int32(eos)),
        bounds=tokens.bounds + moved,
        trained=np.insert(trained, insert, True),
        roles=np.insert(roles, insert, roles[open_[~written]]),
        answer_starts=tokens.answer_starts + moved[tokens.answer_rows],
        answer_ends=answer_ends,
        answer_ended=answer_ended,
    )
