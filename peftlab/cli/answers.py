"""A prediction as text: whole, or on one line beside others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from peftlab import formatting

_LABEL_WIDTH = 16
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
    if not _has_label(record):
        return _as_json(record)
    if styled:
        return f"{record['label']}  {100 * record['probability']:.1f} %"
    return f"{record['label']}\t{record['probability']:.6f}"


def answer_line(record: Record, *, styled: bool, width: int) -> str:
    """The answer to one of several inputs, on one line. Args: styled: as above. width: of the terminal."""
    if "text" in record:
        return formatting.one_line(record["text"]) if styled else _escaped(record["text"])
    if not _has_label(record) or not styled:
        return whole_answer(record, styled=styled)
    label = formatting.one_line(record["label"], _LABEL_WIDTH)
    head = f"{label:<{_LABEL_WIDTH}} {100 * record['probability']:5.1f} %  "
    about = record.get("input") or f"row {record['row']:,}"
    return head + formatting.one_line(about, width - len(head) - 1)


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


def _has_label(record: Record) -> bool:
    return {"label", "probability"} <= record.keys()


def _as_json(record: Record) -> str:
    """The answer without the row it belongs to; one value without its name."""
    answer = {name: value for name, value in record.items() if name not in _ABOUT}
    return json.dumps(next(iter(answer.values())) if len(answer) == 1 else answer)


def _escaped(text: str) -> str:
    """The text on one line, with reversible escapes."""
    return text.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")
