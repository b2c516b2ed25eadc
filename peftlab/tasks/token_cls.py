"""Token classification: named entities, or a tag for each word."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peftlab.data import Annotated, Rows
from peftlab.data.entities import Entity, bio_classes, bio_tags, entities_of, entity_labels
from peftlab.data.words import Positions
from peftlab.errors import DataError, listed
from peftlab.specs.tasks import TASKS, spec_of
from peftlab.tasks.base import TaskParts
from peftlab.tasks.tagging import TokenClassification


class NamedEntities(TokenClassification):
    """The classes are BIO tags: O, and B- and I- of each label."""

    spec = TASKS["token_cls"]
    per_word = False
    _result = "spans"

    @classmethod
    def find_classes(cls, parts: TaskParts, rows: Rows) -> list[str]:
        annotations = cls._annotations_of(parts)
        labels = annotations.labels(rows)
        available = list(rows.columns)
        key = f"data.columns.{'tags' if annotations.has_lists(available) else 'spans'}"
        if not labels:
            raise DataError(f"{rows.name}: no row has an entity; there is nothing to learn", key=key)
        return bio_classes(labels)

    @property
    def _span_labels(self) -> list[str]:
        return entity_labels(self.class_names)

    def _tags(self, where: str, row: Annotated, found: Positions) -> tuple[list[str], list[str]]:
        assert row.entities is not None
        starts = [row.words[i][0] for i in found.firsts.tolist()]
        ends = [row.words[i][1] for i in found.lasts.tolist()]
        taken = 0
        notes: dict[str, None] = {}
        placed: list[Entity] = []
        for entity in row.entities:
            if f"B-{entity.label}" not in self._index:
                key = "data.columns.tags" if row.is_list else "data.columns.spans"
                raise self._unknown(where, entity.label, self._span_labels, key)
            first = int(np.searchsorted(ends, entity.start, side="right"))
            last = int(np.searchsorted(starts, entity.end, side="left"))
            if first < last and (starts[first] < entity.start or ends[last - 1] > entity.end):
                notes["widened"] = None
            first = max(first, taken)
            if first >= last:
                notes["shared_word"] = None
                continue
            placed.append(Entity(first, last, entity.label))
            taken = last
        return bio_tags(placed, len(found)), list(notes)

    def _counted(self, names: Sequence[str], kept: int) -> tuple[list[str], list[str]]:
        entities = entities_of(names)
        return [e.label for e in entities], [e.label for e in entities if e.end > kept]

    def _spans(self, names: Sequence[str], row: Annotated, found: Positions) -> list[Entity]:
        return [
            Entity(row.words[found.firsts[e.start]][0], row.words[found.lasts[e.end - 1]][1], e.label)
            for e in entities_of(names)
        ]

    def _classes_of(self, label: str) -> list[int]:
        return [self._index[f"{prefix}-{label}"] for prefix in "BI"]


class WordTags(TokenClassification):
    """The classes are the tags of the words themselves."""

    spec = spec_of("token_cls", ("word_tags",))
    per_word = True
    _result = "words"

    @classmethod
    def find_classes(cls, parts: TaskParts, rows: Rows) -> list[str]:
        tags = cls._annotations_of(parts).labels(rows)
        if len(tags) < 2:
            raise DataError(
                f"{rows.name}: expected two tags or more, found {listed(tags) if tags else 'none'}",
                key="data.columns.word_tags",
            )
        return tags

    @property
    def _span_labels(self) -> list[str]:
        return self.class_names

    def _tags(self, where: str, row: Annotated, found: Positions) -> tuple[list[str], list[str]]:
        assert row.tags is not None
        for i, tag in enumerate(row.tags):
            if tag not in self._index:
                raise self._unknown(f"{where}: word {i + 1}", tag, self.class_names, "data.columns.word_tags")
        return [row.tags[i] for i in found.firsts.tolist()], []

    def _counted(self, names: Sequence[str], kept: int) -> tuple[list[str], list[str]]:
        return list(names), []

    def _spans(self, names: Sequence[str], row: Annotated, found: Positions) -> list[Entity]:
        return [
            Entity(row.words[found.firsts[k]][0], row.words[found.lasts[k]][1], name) for k, name in enumerate(names)
        ]

    def _classes_of(self, label: str) -> list[int]:
        return [self._index[label]]
