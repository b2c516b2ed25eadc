"""The loss ledger: which tokens of a data set are trained, who wrote them, how answers end, which rows are left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from peftlab.data.chat import Formatter
from peftlab.data.rows import Rows
from peftlab.data.tokens import Tokens

Indices = npt.NDArray[np.int64]

_MAX_BINS = 8
# What a row without trained tokens lacks, by style.
_EMPTY = {"text": "the text is empty", "words": "there is no word in it"}


class Ledger:
    """The ledger of one data set, filled while its rows are encoded.

    It stores a few numbers per row and none per token, so a million rows take tens of megabytes.

    Args:
        rows: the data set.
        tokenizer: None for rows that are not tokenized.
        max_length: the maximum length of a row in tokens. too_long: ``error``, ``truncate``, ``split`` or ``drop``.
        keep_last: a truncated row keeps its last token.
        formatter: how rows became text, for a language model. class_names: for rows with a label.
        style: labels, images, texts, words or pairs (a source and a target), for rows without a formatter. words: their tokens
            are trained.
        span_labels: the labels that ``add_spans`` counts.
        trains_tokens: whether tokens are trained; default: for words, pairs and rows with a formatter.
        stop_ids: tokens that can end an answer.

    Attributes: numbers: [N] the number that each row of the data set is to give, for rows with one.
    """

    numbers: npt.NDArray[np.float64] | None = None

    def __init__(
        self,
        rows: Rows,
        tokenizer: Any,
        *,
        max_length: int,
        too_long: str,
        keep_last: bool = False,
        formatter: Formatter | None = None,
        class_names: Sequence[str] | None = None,
        stop_ids: Collection[int] = (),
        style: str = "labels",
        span_labels: Sequence[str] = (),
        trains_tokens: bool = False,
    ) -> None:
        self.rows, self.max_length, self.too_long = rows, max_length, too_long
        self.style = formatter.style if formatter else style
        self._trains_tokens = trains_tokens or formatter is not None or style in ("words", "pairs")
        self.class_names = list(class_names) if class_names else None
        self.tokenizer, self.formatter, self._keep_last = tokenizer, formatter, keep_last
        self.stop_ids = set(stop_ids)
        self._lengths: list[Indices] = []
        self._kept: list[Indices] = []
        self._example_lengths: list[Indices] = []
        self._example_trained: list[Indices] = []
        self._max_ids: list[Indices] = []
        self._hashes: list[Indices] = []
        self._prompt_hashes: list[Indices] = []
        self._labels: list[Indices] = []
        num_ids = 0 if tokenizer is None else len(tokenizer)
        self._seen = np.zeros(num_ids, dtype=np.int64)
        self._trained = np.zeros(num_ids, dtype=np.int64)
        self._role_seen: Counter[str] = Counter()
        self._role_trained: Counter[str] = Counter()
        self._terminators: Counter[int] = Counter()
        self.num_answers = self.num_ended = self.num_masked_eos = 0
        self.num_masked = self.num_masked_tokens = 0
        self._spans = {name: {"rows": 0, "spans": 0, "cut": 0} for name in span_labels}
        self._marks: dict[str, list[Indices]] = {}
        self._left_out: dict[str, list[Indices]] = {}
        self._writers: dict[str, None] = {}
        self._sides: dict[str, tuple[int, list[Indices]]] = {}

    def add(
        self,
        first: int,
        tokens: Tokens,
        kept: Indices,
        labels: Indices | None = None,
        *,
        long: npt.NDArray[np.bool_] | None = None,
        limits: Sequence[tuple[str, int, Indices]] | None = None,
        use: npt.NDArray[np.bool_] | None = None,
        examples: tuple[Indices, Indices] | None = None,
    ) -> None:
        """Adds the rows ``first``, ``first + 1``, ...

        Args:
            kept: [N] tokens of each row that are used; 0: left out.
            labels: [N] class indices, or [N, C] 0 and 1 for rows with any number of labels.
            use: [T] bool, the tokens that are used; default: the first ones of each row, see ``keep_last``.
            long: [N] whether a row is longer than the limit; default: its tokens are.
            limits: of rows with several texts, whose ``tokens`` are cut already: the key of each limit, the limit, and [N] tokens
                of that text before it.
            examples: tokens and trained tokens of each example that the rows become; default: one example per kept row.
        """
        lengths, in_row = tokens.lengths, first + np.arange(len(tokens), dtype=np.int64)
        self._lengths.append(lengths.astype(np.int32))
        self._kept.append(kept.astype(np.int32))
        if examples is None:
            examples = kept[kept > 0], tokens.num_trained(kept)[kept > 0]
        self._add_examples(*examples)
        highest = np.full(len(tokens), -1, dtype=np.int64)
        if len(tokens.ids):
            highest[lengths > 0] = np.maximum.reduceat(tokens.ids, tokens.bounds[:-1][lengths > 0])
        self._max_ids.append(highest.astype(np.int32))
        raw, at = tokens.ids.tobytes(), (4 * tokens.bounds).tolist()
        self._hashes.append(np.array([hash(raw[a:b]) for a, b in pairwise(at)], dtype=np.int64))
        if labels is not None:
            self._labels.append(labels.astype(np.int32))
            # The prompt if the answer is a label, otherwise the whole text.
            ends = [
                4 * (bounds.start + _first(tokens.trained[bounds])) for bounds in map(tokens.row, range(len(tokens)))
            ]
            self._prompt_hashes.append(
                np.array([hash(raw[a:b]) for a, b in zip(at, ends, strict=False)], dtype=np.int64)
            )
        for key, limit, whole in limits or ():
            self._sides.setdefault(key, (limit, []))[1].append(whole.astype(np.int32))
        whole = lengths if long is None else np.where(long, self.max_length + 1, 0)
        self._leave_out(tokens, kept, limits or [("data.max_length", self.max_length, whole)], in_row)
        self._count(tokens, kept, lengths, use)
        self._read_answers(tokens, kept, first)
        bos = self.tokenizer.bos_token_id
        twice = np.flatnonzero(lengths > 1)
        if bos is not None and len(twice):
            starts = tokens.bounds[:-1][twice]
            doubled = (tokens.ids[starts] == bos) & (tokens.ids[starts + 1] == bos)
            self._mark("doubled_bos", in_row[twice[doubled]])
        for row, role in tokens.unwritten:
            if kept[row]:
                self._mark(f"unwritten {role}", in_row[row : row + 1])
        for row, note in tokens.notes:
            if kept[row]:
                self._mark(f"note {note}", in_row[row : row + 1])
        for row, count in tokens.masked:
            if kept[row]:
                self._mark("masked", in_row[row : row + 1])
                self.num_masked += 1
                self.num_masked_tokens += count
        self._writers.update(dict.fromkeys(tokens.role_names[1:]))

    def add_whole(self, hashes: Indices, lengths: Indices, labels: Indices | None = None) -> None:
        """Adds the next rows, which are not tokens.

        Args: hashes: [N] hashes of their content. lengths: [N] positions in the model. labels: [N] class indices.
        """
        self._lengths.append(lengths.astype(np.int32))
        self._kept.append(lengths.astype(np.int32))
        self._add_examples(lengths[lengths > 0], np.zeros(int((lengths > 0).sum()), dtype=np.int64))
        self._hashes.append(hashes)
        if labels is not None:
            self._labels.append(labels.astype(np.int32))
            self._prompt_hashes.append(hashes)

    def add_spans(self, labels: Sequence[str], cut: Sequence[str] = ()) -> None:
        """Adds the labels of a kept row's spans (entities, or words with a tag). Args: cut: of those that truncation shortens
        or removes."""
        for name in set(labels):
            self._spans[name]["rows"] += 1
        for what, names in (("spans", labels), ("cut", cut)):
            for name in names:
                self._spans[name][what] += 1

    def _add_examples(self, lengths: Indices, trained: Indices) -> None:
        self._example_lengths.append(lengths.astype(np.int32))
        self._example_trained.append(trained.astype(np.int32))

    def _leave_out(
        self, tokens: Tokens, kept: Indices, limits: Sequence[tuple[str, int, Indices]], in_row: Indices
    ) -> None:
        lengths = tokens.lengths
        over: dict[str, npt.NDArray[np.bool_]] = {}
        for key, limit, whole in limits:
            beyond, name = whole > limit, f"longer than {key} ({limit:,} tokens)"
            over |= {
                f"truncated: {name}": beyond & (kept > 0) & (self.too_long != "split"),
                f"split into blocks: {name}": beyond & (kept > 0) & (self.too_long == "split"),
                f"dropped: {name}": beyond & (self.too_long == "drop"),
                f"refused: {name}": beyond & (self.too_long == "error"),
            }
        long = np.any([whole > limit for _, limit, whole in limits], axis=0)
        trained = tokens.num_trained(lengths) > 0
        answers = np.bincount(tokens.answer_rows, minlength=len(tokens)) > 0
        untrained = np.bincount(np.array([row for row, _ in tokens.masked], dtype=np.int64), minlength=len(tokens)) > 0
        masked = (kept == 0) & ~(long & (self.too_long not in ("truncate", "split")))
        for reason, chosen in {
            **over,
            "dropped: no assistant turn in it": masked & ~answers & ~untrained & (self.style == "chat"),
            "dropped: the data masks all assistant turns in it": masked & ~answers & untrained,
            f"dropped: {_EMPTY.get(self.style, 'the answer is empty')}": masked
            & ~trained
            & (answers | (self.style != "chat")),
            f"dropped: truncation leaves no {'whole choice' if self.class_names else 'trained token'}": masked
            & trained,
        }.items():
            if chosen.any():
                self._left_out.setdefault(reason, []).append(in_row[chosen])

    def _count(
        self, tokens: Tokens, kept: Indices, lengths: Indices, chosen: npt.NDArray[np.bool_] | None = None
    ) -> None:
        position = np.arange(len(tokens.ids)) - np.repeat(tokens.bounds[:-1], lengths)
        use = position < np.repeat(kept, lengths) if chosen is None else chosen
        if self._keep_last and chosen is None:
            cut = np.flatnonzero((kept > 0) & (kept < lengths))
            use[tokens.bounds[:-1][cut] + kept[cut] - 1] = False
            use[tokens.bounds[1:][cut] - 1] = True
        trained = use & tokens.trained
        size = max(len(self._seen), int(tokens.ids.max(initial=0)) + 1)
        self._seen = np.bincount(tokens.ids[use], minlength=size) + np.pad(self._seen, (0, size - len(self._seen)))
        self._trained = np.bincount(tokens.ids[trained], minlength=size) + np.pad(
            self._trained, (0, size - len(self._trained))
        )
        seen = np.bincount(tokens.roles[use], minlength=len(tokens.role_names)).tolist()
        learnt = np.bincount(tokens.roles[trained], minlength=len(tokens.role_names)).tolist()
        for name, count, count_trained in zip(tokens.role_names, seen, learnt, strict=True):
            self._role_seen[name] += count
            self._role_trained[name] += count_trained

    def _read_answers(self, tokens: Tokens, kept: Indices, first: int) -> None:
        """Counts how the answers of the kept rows end in the untruncated text; truncated answers are counted apart."""
        used = kept[tokens.answer_rows] > 0
        rows, starts, ends = tokens.answer_rows[used], tokens.answer_starts[used], tokens.answer_ends[used]
        if not len(rows):
            return
        last = np.maximum(ends - 1, 0)
        ended = tokens.answer_ended[used] & tokens.trained[last] & (ends > starts)
        cut = ends > tokens.bounds[rows] + kept[rows]
        trained = _cumulated(tokens.trained)
        flaws = tokens.answer_flaws[used]
        stops = _cumulated(tokens.trained & np.isin(tokens.ids, list(self.stop_ids)))
        self.num_answers += len(rows)
        self.num_ended += int((ended & ~cut).sum())
        self._terminators.update(tokens.ids[last[ended & ~cut]].tolist())
        self._mark("unended", first + rows[~ended])
        self._mark("cut", first + rows[cut])
        self._mark("words", first + rows[(flaws == "words") | ((ends > starts) & (trained[ends] == trained[starts]))])
        for flaw in ("calls", "reasoning", "header"):
            self._mark(flaw, first + rows[flaws == flaw])
        self._mark("empty", first + rows[ended & (ends - starts == 1)])
        self._mark("inner_end", first + rows[ended & (stops[last] > stops[starts])])
        masked = (tokens.ids == self.tokenizer.eos_token_id) & ~tokens.trained
        masked[tokens.bounds[:-1][tokens.lengths > 0]] = False  # nothing predicts the first token of a row
        eos = _cumulated(masked)
        self.num_masked_eos += int((eos[ends] - eos[starts]).sum())

    def _mark(self, what: str, rows: Indices) -> None:
        if len(rows):
            self._marks.setdefault(what, []).append(rows)

    def marked(self, what: str) -> Indices:
        """The row of each answer or message with the mark ``what``: ``unended``, ``cut`` (by truncation), ``words``, ``calls``
        and ``reasoning`` (missing in the trained text), ``header`` (trained too), ``empty``, ``inner_end`` (an end token before its end),
        ``doubled_bos``, ``masked`` (by the data), ``unwritten ROLE`` (a message whose words are missing in the text), and
        ``note NOTE`` of ``Rendered.notes``."""
        return _joined(self._marks.get(what, []))

    @property
    def marks(self) -> list[str]:
        return list(self._marks)

    @property
    def writers(self) -> list[str]:
        """The roles that wrote a part of any row, kept or not."""
        return list(self._writers)

    @property
    def per_row(self) -> bool:
        """Whether a row has one answer, such as a label, instead of trained tokens."""
        return not self._trains_tokens

    def limit_of(self, reason: str) -> tuple[str, int, Indices]:
        """The key of the limit in a reason of ``left_out``, the limit, and [number of rows] lengths before truncation."""
        key = next((key for key in self._sides if f"{key} (" in reason), None)
        if key is None:
            return "data.max_length", self.max_length, self.row_lengths
        limit, lengths = self._sides[key]
        return key, limit, _joined(lengths)

    @property
    def left_out(self) -> dict[str, Indices]:
        """Rows that were changed, dropped or refused, by reason."""
        return {reason: _joined(parts) for reason, parts in self._left_out.items()}

    @property
    def row_lengths(self) -> Indices:
        """[number of rows] tokens of every row before truncation."""
        return _joined(self._lengths)

    @property
    def lengths(self) -> Indices:
        """[N] tokens of each example, in order, as ``Encoded.lengths``."""
        return _joined(self._example_lengths)

    @property
    def trained(self) -> Indices:
        """[N] trained tokens of each example, in order."""
        return _joined(self._example_trained)

    @property
    def kept_rows(self) -> Indices:
        """The indices of the kept rows."""
        return np.flatnonzero(_joined(self._kept))

    @property
    def num_tokens(self) -> int:
        return int(self._seen.sum())

    @property
    def num_trained(self) -> int:
        return int(self._trained.sum())

    def rows_with_ids(self, first: int) -> Indices:
        """Kept rows with a token id of ``first`` or more, before truncation."""
        rows = self.kept_rows
        above: Indices = rows[_joined(self._max_ids)[rows] >= first] if self._max_ids else rows[:0]
        return above

    def ids_from(self, first: int) -> list[int]:
        """The token ids of ``first`` or more that the kept rows use."""
        return (first + np.flatnonzero(self._seen[first:])).tolist()

    def repeated_rows(self) -> Indices:
        """Kept rows with the same tokens as an earlier kept row."""
        rows = self.kept_rows
        _, first = np.unique(_joined(self._hashes)[rows], return_index=True)
        again = np.ones(len(rows), dtype=bool)
        again[first] = False
        return rows[again]

    def contradicting_rows(self) -> Indices:
        """Kept rows whose text or prompt has another label in another kept row."""
        rows = self.kept_rows
        if not self._labels or not len(rows):
            return np.zeros(0, dtype=np.int64)
        labels = _joined(self._labels)[rows]
        if labels.ndim > 1:  # a set of labels counts as one
            labels = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
        _, text = np.unique(_joined(self._prompt_hashes)[rows], return_inverse=True)
        low = np.full(text.max() + 1, 2**31, dtype=np.int64)
        high = np.full(len(low), -1, dtype=np.int64)
        np.minimum.at(low, text, labels)
        np.maximum.at(high, text, labels)
        clash: Indices = rows[low[text] != high[text]]
        return clash

    def shared_with(self, other: Ledger) -> list[tuple[int, int]]:
        """``(own row, row of other)`` for each kept row with the same tokens as a kept row of ``other``."""
        rows, other_rows = self.kept_rows, other.kept_rows
        hashes, other_hashes = _joined(self._hashes)[rows], _joined(other._hashes)[other_rows]
        values, first = np.unique(other_hashes, return_index=True)
        if not len(values):
            return []
        at = np.minimum(np.searchsorted(values, hashes), len(values) - 1)
        same = np.flatnonzero(values[at] == hashes)
        return list(zip(rows[same].tolist(), other_rows[first[at[same]]].tolist(), strict=True))

    def report(self, *, most_places: int | None = None) -> dict[str, Any]:
        """The ledger as plain values; ``where`` lists name every affected row, or the first ``most_places``."""
        lengths = _joined(self._lengths)
        special = self._special_rows()
        return {
            "name": self.rows.name,
            "style": self.style,
            "rows": len(lengths) + sum(map(len, self.rows.left_out.values())),
            "kept": len(self.kept_rows),
            "blocks": len(self.lengths) if self.too_long == "split" else None,
            "tokens": None if self.tokenizer is None else self.num_tokens,
            "trained": None if self.per_row else self.num_trained,
            "max_length": self.max_length,
            "roles": [
                {"role": role, "seen": count, "trained": self._role_trained[role]}
                for role, count in sorted(self._role_seen.items(), key=lambda item: _role_order(item[0]))
                if count
            ],
            "special_tokens": special,
            "answers": {
                "count": self.num_answers,
                "ended": self.num_ended,
                "cut": len(self.marked("cut")),
                "terminators": {self.tokenizer.convert_ids_to_tokens(i): n for i, n in self._terminators.most_common()},
            },
            "masked": {"turns": self.num_masked, "tokens": self.num_masked_tokens},
            "lengths": {**_figures(lengths), "histogram": _histogram(lengths)},
            "sides": [
                {"key": key, "limit": limit, **_figures(_joined(parts))} for key, (limit, parts) in self._sides.items()
            ],
            "labels": self.label_counts(),
            "numbers": self._number_figures(),
            "left_out": [
                *(
                    {"reason": f"dropped: {reason}", "rows": len(places), "where": list(places[:most_places])}
                    for reason, places in self.rows.left_out.items()
                ),
                *(
                    {
                        "reason": reason,
                        "rows": len(rows),
                        "where": [self.rows.where(i) for i in rows[:most_places].tolist()],
                    }
                    for reason, rows in self.left_out.items()
                ),
            ],
        }

    def _number_figures(self) -> dict[str, float] | None:
        """Of the kept rows."""
        if self.numbers is None or not len(kept := self.numbers[self.kept_rows]):
            return None
        return {
            "min": float(kept.min()),
            "mean": float(kept.mean()),
            "max": float(kept.max()),
            "std": float(kept.std()),
        }

    def _special_rows(self) -> list[dict[str, Any]]:
        if self.tokenizer is None:
            return []
        added = self.tokenizer.added_tokens_decoder
        ids = set(self.tokenizer.all_special_ids) | {i for i, token in added.items() if token.special} | self.stop_ids
        used = sorted(i for i in ids if i < len(self._seen) and self._seen[i])
        return [
            {
                "token": self.tokenizer.convert_ids_to_tokens(i),
                "id": i,
                "seen": int(self._seen[i]),
                "trained": int(self._trained[i]),
            }
            for i in used
        ]

    @property
    def has_labels(self) -> bool:
        return bool(self._labels or self._spans) or self.numbers is not None

    def label_counts(self) -> list[dict[str, Any]] | None:
        """The number of kept rows of each class; None without classes. Of ``add_spans`` also the number of spans."""
        if self._spans:
            return [{"label": name, **counts} for name, counts in self._spans.items()]
        if not self._labels or self.class_names is None:
            return None
        labels = _joined(self._labels)[_joined(self._kept) > 0]
        counts = (labels.sum(0) if labels.ndim > 1 else np.bincount(labels, minlength=len(self.class_names))).tolist()
        return [{"label": name, "rows": count} for name, count in zip(self.class_names, counts, strict=True)]


def _role_order(role: str) -> int:
    """Sort key of a role: as in a conversation, with the template's and the tokenizer's tokens last."""
    order = ("system", "user", "assistant", "tool", "template", "tokenizer")
    return order.index(role) if role in order else 3


def _cumulated(mask: npt.NDArray[np.bool_]) -> Indices:
    """[T + 1] number of true values before each position."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(mask, dtype=np.int64)])


