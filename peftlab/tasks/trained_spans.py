"""The positions of a language model's answer tokens in their text, to compare two tokenizers on one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftlab.data.chat import Formatter


@dataclass(frozen=True)
class TrainedSpan:
    """One trained part of a row.

    Attributes: text: with the end that the template writes. tokens: index in the row of each token that overlaps it.
    offsets: characters [begin, end) in ``text`` of each token.
    """

    text: str
    tokens: list[int]
    offsets: list[tuple[int, int]]


def trained_spans(tokenizer: Any, formatter: Formatter, row: Mapping[str, Any], where: str) -> list[TrainedSpan]:
    """The trained parts of a row, as ``data.tokenize`` cuts its text."""
    rendered = formatter.render(row, where)
    (encoded,) = formatter.control.encode(
        [rendered.text], [rendered.plain], add_special_tokens=formatter.style != "chat"
    )
    offsets = encoded.offsets
    spans = []
    for part in rendered.parts:
        if not part.trained:
            continue
        inside = [i for i, (first, last) in enumerate(offsets) if last > part.start and first < part.end]
        ends = [(max(0, offsets[i][0] - part.start), min(part.end, offsets[i][1]) - part.start) for i in inside]
        spans.append(TrainedSpan(rendered.text[part.start : part.end], inside, ends))
    return spans
