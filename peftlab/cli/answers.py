"""A prediction as text: whole, or on one line beside others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from peftlab import formatting

_LABEL_WIDTH = 16
_LABELS_WIDTH = 36
# What a record holds besides the answer.
_ABOUT = ("row", "input", "note")

Record = Mapping[str, Any]


def has_no_result(record: Record) -> bool:
    """Whether the input could not be read."""
    return all(value is None or isinstance(value, dict) for name, value in record.items() if name not in _ABOUT)


def whole_answer(record: Record, *, styled: bool) -> str:
    """The answer to a single input. Args: styled: for a person at a terminal, not for a program."""
    if "masks" in record:
        return _whole_masks(record, styled=styled)
    if "text" in record:
        return formatting.printable(record["text"]) if styled else str(record["text"])
    if (spans := _spans(record)) is not None and styled:
        rows = [(s["label"], s["text"], s["score"], s["start"], s["end"]) for s in spans]
        width = max([len(str(row[0])) for row in rows], default=0)
        lines = [f"{label:<{width}}  {100 * p:5.1f} %  {a:>5}-{b:<5}  {text}" for label, text, p, a, b in rows]
        return "\n".join(map(formatting.printable, [_marked(record, spans), *lines]))
    if "labels" in record:
        return _labels(record, styled)
    if _has_span(record):
        return _span(record, styled=styled)
    if styled and "objects" in record:
        return "\n".join(map(_object_line, record["objects"])) or "nothing found"
    if styled and "shares" in record:
        return "\n".join(_shares(record))
    if "rank" in record:
        return f"{record['rank']}\t{record['score']:.6f}"
    if not _has_label(record):
        return f"{record['score']:.6g}" if styled and record.keys() >= {"score"} else _as_json(record)
    if styled:
        return f"{record['label']}  {100 * record['probability']:.1f} %"
    return f"{record['label']}\t{record['probability']:.6f}"


def answer_line(record: Record, *, styled: bool, width: int) -> str:
    """The answer to one of several inputs, on one line. Args: styled: as above. width: of the terminal."""
    if "text" in record:
        return formatting.one_line(record["text"]) if styled else _escaped(record["text"])
    if (spans := _spans(record)) is not None and styled:
        return formatting.one_line(_marked(record, spans), width - 1)
    if _has_span(record) and styled:
        about = "" if record.get("input") else f"row {record['row']:,}: "
        return formatting.one_line(f"{about}{_span(record, styled=True)}", width - 1)
    if styled and "objects" in record:
        about = record.get("input") or f"row {record['row']:,}"
        found = "; ".join(map(_object_line, record["objects"])) or "nothing found"
        return f"{formatting.one_line(about, width // 2)}: {formatting.one_line(found, width)}"
    if styled and "shares" in record:
        about = record.get("input") or f"row {record['row']:,}"
        return f"{formatting.one_line(about, width // 2)}: {formatting.one_line(', '.join(_shares(record)), width)}"
    if styled and "cosine" in record:
        head = f"cosine {record['cosine']:7.4f}  "
        return head + formatting.one_line(_about(record), width - len(head) - 1)
    if styled and "rank" in record:
        head = f"{record['rank']:4}. score {record['score']:6.4f}  "
        return head + formatting.one_line(_about(record), width - len(head) - 1)
    if not _has_label(record) or not styled:
        answer = whole_answer(record, styled=styled)
        if not styled or not record.keys() & {"labels", "score"}:
            return answer
        head = f"{formatting.one_line(answer, _LABELS_WIDTH):<{_LABELS_WIDTH}}  "
        return head + formatting.one_line(_about(record), width - len(head) - 1)
    label = formatting.one_line(record["label"], _LABEL_WIDTH)
    head = f"{label:<{_LABEL_WIDTH}} {100 * record['probability']:5.1f} %  "
    return head + formatting.one_line(_about(record), width - len(head) - 1)


def _about(record: Record) -> str:
    return record.get("input") or f"row {record['row']:,}"


def _labels(record: Record, styled: bool) -> str:
    """Several labels with their probabilities; for a program, pairs separated by tabs."""
    pairs = [(name, record["probabilities"][name]) for name in record["labels"]]
    if styled:
        return ", ".join(f"{formatting.one_line(name)} {100 * p:.0f} %" for name, p in pairs) or "(none)"
    return "\t".join(f"{_escaped(name)}\t{p:.6f}" for name, p in pairs)


def _spans(record: Record) -> list[dict[str, Any]] | None:
    """The labelled parts of the input: entities, or words with a tag."""
    spans: list[dict[str, Any]] | None = record.get("spans", record.get("words"))
    return spans


def _marked(record: Record, spans: Sequence[Mapping[str, Any]]) -> str:
    """The input with a label after each span, such as ``[Ann Lee PER] slept``, or ``Ann/PROPN slept/VERB`` for tagged words;
    only the spans if the input is not in the record."""
    form = "[{text} {label}]" if "spans" in record else "{text}/{label}"
    marks = [form.format(**span) for span in spans]
    text = record.get("input")
    if not isinstance(text, str):
        return " ".join(marks) or f"row {record['row']:,}: none"
    parts, at = [], 0
    for mark, span in zip(marks, spans, strict=True):
        parts += [text[at : span["start"]], mark]
        at = span["end"]
    return "".join([*parts, text[at:]])


def _whole_masks(record: Record, *, styled: bool) -> str:
    """The filled text with a line for each mask; for a program, a line for each mask."""
    if not styled:
        return "\n".join(
            "\t".join(f"{_escaped(each['token'])}\t{each['probability']:.6f}" for each in tokens)
            for tokens in record["masks"]
        )
    lines = [formatting.printable(record["text"])]
    for number, tokens in enumerate(record["masks"], 1):
        shown = (f"{formatting.printable(each['token'])} {100 * each['probability']:.1f} %" for each in tokens)
        lines.append(f"  mask {number}: {'  '.join(shown)}")
    return "\n".join(lines)


def _object_line(found: Mapping[str, Any]) -> str:
    """``circle  98.2 %  at 12, 20 to 40, 55``: left and top, right and bottom in pixels."""
    left, top, right, bottom = found["box"]
    return f"{found['label']}  {100 * found['score']:.1f} %  at {left:g}, {top:g} to {right:g}, {bottom:g}"


def _shares(record: Record) -> list[str]:
    """``circle  12.3 %``: the share of the image's pixels of each class that is found, largest first; then the file of the
    mask."""
    shares = [f"{formatting.printable(one['label'])}  {100 * one['share']:.1f} %" for one in record["shares"]]
    return [*shares, *([f"in {record['mask']}"] if "mask" in record else [])]


def _has_label(record: Record) -> bool:
    return {"label", "probability"} <= record.keys()


def _has_span(record: Record) -> bool:
    return {"answer", "start", "end"} <= record.keys()


def _span(record: Record, *, styled: bool) -> str:
    """The answer, its place in characters, its probability and that of having none; tab-separated for a program."""
    found, none = record["probability"], record["no_answer_probability"]
    if styled:
        if record["start"] is None:
            return f"(no answer)  {100 * none:.1f} %"
        answer = formatting.one_line(record["answer"])
        return f"{answer}  ({record['start']:,} to {record['end']:,})  {100 * found:.1f} %"
    places = ["" if record[name] is None else str(record[name]) for name in ("start", "end")]
    return "\t".join([_escaped(record["answer"]).replace("\t", "\\t"), *places, f"{found:.6f}", f"{none:.6f}"])


def _as_json(record: Record) -> str:
    """The answer without the row it belongs to; one value without its name."""
    answer = {name: value for name, value in record.items() if name not in _ABOUT}
    return json.dumps(next(iter(answer.values())) if len(answer) == 1 else answer)


def _escaped(text: str) -> str:
    """The text on one line, with reversible escapes."""
    return text.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")
