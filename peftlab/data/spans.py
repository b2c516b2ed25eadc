"""Reads the spans that mark entities in a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from peftlab.data.entities import OUTSIDE, Entity
from peftlab.data.values import is_null
from peftlab.data.words import words_of
from peftlab.errors import DataError

_SPAN = "{start: 0, end: 5, label: PERSON} or [0, 5, PERSON], in characters from 0, end not included"
# Place, label, what has it, recipe key -> the name of the label.
NameOf = Callable[[str, Any, str, str], str]


def read_spans(where: str, text: str, value: Any, *, name_of: NameOf, key: str) -> tuple[list[Entity], tuple[str, ...]]:
    """The entities of a text, in order, and notes about them; see ``Rendered.notes``.

    Args: value: a list of spans, also as JSON text. key: the recipe key that names the column.
    Raises: DataError at ``where``: something else, a span outside the text or without a word, or two that overlap.
    """
    items = as_list(value.get("entities") if isinstance(value, dict) else value)
    if items is None:
        found = "nothing" if is_null(value) or value == "" else shown(value)
        found += ", which is no JSON" if isinstance(value, str) and value.lstrip()[:1] == "[" else ""
        raise DataError(
            f"{where}: expected a list of spans, found {found}; a text without entities has []. data.empty=drop leaves out "
            "rows without a list",
            key=key,
        )
    entities, notes = [], dict[str, None]()
    for number, item in enumerate(items, 1):
        entity, trimmed = _span(f"{where}: span {number}", text, item, name_of, key)
        entities.append(entity)
        notes |= {"trimmed": None} if trimmed else {}
    entities.sort()
    for one, other in pairwise(entities):
        if other.start < one.end:
            raise DataError(
                f"{where}: {_quoted(text, one)} and {_quoted(text, other)} overlap; a word belongs to one entity: leave "
                "one of the two out",
                key=key,
            )
    return entities, tuple(notes)


def _span(where: str, text: str, item: Any, name_of: NameOf, key: str) -> tuple[Entity, bool]:
    """The entity of a span, without white space at its ends, and whether it had some."""
    fields = (
        [item.get("start"), item.get("end"), label_of(item)]
        if isinstance(item, dict)
        else list(item)[:3]
        if isinstance(item, list | tuple) and len(item) >= 3
        else None
    )
    if fields is not None:  # pandas writes whole numbers of some columns as floats
        fields = [int(v) if isinstance(v, float) and v.is_integer() else v for v in fields]
    if fields is None or any(isinstance(v, bool) or not isinstance(v, int) for v in fields[:2]):
        raise DataError(f"{where}: expected {_SPAN}; found {shown(item)}", key=key)
    start, end = fields[0], fields[1]
    if not 0 <= start < end:
        raise DataError(f"{where}: expected 0 <= start < end, found start {start} and end {end}", key=key)
    if end > len(text):
        raise DataError(
            f"{where}: ends at character {end:,}, but the text has {len(text):,}; offsets count characters, not bytes",
            key=key,
        )
    label = name_of(where, fields[2], "the span", key)
    if label == OUTSIDE:
        raise DataError(f"{where}: {OUTSIDE!r} stands for no entity; leave the span out", key=key)
    inside = text[start:end]
    says = item.get("text") if isinstance(item, dict) else None
    if isinstance(says, str) and says.strip() != inside.strip():
        raise DataError(
            f"{where}: its text is {says!r}, but characters {start} to {end} are {inside!r}; offsets count characters "
            "from 0, and the end is not included",
            key=key,
        )
    if not words_of(inside):
        raise DataError(f"{where}: there is no word in {inside!r}", key=key)
    left, right = len(inside) - len(inside.lstrip()), len(inside) - len(inside.rstrip())
    return Entity(start + left, end - right, label), bool(left or right)


def _quoted(text: str, entity: Entity) -> str:
    return f"{text[entity.start : entity.end]!r} ({entity.start} to {entity.end})"


def label_of(span: Any) -> Any:
    """The label of a span in any of its forms."""
    if isinstance(span, dict):
        return span["label"] if "label" in span else span.get("type")
    return span[2] if isinstance(span, list | tuple) and len(span) >= 3 else None


def as_list(value: Any) -> list[Any] | None:
    """A list, also as JSON text, which csv files hold; None for anything else."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if isinstance(value, dict) and "entities" in value:
        value = value["entities"]
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else None


def shown(value: Any, most: int = 80) -> str:
    """A value in a message."""
    text = "null" if is_null(value) else repr(value)
    return text if len(text) <= most else f"{text[: most - 4]} ..."
