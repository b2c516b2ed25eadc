"""Named entities as tags of words: reads any scheme of prefixes, and writes BIO, the scheme of every model here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

OUTSIDE = "O"
# BIO and IOB1 (B, I), BIOES and BMES (S, E, M), BILOU (U, L), BMEWO (W).
_TAG = re.compile(r"([BIMELSUW])-(.+)", re.DOTALL)
_OPENS, _CLOSES = frozenset("BSUW"), frozenset("ELSUW")


class Entity(NamedTuple):
    """An entity in ``[start, end)``, of words or of characters."""

    start: int
    end: int
    label: str


def has_prefix(tag: str) -> bool:
    """Whether a tag has the form of B-PER."""
    return _TAG.fullmatch(tag) is not None


def entities_of(tags: Sequence[str]) -> list[Entity]:
    """The entities in the tags of a row's words, by the definition of CoNLL's ``conlleval``.

    An entity begins at B- (S-, U-, W-), and at I- (M-, E-, L-) after O, after another label, or after an entity that
    E- (L-, S-, U-, W-) ended. It goes on while the label stays. A tag without a prefix counts as I-.
    """
    found: list[Entity] = []
    open_label: str | None = None
    start = 0
    for i, tag in enumerate(tags):
        match = _TAG.fullmatch(tag)
        prefix, label = (match[1], match[2]) if match else ("I", None if tag == OUTSIDE else tag)
        if open_label is not None and (label != open_label or prefix in _OPENS):
            found.append(Entity(start, i, open_label))
            open_label = None
        if label is not None and open_label is None:
            open_label, start = label, i
        if label is not None and prefix in _CLOSES:
            found.append(Entity(start, i + 1, label))
            open_label = None
    if open_label is not None:
        found.append(Entity(start, len(tags), open_label))
    return found


def begins_inside(tags: Sequence[str]) -> bool:
    """Whether an entity begins with I- (M-, E-, L-), as in IOB1 or where a B- is missing."""
    return any((match := _TAG.fullmatch(tags[e.start])) and match[1] not in _OPENS for e in entities_of(tags))


def bio_tags(entities: Iterable[Entity], length: int) -> list[str]:
    """The BIO tags of ``length`` words with these entities, which do not overlap."""
    tags = [OUTSIDE] * length
    for start, end, label in entities:
        tags[start:end] = [f"B-{label}", *[f"I-{label}"] * (end - start - 1)]
    return tags


def bio_classes(labels: Iterable[str]) -> list[str]:
    """The classes of a model that tags words with these entity labels: O, then B- and I- of each label."""
    return [OUTSIDE, *(f"{prefix}-{label}" for label in sorted(set(labels)) for prefix in "BI")]


def entity_labels(classes: Iterable[str]) -> list[str]:
    """The labels of ``bio_classes``."""
    return [name.removeprefix("B-") for name in classes if name.startswith("B-")]
