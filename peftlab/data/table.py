"""What a reader of a file gets and gives, and the choice among several tables in one source."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from peftlab.data.rows import IntArray, Note
from peftlab.errors import DataError, listed

HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "eval", "evaluation", "test", "testing")
SPLITS = ("train", "training", *HELD_OUT_SPLITS)
_SPLIT_IN_NAME = re.compile(rf"(?:^|[-_.])({'|'.join(SPLITS)})(?:20\d\d)?(?:[-_.]|$)", re.IGNORECASE)


class Table(NamedTuple):
    """Columns of N values each, and [N] the 1-based line or record number of each row in its file.

    ``class_names``, ``notes``: as in ``Rows``. ``splits``: names of the tables in the file, if they have names.
    ``may_be_odd``: False if the file has no characters for ``odd_character_notes``.
    """

    columns: dict[str, list[Any]]
    positions: IntArray
    unit: Literal["line", "record"]
    class_names: Mapping[str, tuple[str, ...]] = {}
    notes: tuple[Note, ...] = ()
    splits: tuple[str, ...] = ()
    may_be_odd: bool = True


class Options(NamedTuple):
    """How to read a source.

    Attributes:
        key: the recipe key that named it.
        format: a format, or ``auto``: by content, with the file ending as a hint.
        delimiter: field separator of csv; None: the one that the file uses.
        split: the table to read if the source holds several. default_split: the table if none is named.
        classes_from_folders: a folder of texts gives one row per file, and its subfolders are classes.
    """

    key: str
    format: str = "auto"
    encoding: str = "utf-8"
    column_names: tuple[str, ...] | None = None
    delimiter: str | None = None
    split: str | None = None
    default_split: str | None = "train"
    classes_from_folders: bool = False


def split_in_name(name: str) -> str | None:
    """The split that a file name such as ``train-00000-of-00001.parquet``, ``my_test.csv`` or ``instances_val2017.json`` has."""
    match = _SPLIT_IN_NAME.search(name)
    return match[1].lower() if match else None


def choose_split(names: Collection[str], source: str | Path, options: Options) -> tuple[str, list[Note]]:
    """The table of ``names`` to read, with a note if the recipe does not name it.

    Raises: DataError: none has the name, or none is named and it is not clear which one is meant.
    """
    if options.split is not None:
        if options.split in names:
            return options.split, []
        raise DataError(f"{source}: no split {options.split!r}; found {listed(names)}", key=options.key)
    if len(names) == 1:
        return next(iter(names)), []
    wanted = {"train": ("train", "training"), None: ()}.get(options.default_split, HELD_OUT_SPLITS)
    chosen = next((name for name in wanted if name in names), None)
    if chosen is None:
        raise DataError(
            f"{source} holds several tables: {listed(names)}; name one, such as {source}:{next(iter(names))}",
            key=options.key,
        )
    held_out = next((name for name in HELD_OUT_SPLITS if name in names), None)
    offer = f"; data.eval={source}:{held_out} evaluates on another" if options.key == "data.train" and held_out else ""
    return chosen, [
        Note("split", f"{source} holds {listed(names)}; {options.key} reads {chosen!r}{offer}", options.key)
    ]
