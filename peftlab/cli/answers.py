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
    if "text" in record:
        return formatting.printable(record["text"]) if styled else str(record["text"])
    if "rank" in record:
        return f"{record['rank']}\t{record['score']:.6f}"
    if not _has_label(record):
        return _as_json(record)
    if styled:
        return f"{record['label']}  {100 * record['probability']:.1f} %"
    return f"{record['label']}\t{record['probability']:.6f}"


def answer_line(record: Record, *, styled: bool, width: int) -> str:
    """The answer to one of several inputs, on one line. Args: styled: as above. width: of the terminal."""
    if "text" in record:
        return formatting.one_line(record["text"]) if styled else _escaped(record["text"])
    if not styled or not (_has_label(record) or "cosine" in record or "rank" in record):
        return whole_answer(record, styled=styled)
    if "cosine" in record:
        head = f"cosine {record['cosine']:7.4f}  "
    elif "rank" in record:
        head = f"{record['rank']:4}. score {record['score']:6.4f}  "
    else:
        label = formatting.one_line(record["label"], _LABEL_WIDTH)
        head = f"{label:<{_LABEL_WIDTH}} {100 * record['probability']:5.1f} %  "
    about = record.get("input") or f"row {record['row']:,}"
    return head + formatting.one_line(about, width - len(head) - 1)


def _has_label(record: Record) -> bool:
    return {"label", "probability"} <= record.keys()


def _as_json(record: Record) -> str:
    """The answer without the row it belongs to; one value without its name."""
    answer = {name: value for name, value in record.items() if name not in _ABOUT}
    return json.dumps(next(iter(answer.values())) if len(answer) == 1 else answer)


def _escaped(text: str) -> str:
    """The text on one line, with reversible escapes."""
    return text.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")
