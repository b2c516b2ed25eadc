"""Counts of predicted, true and right entities, by the definition of CoNLL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from peftlab.data.entities import entities_of, entity_labels
from peftlab.evaluation import row_metrics
from peftlab.measuring.intervals import Floats, Statistic
from peftlab.specs.metrics import class_slugs

# The columns, in the order of the counts.
COLUMNS = ("entities_right", "entities_predicted", "entities_true")


def entities_per_row(
    where: ArrayLike, predictions: ArrayLike, references: ArrayLike, *, tags: Sequence[str], num_rows: int
) -> dict[str, Floats]:
    """[num_rows, labels] entities of each label by column: those that are right in words and label, predicted, and true.

    Args: where: [N] row of each word; a row's words are in order. predictions, references: [N] indices into ``tags``.
    """
    labels = {label: i for i, label in enumerate(entity_labels(tags))}
    counts = np.zeros((len(COLUMNS), num_rows, len(labels)))
    rows = np.asarray(where, dtype=np.int64)
    order = np.argsort(rows, kind="stable")
    rows, ours, true = rows[order], np.asarray(predictions)[order], np.asarray(references)[order]
    bounds = np.flatnonzero(np.diff(rows, prepend=-1, append=num_rows)).tolist()
    for start, end in pairwise(bounds):
        found, wanted = (set(entities_of([tags[i] for i in part[start:end].tolist()])) for part in (ours, true))
        for count, entities in zip(counts, (found & wanted, found, wanted), strict=True):
            for entity in entities:
                count[rows[start], labels[entity.label]] += 1
    return dict(zip(COLUMNS, counts, strict=True))


def entity_values(
    name: str, share: str, predictions: ArrayLike, references: ArrayLike, starts: ArrayLike, tags: Sequence[str]
) -> dict[str, float | None]:
    """``NAME`` over all entities and ``NAME_LABEL`` of each label, 0.0 without anything to divide by; None for a label that no
    row has.

    Args: share: precision, recall or f1. starts: [N] whether a row begins at the word.
    """
    where = np.cumsum(np.asarray(starts, dtype=np.int64)) - 1
    columns = entities_per_row(where, predictions, references, tags=tags, num_rows=int(where[-1]) + 1)
    right, found, true = (columns[column].sum(0) for column in COLUMNS)
    values: dict[str, float | None] = {name: _share(share, right.sum(), found.sum(), true.sum())}
    for i, slug in enumerate(class_slugs(entity_labels(tags))):
        values[f"{name}_{slug}"] = _share(share, right[i], found[i], true[i]) if true[i] else None
    return values


def entity_statistic(share: str, rows: Mapping[str, Floats], label: int | None = None) -> Statistic:
    """A share as a function of row counts, from the columns of ``entities_per_row`` that it needs. Args: label: the index of
    one label; None: all."""
    columns = (rows[name] if name in rows else np.zeros((1, 1)) for name in COLUMNS)
    right, found, true = (c.sum(1) if label is None else c[:, label] for c in columns)
    return row_metrics.share_of_class(*_fraction(share, right, found, true))


def label_statistic(share: str, rows: Mapping[str, Floats], label: int) -> tuple[Statistic, int]:
    """``entity_statistic`` of one label, and the number of rows with such an entity."""
    return entity_statistic(share, rows, label), int((rows["entities_true"][:, label] > 0).sum())


def _share(share: str, *counts: float) -> float:
    above, below = _fraction(share, *counts)
    return float(above / below) if below else 0.0


def _fraction(share: str, right: Any, found: Any, true: Any) -> tuple[Any, Any]:
    return {"precision": (right, found), "recall": (right, true), "f1": (2 * right, found + true)}[share]