def _first(mask: npt.NDArray[np.bool_]) -> int:
    """Index of the first true value, or the length."""
    return int(mask.argmax()) if mask.any() else len(mask)


def _joined(parts: Sequence[Indices]) -> Indices:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


def _figures(lengths: Indices) -> dict[str, float]:
    some = len(lengths) > 0
    return {
        "min": int(lengths.min()) if some else 0,
        "median": float(np.median(lengths)) if some else 0.0,
        "mean": float(lengths.mean()) if some else 0.0,
        "p95": float(np.percentile(lengths, 95)) if some else 0.0,
        "max": int(lengths.max(initial=0)),
    }


def _histogram(lengths: Indices) -> list[dict[str, int]]:
    """Rows per range of lengths. The ranges end at powers of two, and halfway between them if that gives few ranges. The
    last one holds the longest percent of the rows, however long."""
    if not len(lengths):
        return []
    low, high, most = max(1, int(lengths.min())), int(np.percentile(lengths, 99)), int(lengths.max())
    powers = [2**k for k in range(40)]
    halves = sorted({*powers, *(3 * 2**k for k in range(39))})
    for steps in (halves, powers, powers[::2], powers[::4]):
        edges = [s for i, s in enumerate(steps) if s >= low and (i == 0 or steps[i - 1] < high)]
        edges = [max([0, *(s for s in steps if s < low)]), *edges]
        if len(edges) <= _MAX_BINS:
            break
    if edges[-1] < most:
        edges.append(most)
    if lengths.min() == 0:
        edges[0] = -1
    counts = np.histogram(lengths, bins=np.array(edges) + 0.5)[0].tolist()
    return [{"from": a + 1, "to": b, "rows": n} for a, b, n in zip(edges, edges[1:], counts, strict=False)]
