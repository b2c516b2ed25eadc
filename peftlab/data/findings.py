"""Finds errors and notes in a ledger before training."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftlab.data.labels import similar_labels
from peftlab.data.ledger import Indices, Ledger
from peftlab.data.mask_ledger import MaskLedger
from peftlab.data.question_ledger import QuestionLedger
from peftlab.errors import DataError, listed

_SHOWN_ROWS = 3
_SHOWN_TOKENS = 3
_SHOWN_GROUPS = 3
# More classes than this with few rows each are probably values of another kind.
_MANY_CLASSES = 50
_FEW_ROWS = 2
_LONGEST_MAPPING = 6
# Markers that templates of all families write around turns: <|im_end|>, <end_of_turn>, </s>, [INST], <<SYS>>, also with
# DeepSeek's wide bars (U+FF5C).
_MARKER = re.compile(r"<[|\uff5c][^<>\s]{1,40}?[|\uff5c]>|</?[A-Za-z_][\w:-]{0,30}>|\[/?[A-Z_]{3,}\]|<</?[A-Z]+>>")
_SHOWN_DETAILS = 8
# Mark of the ledger -> what the trained tokens of an answer lack.
_MISSING = {"words": "the message", "calls": "the tool calls", "reasoning": "the reasoning"}
# Kind of a note of ``Rendered.notes`` -> its text and the recipe key to look at.
_NOTES = {
    "unread_key": ("the chat template does not read these keys of messages: {details} ({rows})", "model.chat_template"),
    "numbers": ("numbers are read as text ({rows})", None),
    "nulls": (
        "null values inside tool calls and tools count as absent ({rows}); arguments as JSON text keep them",
        None,
    ),
    "untrained_role": (
        "train or loss is true on turns that are not the assistant's; they are not trained ({rows})",
        None,
    ),
    "unaligned": (
        "the answer begins or ends inside a token ({rows}); the tokens that cover it are trained",
        "data.columns.answers",
    ),
    "ambiguous_answer": (
        "the answer occurs more than once in the context and the data does not say where; the first place is trained ({rows})",
        "data.columns.answer_start",
    ),
    "unmatched_call": ("a tool_call_id names no earlier call ({rows})", None),
    "dropped_reasoning": ("the chat template leaves out the reasoning before the last question ({rows})", None),
    "unused_tools": (
        "the chat template does not write the tools of {rows}, such as {details}: the model would not see them",
        "model.chat_template",
    ),
    "widened": (
        "entities begin or end inside a word, or inside a token of several words; they are widened to all of it ({rows})",
        "data.columns.spans",
    ),
    "shared_word": (
        "entities have no word or token of their own, because an earlier one has it; they are left out ({rows})",
        "data.columns.spans",
    ),
    "trimmed": ("entities begin or end with white space, which is cut off ({rows})", "data.columns.spans"),
    "begins_inside": (
        "entities begin with I-, as in IOB1 or where a B- is missing; they are read as entities ({rows})",
        "data.columns.tags",
    ),
    "no_prefix": (
        "the tags have no prefix such as B-, so that neighbouring words with one tag are one entity ({rows}); for a tag per "
        "word, such as a part of speech, name the column data.columns.word_tags",
        "data.columns.tags",
    ),
    "no_token": (
        "the tokenizer has no token for some words, such as {details}; they are not scored ({rows})",
        "model.name",
    ),
    "control_as_text": (
        "control tokens in the data are encoded as plain text ({rows}); data.control_tokens=keep encodes them as the tokens",
        "data.control_tokens",
    ),
    "control_kept": (
        "control tokens in the data are encoded as the tokens ({rows}); data.control_tokens=text encodes them as plain text",
        "data.control_tokens",
    ),
}
# Errors that make data unusable for evaluation too, not only for training.
_ALWAYS = ("too_long", "zero_trained", "no_rows", "unknown_ids")


@dataclass(frozen=True)
class Finding:
    """An error or note about the data.

    Attributes:
        kind: its name; the recipe's ``data.allow`` accepts the kinds that are errors in how answers are trained.
        message: what was found and what to do, without the rows.
        key: the recipe key to look at. rows: indices of the affected rows, if it is about single rows.
        error: whether training refuses the data.
    """

    kind: str
    message: str
    key: str | None = None
    rows: Indices | None = None
    error: bool = False


def find(ledger: Ledger, *, num_embeddings: int | None = None) -> list[Finding]:
    """The findings of a ledger: errors first, then notes.

    Args: num_embeddings: rows of the model's input embeddings; None: no vocabulary, or unknown.
    """
    findings = [
        *_unfit(ledger),
        *_ids(ledger, num_embeddings),
        *_template(ledger),
        *_answers(ledger),
        *_messages(ledger),
        *_row_notes(ledger),
        *(_pixels(ledger) if isinstance(ledger, MaskLedger) else _labels(ledger)),
        *(_questions(ledger) if isinstance(ledger, QuestionLedger) else ()),
    ]
    return sorted(findings, key=lambda finding: not finding.error)


def require(
    ledger: Ledger, *, allow: Collection[str] = (), training: bool = True, num_embeddings: int | None = None
) -> None:
    """Raises DataError with every error of the ledger that is not allowed.

    Args: training: False skips errors that matter only for training, for data that is only evaluated. num_embeddings: see
    ``find``.
    """
    found = find(ledger, num_embeddings=num_embeddings)
    errors = [f for f in found if f.error and f.kind not in allow and (training or f.kind in _ALWAYS)]
    if errors:
        raise DataError("\n".join(_located(finding, ledger) for finding in errors), key=errors[0].key)


def _located(finding: Finding, ledger: Ledger) -> str:
    if finding.rows is None:
        return finding.message
    rows = np.unique(finding.rows)
    shown = [ledger.rows.where(int(i)) for i in rows[:_SHOWN_ROWS]]
    return ", ".join(shown) + (", ..." if len(rows) > _SHOWN_ROWS else "") + f": {finding.message}"


def _unfit(ledger: Ledger) -> Iterator[Finding]:
    why, refused = next(((why, rows) for why, rows in ledger.left_out.items() if why.startswith("refused")), ("", None))
    if refused is not None:
        key, limit, lengths = ledger.limit_of(why)
        what = "target tokens" if key == "data.max_target_length" else "tokens"
        has = "has" if len(refused) == 1 else "have"
        ways = "data.too_long=truncate or data.too_long=drop"
        if ledger.style in ("text", "texts") and not ledger.per_row:
            ways = "data.too_long=split, which trains all of it in blocks, or truncate or drop"
        yield Finding(
            "too_long",
            f"{_rows(len(refused))} {has} more {what} than the limit of {limit:,} (up to {int(lengths[refused].max()):,}); set "
            f"{ways}, or raise {key} if the model allows it",
            "data.too_long",
            refused,
            error=True,
        )
    elif ledger.per_row and not len(ledger.lengths):
        yield Finding("no_rows", f"{ledger.rows.name}: no row is left", "data.too_long", error=True)
    elif not ledger.per_row and not ledger.num_trained:
        why = "; ".join(f"{len(rows):,} {reason}" for reason, rows in ledger.left_out.items())
        writers = ", ".join(map(repr, ledger.writers))
        roles = f"; the roles are {writers}, and only 'assistant' turns are trained" if ledger.style == "chat" else ""
        yield Finding(
            "zero_trained",
            f"{ledger.rows.name}: zero trained tokens in all {_rows(len(ledger.rows))} ({why}){roles}; check data.columns, "
            f"data.template and data.max_length ({ledger.max_length:,})",
            ledger.formatter.key if ledger.formatter else "data.columns",
            error=True,
        )


def _ids(ledger: Ledger, num_embeddings: int | None) -> Iterator[Finding]:
    if ledger.tokenizer is None or num_embeddings is None:
        return
    ids, more = ledger.ids_from(num_embeddings), len(ledger.tokenizer) - num_embeddings
    if ids:
        yield Finding("unknown_ids", unknown_ids(ledger.tokenizer, ids, num_embeddings), "model.name",
                      ledger.rows_with_ids(num_embeddings), error=True)  # fmt: skip
    elif more > 0:
        yield Finding(
            "unused_ids",
            f"the tokenizer has {more:,} token{'' if more == 1 else 's'} more than the model has embedding rows "
            f"({num_embeddings:,}), such as {ledger.tokenizer.convert_ids_to_tokens(num_embeddings)!r}; none occurs in these rows, "
            "and a text with one is refused",
            "model.name",
        )


def check_ids(tokenizer: Any, ids: Indices, num_embeddings: int | None, where: str) -> None:
    """Raises DataError naming ``where`` if one of the [T] ``ids`` has no embedding row. Args: num_embeddings: see ``find``."""
    if num_embeddings is not None and len(ids) and int(ids.max()) >= num_embeddings:
        beyond = np.unique(ids[ids >= num_embeddings]).tolist()
        raise DataError(f"{where}: {unknown_ids(tokenizer, beyond, num_embeddings)}", key="model.name")


def unknown_ids(tokenizer: Any, ids: Sequence[int], num_embeddings: int) -> str:
    """The message about token ids without an embedding row."""
    tokens = ", ".join(repr(str(tokenizer.convert_ids_to_tokens(i))) for i in ids[:_SHOWN_TOKENS])
    more = f" and {len(ids) - _SHOWN_TOKENS:,} others" if len(ids) > _SHOWN_TOKENS else ""
    return (
        f"the tokenizer writes {tokens}{more} (ids up to {max(ids):,}), but the model has only {num_embeddings:,} embedding rows. "
        f"In Python, call model.resize_token_embeddings({len(tokenizer)}), save model and tokenizer with save_pretrained into "
        "one folder, and set model.name to it; or use the model's own tokenizer"
    )


def _turn_end(ledger: Ledger) -> str | None:
    """What the chat template writes after an answer; None without a template, or if unknown."""
    if ledger.formatter is None or ledger.style != "chat":
        return None
    return ledger.formatter.chat_template.turn_end(ledger.formatter.chats(ledger.rows))


def _of_another_family(ledger: Ledger) -> str | None:
    """The end-of-turn marker of the template, if the tokenizer does not know it."""
    markers = _markers(_turn_end(ledger) or "")
    if any(ledger.tokenizer.convert_tokens_to_ids(marker) in ledger.stop_ids for marker in markers):
        return None
    return next((marker for marker in markers if not _is_token(ledger, marker)), None)


def _template(ledger: Ledger) -> Iterator[Finding]:
    marker = _of_another_family(ledger)
    if marker is not None:
        pieces = len(ledger.tokenizer(marker, add_special_tokens=False)["input_ids"])
        yield Finding(
            "template_family",
            f"the chat template ends a turn with {marker!r}, which is not a token of this tokenizer ({pieces} pieces of "
            f"text): it belongs to another model family; {_own_ends(ledger)}. Use the model's own template, or set "
            "model.chat_template; data.allow=[template_family] trains it anyway",
            "model.chat_template",
            error=True,
        )
        return
    end = _turn_end(ledger)
    if end is not None and not any(
        t in ledger.stop_ids for t in ledger.tokenizer(end, add_special_tokens=False)["input_ids"]
    ):
        yield Finding(
            "added_end",
            f"the chat template writes no end-of-turn token after an answer, only {end!r}; peftlab adds "
            f"{ledger.tokenizer.eos_token!r} after the last turn of each row",
            "model.chat_template",
        )
    if end is not None and ledger.formatter is not None:
        probed = ledger.formatter.chat_template.probe(()) or ""
        ordinary = [marker for marker in _markers(probed) if not _is_token(ledger, marker)]
        if ordinary:
            yield Finding(
                "ordinary_markers",
                f"the chat template writes {', '.join(map(repr, ordinary))}, which this tokenizer reads as ordinary text",
                "model.chat_template",
            )


def _answers(ledger: Ledger) -> Iterator[Finding]:
    what, tokenizer = "assistant turns" if ledger.style == "chat" else "answers", ledger.tokenizer
    header, unended = ledger.marked("header"), ledger.marked("unended")
    total = f"{ledger.num_answers:,} {what}"
    for mark, missing in _MISSING.items():
        if len(rows := ledger.marked(mark)):
            yield Finding(
                "wrong_mask",
                f"in {len(rows):,} of {total} the trained tokens do not contain {missing}: the chat template drops or "
                "rewrites what the model should learn; fix it (model.chat_template), or set data.allow=[wrong_mask]",
                "model.chat_template",
                rows,
                error=True,
            )
    if len(header):
        yield Finding(
            "wrong_mask",
            f"in {len(header):,} of {total} the header of the answer is trained too, because the chat template ignores "
            "add_generation_prompt and writes no header there; fix it (model.chat_template), or set "
            "data.allow=[wrong_mask]",
            "model.chat_template",
            header,
            error=True,
        )
    if ledger.num_masked_eos and tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield Finding(
            "pad_is_eos",
            f"the padding token is the end-of-text token {tokenizer.eos_token!r}, so {ledger.num_masked_eos:,} of them inside "
            f"{what} are masked as padding: the model would not learn to stop; give the tokenizer another padding token, or "
            "set data.allow=[pad_is_eos]",
            "model.name",
            error=True,
        )
    # A template of another family ends no turn: reported above.
    if len(unended) and _of_another_family(ledger) is None:
        end, is_text = _turn_end(ledger), ledger.style == "text"
        remedy = "Fix the template (model.chat_template), or set data.allow=[untrained_terminator]"
        wrote = f" (the chat template writes {end!r} after them)" if end is not None else ""
        yield Finding(
            "untrained_terminator",
            f"{len(unended):,} of {total} do not end with a trained end-of-turn token{wrote}, so the model does not learn to "
            f"stop there; {_own_ends(ledger)}" + ("" if is_text else f". {remedy}"),
            "model.chat_template" if ledger.style == "chat" else "model.name",
            unended,
            error=not is_text,
        )
    empty, inner, cut = (ledger.marked(name) for name in ("empty", "inner_end", "cut"))
    if len(empty):
        yield Finding("empty_answer", f"{len(empty):,} of {total} are empty: only their end is trained", None, empty)
    if len(inner):
        yield Finding(
            "inner_end", f"{len(inner):,} of {total} contain an end-of-turn token before their end", None, inner
        )
    if len(cut):
        yield Finding("answer_cut", f"truncation cuts {len(cut):,} of {total}", "data.too_long", cut)


def _messages(ledger: Ledger) -> Iterator[Finding]:
    for mark in ledger.marks:
        kind, _, role = mark.partition(" ")
        if kind == "unwritten":
            rows = ledger.marked(mark)
            yield Finding(
                "unwritten_message",
                f"the words of {len(rows):,} {role} message{'' if len(rows) == 1 else 's'} are not in the text: the chat "
                "template drops or rewrites them",
                "model.chat_template",
                rows,
            )
    yield from _conversation_notes(ledger)


def _conversation_notes(ledger: Ledger) -> Iterator[Finding]:
    """What was noticed while rows were read as conversations."""
    masked = ledger.marked("masked")
    if len(masked):
        turns = f"{ledger.num_masked:,} assistant turn{'' if ledger.num_masked == 1 else 's'}"
        yield Finding(
            "masked_turns",
            f"{turns} ({ledger.num_masked_tokens:,} tokens) {'is' if ledger.num_masked == 1 else 'are'} not trained, as the "
            "data says (weight: 0, loss: false, train: false, or part of the prompt)",
            None,
            masked,
        )
    noted: dict[str, list[str]] = {}
    for mark in ledger.marks:
        if mark.startswith("note "):
            kind, _, detail = mark.removeprefix("note ").partition(" ")
            noted.setdefault(kind, []).append(detail)
    for kind, details in noted.items():
        rows = np.unique(np.concatenate([ledger.marked(f"note {kind} {d}".rstrip()) for d in details]))
        text, key = _NOTES[kind]
        shown = ", ".join(map(repr, details[:_SHOWN_DETAILS]))
        more = f" and {len(details) - _SHOWN_DETAILS} more" if len(details) > _SHOWN_DETAILS else ""
        yield Finding(kind, text.format(rows=_rows(len(rows)), details=shown + more), key, rows)


def unread_columns(names: Collection[str]) -> Finding | None:
    """The note on columns of the data that nothing reads; None without any."""
    shown = list(names)[:_SHOWN_DETAILS]
    if not shown:
        return None
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    plural = len(names) > 1
    text = f"the column{'s' if plural else ''} {', '.join(map(repr, shown))}{more} {'are' if plural else 'is'} not read"
    return Finding("unread_columns", text, "data.columns")


def _row_notes(ledger: Ledger) -> Iterator[Finding]:
    for note in ledger.rows.notes:
        yield Finding(note.kind, note.message, note.key)
    repeated, doubled = ledger.repeated_rows(), ledger.marked("doubled_bos")
    if len(repeated):
        verb = "repeats" if len(repeated) == 1 else "repeat"
        yield Finding("repeated", f"{_rows(len(repeated))} {verb} an earlier one", "data.train", repeated)
    if len(doubled):
        verb = "begins" if len(doubled) == 1 else "begin"
        yield Finding(
            "doubled_bos",
            f"{_rows(len(doubled))} {verb} with {ledger.tokenizer.bos_token!r} twice: both the text (or its template) and the "
            "tokenizer write it",
            "data.template",
            doubled,
        )


def _labels(ledger: Ledger) -> Iterator[Finding]:
    clash = ledger.contradicting_rows()
    if len(clash):
        what = "image" if ledger.style == "images" else "text"
        verb = "has" if len(clash) == 1 else "have"
        yield Finding(
            "contradicting",
            f"{_rows(len(clash))} {verb} another label than a row with the same {what}",
            "data.columns.label",
            clash,
        )
    entries = ledger.label_counts() or []
    cut, spans = (sum(entry.get(name, 0) for entry in entries) for name in ("cut", "spans"))
    if cut:
        yield Finding("spans_cut", f"truncation cuts {cut:,} of {spans:,} entities", "data.too_long")
    counts = {entry["label"]: entry["rows"] for entry in entries}
    absent = [label for label, count in counts.items() if not count]
    if absent:
        yield Finding("absent_label", f"no row with the label {listed(absent)}", "data.columns.label")
    present = {label: count for label, count in counts.items() if count}
    yield from _similar(present)
    single = [label for label, count in present.items() if count == 1]
    if len(present) > _MANY_CLASSES and len(ledger.lengths) <= _FEW_ROWS * len(present):
        yield Finding(
            "many_labels",
            f"{len(present):,} classes in {_rows(len(ledger.lengths))}: these may be values and not classes; check "
            "data.columns.label, or cut numbers into classes with data.bins",
            "data.columns.label",
        )
    elif single:
        have = "1 label has" if len(single) == 1 else f"{len(single):,} labels have"
        yield Finding("single_row_label", f"{have} only one row: {listed(single)}", "data.columns.label")


def _pixels(ledger: MaskLedger) -> Iterator[Finding]:
    absent = [entry["label"] for entry in ledger.label_counts() or [] if not entry["rows"]]
    if absent:
        yield Finding("absent_label", f"no mask has a pixel of {listed(absent)}", "data.columns.mask")


def _questions(ledger: QuestionLedger) -> Iterator[Finding]:
    count, without = ledger.num_labelled, ledger.num_unanswered
    if count and without == count:
        yield Finding("no_answers", f"none of the {_rows(count)} has an answer", "data.columns.answers", error=True)
    elif count and not without and ledger.withholds:
        yield Finding(
            "always_answered",
            "every row has an answer; eval.null_threshold=null makes the model always give one",
            "eval.null_threshold",
        )
    elif without and not ledger.withholds:
        yield Finding(
            "never_withheld",
            f"{_rows(without)} have no answer, but with eval.null_threshold=null the model gives one to every question",
            "eval.null_threshold",
        )


def _similar(counts: dict[str, int]) -> Iterator[Finding]:
    groups = similar_labels(list(counts))
    if not groups:
        return
    shown = "; ".join(
        " and ".join(f"{label!r} ({_rows(counts[label])})" for label in group[:_SHOWN_TOKENS])
        for group in groups[:_SHOWN_GROUPS]
    )
    more = f"; and {len(groups) - _SHOWN_GROUPS:,} more groups" if len(groups) > _SHOWN_GROUPS else ""
    remedy = "write each label in one way"
    if len(counts) <= _LONGEST_MAPPING:
        most = {label: max(group, key=lambda name: counts[name]) for group in groups for label in group}
        mapping = ", ".join(f"{json.dumps(name)}: {json.dumps(most.get(name, name))}" for name in counts)
        remedy += f", or set data.label_names={{{mapping}}}"
    yield Finding(
        "similar_labels",
        f"labels that differ only by case, spaces or Unicode form are different classes: {shown}{more}; {remedy}",
        "data.label_names",
    )


def _own_ends(ledger: Ledger) -> str:
    """The tokens that can end a turn, the end-of-text token first."""
    tokens = ledger.tokenizer.convert_ids_to_tokens(
        sorted(ledger.stop_ids, key=lambda i: (i != ledger.tokenizer.eos_token_id, i))
    )
    more = " and others" if len(tokens) > _SHOWN_TOKENS else ""
    return (
        f"tokens that end a turn here: {', '.join(tokens[:_SHOWN_TOKENS])}{more}"
        if tokens
        else "this tokenizer has none"
    )


def _is_token(ledger: Ledger, marker: str) -> bool:
    return len(ledger.tokenizer(marker, add_special_tokens=False)["input_ids"]) == 1


def _markers(text: str) -> list[str]:
    return list(dict.fromkeys(_MARKER.findall(text)))


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"
