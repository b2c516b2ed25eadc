"""The unlabelled rows of a self-training: those that are no held-out and no training row."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from peftlab.assembly import Assembly
from peftlab.assembly.data import data_seed, read_class_labels
from peftlab.data import Rows, label_text, load_rows
from peftlab.errors import DataError

_KEY = "train.self_training.unlabelled"


@dataclasses.dataclass(frozen=True)
class Unlabelled:
    """Rows to label.

    Attributes: known: the right label of each row that has one in its file, only to count with. counts: how many rows there
    are, and how many were left out and why.
    """

    rows: Rows
    known: Sequence[str | None]
    counts: dict[str, int]

    def lines(self) -> Iterator[str]:
        """The counts for a person."""
        c = self.counts
        left = [
            (c["held_out"], "are held-out rows"),
            (c["labelled"], "are training rows"),
            (c["unusable"], "cannot be read"),
        ]
        reasons = ", ".join(f"{count:,} {why}" for count, why in left if count)
        known = sum(label is not None for label in self.known)
        told = f"; {known:,} have a label in the file, which is only used to count right ones" if known else ""
        yield f"unlabelled: {c['kept']:,} of {c['rows']:,} rows" + (f" ({reasons}; left out)" if reasons else "") + told


def find_unlabelled(assembly: Assembly) -> Unlabelled:
    """Reads the rows of ``train.self_training.unlabelled``. Rows with exactly the tokens, or the image, of a held-out row or of
    a training row are left out. Raises: DataError."""
    recipe = assembly.recipe
    settings, data = recipe.train.self_training, recipe.data
    assert settings is not None
    rows = load_rows(
        settings.unlabelled,
        key=_KEY,
        format=data.format,
        encoding=data.encoding,
        column_names=data.column_names,
        delimiter=data.delimiter,
        subset=data.subset,
        seed=data_seed(recipe),
        classes_from_folders=True,
    )
    try:
        unusable = assembly.task.unusable(rows)
    except DataError as error:
        raise DataError(str(error), key=_KEY) from None
    usable = rows.select([i for i in range(len(rows)) if i not in unusable])
    encoded = assembly.task.encode(
        usable,
        max_length=assembly.limit,
        too_long=_without_error(data.too_long),
        training=False,
        labelled=False,
        keep=False,
    )
    held_out = {own for own, _ in encoded.ledger.shared_with(assembly.held_out.ledger)}
    labelled = {own for own, _ in encoded.ledger.shared_with(assembly.train.ledger)} - held_out
    readable = encoded.ledger.kept_rows.tolist()
    kept = [i for i in readable if i not in held_out | labelled]
    counts = {
        "rows": len(rows),
        "held_out": len(held_out),
        "labelled": len(labelled),
        "unusable": len(rows) - len(readable),
        "kept": len(kept),
    }
    if not kept:
        raise DataError(f"{rows.name}: no row is left that is no held-out and no training row", key=_KEY)
    chosen = usable.select(kept)
    return Unlabelled(chosen, _known_labels(assembly, chosen), counts)


def _without_error(too_long: str) -> str:
    """Rows that are too long are left out rather than refused."""
    return "drop" if too_long == "error" else too_long


def _known_labels(assembly: Assembly, rows: Rows) -> list[str | None]:
    """The label of each row in its file; None if there is none."""
    column = assembly.recipe.data.columns.get("label", "label")
    if column not in rows.columns:
        return [None] * len(rows)
    labelled = [i for i, value in enumerate(rows.columns[column]) if label_text(value)]
    known: list[str | None] = [None] * len(rows)
    for i, name in zip(
        labelled, read_class_labels(assembly.recipe, rows.select(labelled), all_names_used=False), strict=True
    ):
        known[i] = name
    return known


def joined_rows(first: Rows, second: Rows, labels: Mapping[str, Sequence[Any]]) -> Rows:
    """The rows of both, with the columns of ``first`` that ``second`` has too, and the ``labels`` of the second's rows."""
    columns = {
        name: [*values, *labels.get(name, second.columns.get(name, ()))]
        for name, values in first.columns.items()
        if name in labels or name in second.columns
    }
    digest = hashlib.sha256(repr((first.fingerprint, second.fingerprint, second.positions.tolist())).encode())
    return Rows(
        name=first.name,
        columns=columns,
        fingerprint=digest.hexdigest(),
        origins=(*first.origins, *second.origins),
        origin_index=np.concatenate([first.origin_index, second.origin_index + len(first.origins)]),
        positions=np.concatenate([first.positions, second.positions]),
        left_out=first.left_out,
        class_names=first.class_names,
    )
