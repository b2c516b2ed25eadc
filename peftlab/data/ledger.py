"""The loss ledger: what of a data set is trained, who wrote it, how its answers end, and which rows are left out and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from peftlab.data.chat import Formatter
from peftlab.data.rows import Rows
from peftlab.data.tokens import Tokens
from peftlab.errors import DataError

Indices = npt.NDArray[np.int64]
Allowable = Literal["untrained_terminator", "answer_not_trained", "pad_is_eos", "template_family"]

_SHOWN_ROWS = 3
_MAX_BINS = 8
# What templates of all families write around turns: <|im_end|>, <end_of_turn>, </s>, [INST], <<SYS>>, with the wide bars
# of DeepSeek's (U+FF5C) too.
_MARKER = re.compile(r"<[|\uff5c][^<>\s]{1,40}?[|\uff5c]>|</?[A-Za-z_][\w:-]{0,30}>|\[/?[A-Z_]{3,}\]|<</?[A-Z]+>>")


@dataclass(frozen=True)
class Finding:
    """Something to know before training.

    Attributes:
        kind: its name; ``data.allow`` takes those of ``Allowable``.
        message: what was found and what to do; where, the rows say.
        key: the recipe key to look at. rows: indices of the rows concerned, where it concerns single rows.
        error: whether training refuses it.
    """

    kind: str
    message: str
    key: str | None = None
    rows: Indices | None = None
    error: bool = False


class Ledger:
    """The account of one data set, filled while its rows are encoded.

    It holds a few numbers per row and none per token, so that a million rows cost tens of megabytes.

    Args:
        rows: the data set.
        max_length: the longest row in tokens. too_long: ``error``, ``truncate`` or ``drop``.
        keep_last: a truncated row keeps its last token.
        formatter: how rows became text, for a language model. class_names: for rows with a label.
        stop_ids: tokens that can end an answer.
    """

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
    ) -> None:
        self.rows, self.max_length, self.too_long = rows, max_length, too_long
        self.style = formatter.style if formatter else "labels"
        self.class_names = list(class_names) if class_names else None
        self._tokenizer, self._formatter, self._keep_last = tokenizer, formatter, keep_last
        self._stop_ids = set(stop_ids)
        self._lengths: list[Indices] = []
        self._kept: list[Indices] = []
        self._learnt: list[Indices] = []
        self._hashes: list[Indices] = []
        self._labels: list[Indices] = []
        self._seen = np.zeros(len(tokenizer), dtype=np.int64)
        self._trained = np.zeros(len(tokenizer), dtype=np.int64)
        self._role_seen: Counter[str] = Counter()
        self._role_trained: Counter[str] = Counter()
        self._terminators: Counter[int] = Counter()
        self._num_answers = self._num_ended = self._eos_masked = 0
        self._unended: list[Indices] = []
        self._unsaid: list[Indices] = []
        self._cut: list[Indices] = []
        self._doubled_bos: list[Indices] = []
        self._left_out: dict[str, list[Indices]] = {}

    def add(self, first: int, tokens: Tokens, kept: Indices, labels: Indices | None = None) -> None:
        """Enters the rows ``first``, ``first + 1``, ...

        Args: kept: [N] tokens of each row that are trained on; 0: left out. labels: [N] class indices.
        """
        lengths, in_row = tokens.lengths, first + np.arange(len(tokens), dtype=np.int64)
        self._lengths.append(lengths.astype(np.int32))
        self._kept.append(kept.astype(np.int32))
        self._learnt.append(tokens.num_trained(kept).astype(np.int32))
        raw, at = tokens.ids.tobytes(), (4 * tokens.bounds).tolist()
        self._hashes.append(np.array([hash(raw[a:b]) for a, b in pairwise(at)], dtype=np.int64))
        if labels is not None:
            self._labels.append(labels.astype(np.int32))
        self._leave_out(tokens, kept, lengths, in_row)
        self._count(tokens, kept, lengths)
        self._read_answers(tokens, kept, first)
        bos = self._tokenizer.bos_token_id
        twice = np.flatnonzero(lengths > 1)
        if bos is not None and len(twice):
            starts = tokens.bounds[:-1][twice]
            doubled = (tokens.ids[starts] == bos) & (tokens.ids[starts + 1] == bos)
            self._doubled_bos.append(in_row[twice[doubled]])

    def _leave_out(self, tokens: Tokens, kept: Indices, lengths: Indices, in_row: Indices) -> None:
        long = lengths > self.max_length
        trained = tokens.num_trained(lengths) > 0
        answers = np.bincount(tokens.answer_rows, minlength=len(tokens)) > 0
        masked = (kept == 0) & ~(long & (self.too_long != "truncate"))
        limit = f"longer than data.max_length ({self.max_length:,} tokens)"
        for reason, chosen in {
            f"truncated: {limit}": long & (kept > 0),
            f"dropped: {limit}": long & (self.too_long == "drop"),
            f"refused: {limit}": long & (self.too_long == "error"),
            "dropped: no assistant turn in it": masked & ~answers,
            "dropped: the answer is empty": masked & answers & ~trained,
            "dropped: truncation leaves no whole answer": masked & trained,
        }.items():
            if chosen.any():
                self._left_out.setdefault(reason, []).append(in_row[chosen])

    def _count(self, tokens: Tokens, kept: Indices, lengths: Indices) -> None:
        position = np.arange(len(tokens.ids)) - np.repeat(tokens.bounds[:-1], lengths)
        use = position < np.repeat(kept, lengths)
        if self._keep_last:
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
        """How the answers of the rows that stay end, as the text has them: what truncation takes is told apart."""
        here = kept[tokens.answer_rows] > 0
        rows, starts, ends = tokens.answer_rows[here], tokens.answer_starts[here], tokens.answer_ends[here]
        if not len(rows):
            return
        last = np.maximum(ends - 1, 0)
        ended = tokens.answer_ended[here] & tokens.trained[last] & (ends > starts)
        self._num_answers += len(rows)
        self._num_ended += int(ended.sum())
        self._terminators.update(tokens.ids[last[ended]].tolist())
        self._unended.append(first + rows[~ended])
        trained = np.concatenate([[0], np.cumsum(tokens.trained)])
        nothing = (ends > starts) & (trained[ends] == trained[starts])
        self._unsaid.append(first + rows[nothing | ~tokens.answer_said[here]])
        self._cut.append(first + rows[ends > tokens.bounds[rows] + kept[rows]])
        masked = (tokens.ids == self._tokenizer.eos_token_id) & ~tokens.trained
        masked[tokens.bounds[:-1][tokens.lengths > 0]] = False  # nothing predicts the first token of a row
        eos = np.concatenate([[0], np.cumsum(masked)])
        self._eos_masked += int((eos[ends] - eos[starts]).sum())

    @property
    def lengths(self) -> Indices:
        """[N] tokens of each row that is trained on, in order, as ``Encoded.lengths``."""
        kept = _joined(self._kept)
        return kept[kept > 0]

    @property
    def trained(self) -> Indices:
        """[N] trained tokens of each row that is trained on, in order."""
        return _joined(self._learnt)[self.kept_rows]

    @property
    def kept_rows(self) -> Indices:
        """The indices of the rows that are trained on."""
        return np.flatnonzero(_joined(self._kept))

    @property
    def num_tokens(self) -> int:
        return int(self._seen.sum())

    @property
    def num_trained(self) -> int:
        return int(self._trained.sum())

    def findings(self) -> list[Finding]:
        """What to know about this data set, errors first."""
        found = [*self._too_long_finding(), *self._zero_finding()]
        if self.style != "labels":
            found += [*self._template_findings(), *self._answer_findings()]
        return sorted([*found, *self._notes()], key=lambda f: not f.error)

    def _too_long_finding(self) -> list[Finding]:
        refused = next((_joined(r) for reason, r in self._left_out.items() if reason.startswith("refused")), None)
        if refused is None:
            return []
        longest = int(_joined(self._lengths)[refused].max())
        return [
            Finding(
                "too_long",
                f"{_rows(len(refused))} {'has' if len(refused) == 1 else 'have'} more tokens than "
                f"the limit of {self.max_length:,} (up to {longest:,}); set data.too_long=truncate or data.too_long=drop, "
                "or raise data.max_length if the model allows it",
                "data.too_long",
                refused,
                error=True,
            )
        ]

    def _zero_finding(self) -> list[Finding]:
        if self.style == "labels":
            if len(self.lengths):
                return []
            message = f"{self.rows.name}: none of the {len(self.rows):,} rows is left"
            return [Finding("no_rows", message, "data.too_long", error=True)]
        if self.num_trained or any(reason.startswith("refused") for reason in self._left_out):
            return []
        why = "; ".join(f"{len(_joined(rows)):,} {reason}" for reason, rows in self._left_out.items())
        return [
            Finding(
                "zero_trained",
                f"{self.rows.name}: zero trained tokens in all {len(self.rows):,} rows ({why}); look at data.columns and "
                f"data.template, and at data.max_length ({self.max_length:,})",
                self._formatter.key if self._formatter else "data.columns",
                error=True,
            )
        ]

    def _template_findings(self) -> list[Finding]:
        formatter = self._formatter
        if formatter is None or self.style != "chat":
            return []
        end = formatter.turn_end(self.rows.where(0))
        strange = [marker for marker in _markers(end) if not self._is_token(marker)]
        if strange and not any(self._tokenizer.convert_tokens_to_ids(m) in self._stop_ids for m in _markers(end)):
            pieces = len(self._tokenizer(strange[0], add_special_tokens=False)["input_ids"])
            own = ", ".join(self._tokenizer.convert_ids_to_tokens(sorted(self._stop_ids))) or "none"
            return [
                Finding(
                    "template_family",
                    f"the chat template ends a turn with {strange[0]!r}, which this tokenizer does not know ({pieces} "
                    f"pieces of text): a template of another model family. Tokens that end a turn here: {own}. Take the "
                    "model's own template, or give one with model.chat_template; data.allow=[template_family] trains it "
                    "all the same",
                    "model.chat_template",
                    error=True,
                )
            ]
        return []

    def _answer_findings(self) -> list[Finding]:
        found = []
        what = "assistant turns" if self.style == "chat" else "answers"
        unsaid, unended = _joined(self._unsaid), _joined(self._unended)
        if len(unsaid):
            found.append(
                Finding(
                    "answer_not_trained",
                    f"in {len(unsaid):,} of {self._num_answers:,} {what} the trained tokens do not "
                    "hold the words of the message, so the chat template drops or rewrites what the model should learn; "
                    "correct it (model.chat_template), or data.allow=[answer_not_trained]",
                    "model.chat_template",
                    unsaid,
                    error=True,
                )
            )
        tokenizer = self._tokenizer
        if self._eos_masked and tokenizer.pad_token_id == tokenizer.eos_token_id:
            found.append(
                Finding(
                    "pad_is_eos",
                    f"the padding token is the end-of-text token {tokenizer.eos_token!r}, and {self._eos_masked:,} of them "
                    f"inside {what} are not trained, as if they were padding: the model would not learn to stop; give the "
                    "tokenizer another padding token, or data.allow=[pad_is_eos]",
                    "model.name",
                    error=True,
                )
            )
        if len(unended):
            written = self._formatter.turn_end("") if self._formatter and self.style == "chat" else ""
            wrote = f" (the chat template writes {written!r} after it)" if self.style == "chat" else ""
            own = ", ".join(tokenizer.convert_ids_to_tokens(sorted(self._stop_ids))) or "none"
            found.append(
                Finding(
                    "untrained_terminator",
                    f"{len(unended):,} of {self._num_answers:,} {what} do not end with a trained "
                    f"end-of-turn token{wrote}, so the model does not learn to stop there; tokens that can end a turn "
                    f"here: {own}. Correct the template (model.chat_template), or data.allow=[untrained_terminator]",
                    "model.chat_template" if self.style == "chat" else "model.name",
                    unended,
                    error=self.style != "text",
                )
            )
        return found

    def _notes(self) -> list[Finding]:
        notes = []
        repeated = self._repeated_rows()
        if len(repeated):
            verb = "repeats an earlier one" if len(repeated) == 1 else "repeat an earlier one"
            notes.append(Finding("repeated", f"{_rows(len(repeated))} {verb}", "data.train", repeated))
        clash = self._contradicting_rows()
        if len(clash):
            notes.append(
                Finding(
                    "contradicting",
                    f"{_rows(len(clash))} with a text that has another label elsewhere",
                    "data.columns.label",
                    clash,
                )
            )
        doubled, cut = _joined(self._doubled_bos), np.unique(_joined(self._cut))
        if len(doubled):
            notes.append(
                Finding(
                    "doubled_bos",
                    f"{_rows(len(doubled))} beginning with {self._tokenizer.bos_token!r} twice: the text or its template "
                    f"writes it, and so does the tokenizer",
                    "data.template",
                    doubled,
                )
            )
        if len(cut) and self.style != "labels":
            notes.append(
                Finding(
                    "answer_cut",
                    f"truncation cuts an answer in {_rows(len(cut))}",
                    "data.too_long",
                    cut,
                )
            )
        if self._formatter is not None and self.style == "chat":
            ordinary = [m for m in self._template_markers() if not self._is_token(m)]
            if ordinary:
                notes.append(
                    Finding(
                        "ordinary_markers",
                        f"the chat template writes {', '.join(map(repr, ordinary))}, which this tokenizer reads as ordinary "
                        "text",
                        "model.chat_template",
                    )
                )
        return notes

    def _template_markers(self) -> list[str]:
        """Markers among what the template writes around a question and an answer."""
        assert self._formatter is not None
        return _markers(self._formatter.probe_text(self.rows.where(0)))

    def _is_token(self, marker: str) -> bool:
        return len(self._tokenizer(marker, add_special_tokens=False)["input_ids"]) == 1

    def _repeated_rows(self) -> Indices:
        hashes = _joined(self._hashes)
        _, first = np.unique(hashes, return_index=True)
        again = np.ones(len(hashes), dtype=bool)
        again[first] = False
        return np.flatnonzero(again)

    def _contradicting_rows(self) -> Indices:
        if not self._labels:
            return np.zeros(0, dtype=np.int64)
        labels = _joined(self._labels)
        _, text = np.unique(_joined(self._hashes), return_inverse=True)
        low = np.full(text.max(initial=-1) + 1, 2**31, dtype=np.int64)
        high = np.full(len(low), -1, dtype=np.int64)
        np.minimum.at(low, text, labels)
        np.maximum.at(high, text, labels)
        return np.flatnonzero(low[text] != high[text])

    def shared_with(self, other: Ledger) -> list[tuple[int, int]]:
        """``(row here, row there)`` for each row here whose tokens are also a row of ``other``."""
        mine, theirs = _joined(self._hashes), _joined(other._hashes)
        values, first = np.unique(theirs, return_index=True)
        if not len(values):
            return []
        at = np.minimum(np.searchsorted(values, mine), len(values) - 1)
        same = np.flatnonzero(values[at] == mine)
        return list(zip(same.tolist(), first[at[same]].tolist(), strict=True))

    def report(self, *, most_places: int | None = None) -> dict[str, Any]:
        """All of it as plain values; ``where`` lists name every row concerned, or the first ``most_places``."""
        lengths = _joined(self._lengths)
        special = self._special_rows()
        return {
            "name": self.rows.name,
            "style": self.style,
            "rows": len(lengths),
            "kept": len(self.lengths),
            "tokens": self.num_tokens,
            "trained": self.num_trained if self.style != "labels" else None,
            "max_length": self.max_length,
            "roles": [
                {"role": role, "seen": count, "trained": self._role_trained[role]}
                for role, count in sorted(self._role_seen.items(), key=lambda item: _role_order(item[0]))
                if count
            ],
            "special_tokens": special,
            "answers": {
                "count": self._num_answers,
                "ended": self._num_ended,
                "terminators": {
                    self._tokenizer.convert_ids_to_tokens(i): n for i, n in self._terminators.most_common()
                },
            },
            "lengths": {
                "min": int(lengths.min(initial=2**31)) if len(lengths) else 0,
                "median": float(np.median(lengths)) if len(lengths) else 0.0,
                "mean": float(lengths.mean()) if len(lengths) else 0.0,
                "p95": float(np.percentile(lengths, 95)) if len(lengths) else 0.0,
                "max": int(lengths.max(initial=0)),
                "histogram": _histogram(lengths),
            },
            "labels": self._label_rows(),
            "left_out": [
                {
                    "reason": reason,
                    "rows": len(found),
                    "where": [self.rows.where(i) for i in found[:most_places].tolist()],
                }
                for reason, found in ((reason, _joined(parts)) for reason, parts in self._left_out.items())
            ],
        }

    def _special_rows(self) -> list[dict[str, Any]]:
        added = self._tokenizer.added_tokens_decoder
        ids = set(self._tokenizer.all_special_ids) | {i for i, token in added.items() if token.special} | self._stop_ids
        used = sorted(i for i in ids if i < len(self._seen) and self._seen[i])
        return [
            {
                "token": self._tokenizer.convert_ids_to_tokens(i),
                "id": i,
                "seen": int(self._seen[i]),
                "trained": int(self._trained[i]),
            }
            for i in used
        ]

    def _label_rows(self) -> list[dict[str, Any]] | None:
        if not self._labels or self.class_names is None:
            return None
        counts = np.bincount(_joined(self._labels)[_joined(self._kept) > 0], minlength=len(self.class_names)).tolist()
        return [{"label": name, "rows": count} for name, count in zip(self.class_names, counts, strict=True)]


def require(ledger: Ledger, *, allow: Collection[str] = (), structure: bool = True) -> None:
    """Raises DataError with every error of the ledger that is not allowed.

    Args: structure: False leaves out what concerns training alone, for data that is only evaluated.
    """
    always = {"too_long", "zero_trained", "no_rows"}
    errors = [f for f in ledger.findings() if f.error and f.kind not in allow and (structure or f.kind in always)]
    if errors:
        raise DataError("\n".join(_located(f, ledger.rows) for f in errors), key=errors[0].key)


def _located(finding: Finding, rows: Rows) -> str:
    if finding.rows is None:
        return finding.message
    shown = [rows.where(int(i)) for i in finding.rows[:_SHOWN_ROWS]]
    return ", ".join(shown) + (", ..." if len(finding.rows) > _SHOWN_ROWS else "") + f": {finding.message}"


def _role_order(role: str) -> int:
    """As in a conversation; what a template or the tokenizer adds comes last."""
    order = ("system", "user", "assistant", "tool", "template", "tokenizer")
    return order.index(role) if role in order else 3


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _markers(text: str) -> list[str]:
    return list(dict.fromkeys(_MARKER.findall(text)))


def _joined(parts: Sequence[Indices]) -> Indices:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


def _histogram(lengths: Indices) -> list[dict[str, int]]:
    """Rows per range of lengths. The ranges end at powers of two, or at halves between them while that makes few; the last
    one takes the longest percent of the rows, however long."""
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
