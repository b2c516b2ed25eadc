"""Loads the rows of a data source by its name in a recipe."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peftlab.data.builtin import is_builtin, load_builtin
from peftlab.data.encodings import codec_name, decode, odd_character_notes
from peftlab.data.folders import Contents, contents_of
from peftlab.data.hub import load_hub
from peftlab.data.readers import FORMATS, format_of, read_table
from peftlab.data.rows import Note, Origin, Rows
from peftlab.data.table import Options, Table
from peftlab.errors import DataError, listed
from peftlab.paths import PACKAGE_PREFIX, package_path

_SPLIT = re.compile(r"[^:\[\]#]+")
_PER_CLASS = re.compile(r"([1-9][0-9]{0,17})-per-class")


def load_rows(
    name: str,
    *,
    key: str = "data.train",
    format: str = "auto",
    encoding: str = "utf-8",
    column_names: Sequence[str] | None = None,
    delimiter: str | None = None,
    subset: str | None = None,
    seed: int = 0,
    default_split: str | None = "train",
    classes_from_folders: bool = False,
) -> Rows:
    """The rows of a data source.

    A name is one of:

    - a file, also compressed (gz, bz2, xz) or in a zip;
    - a folder: its readable files, also in subfolders, sorted by name. They need the same columns; hidden files are
      skipped. With ``format`` only files with an ending of that format are read, or all if none has one;
    - a folder that ``save_to_disk`` of ``datasets`` wrote;
    - a folder of images with one subfolder per class (columns ``image``, a path, and ``label``), or of texts with
      ``classes_from_folders`` (columns ``text`` and ``label``);
    - a folder of images in ``images`` and masks of the same names in ``masks`` (columns ``image`` and ``mask``);
    - ``package:IMPORT_NAME/PATH``: a file or folder inside an installed package, which is not imported;
    - ``ID`` or ``ID:SPLIT``: a hub data set;
    - a built-in data set, see ``load_builtin``.

    ``FILE:SPLIT`` reads one of several tables in a file or folder: a list in a JSON object, a saved split, files or
    folders named after splits, a file in a zip. Without it, ``default_split`` is read, and a note says so.

    The suffix ``#500`` draws 500 rows with ``seed`` and keeps their order; who knows the classes draws ``#8-per-class``, see
    ``split_per_class``. An existing file or folder of exactly this
    name always wins.

    The content determines the format; the ending decides only where the content allows several. csv (quotes, RFC 4180)
    and tsv (no quotes) need a header or ``column_names``; their values are text. json and jsonl: an array of objects,
    one object per line, objects one after the other, one list per column, or an object with one of these in it. A
    missing key is None. text: one row per paragraph (a block of lines between blank lines), not per file or line, in
    the column ``text``. document: one row per file. conll: see ``read_conll``. Numbers of a class column whose names the file
    carries become these names.

    Args:
        key: the recipe key that holds ``name``, for the errors.
        format: csv, tsv, json, jsonl, parquet, arrow, text, document, conll or po (gettext catalogues); ``auto``: by content.
        encoding: encoding of text files; a byte order mark is removed, and decides if it names another one.
        column_names: for csv and tsv files without a header, whose first line is data.
        delimiter: field separator of csv files; None: found from the file.
        subset: the configuration of a hub data set.
        seed: seed of the ``#500`` sample.
        default_split: split without ``:SPLIT``; None: it must be named where there are several.
        classes_from_folders: a folder of texts gives one row per file, and its subfolders are classes.

    Raises: DataError: something is missing, empty or broken, or an argument has no effect on this source.
    """
    if format != "auto" and format not in FORMATS:
        raise DataError(f"unknown format {format!r}; expected auto, {', '.join(FORMATS)}", key="data.format")
    base, num_sampled = _split_sample_size(name, key)
    local = _local_split(base, key)
    if is_builtin(base) and (local is None or not local[0].exists()):
        _refuse(base, format=format, column_names=column_names, delimiter=delimiter, encoding=encoding, subset=subset)
        rows = dataclasses.replace(load_builtin(base, key=key), name=name)
    elif local is not None or base.startswith(PACKAGE_PREFIX) or _is_meant_as_file(base) or format != "auto":
        if subset is not None:
            raise DataError(f"{base!r} is a file or folder; only hub data sets have subsets", key="data.subset")
        path, split = local or (_local_path(base, key), None)
        names = None if column_names is None else tuple(column_names)
        options = Options(key, format, encoding, names, delimiter, split, default_split, classes_from_folders)
        rows = _load_local(name, path, base, options)
    else:
        for setting, what in (("column_names", column_names), ("delimiter", delimiter)):
            if what is not None:
                raise DataError(f"has no effect on the hub data set {base!r}; remove it", key=f"data.{setting}")
        if codec_name(encoding) != "utf-8":
            raise DataError(f"{base!r} is a hub data set, whose text is always utf-8", key="data.encoding")
        rows = load_hub(name, base, key, subset, default_split or "train")
    if num_sampled is None:
        return rows
    if num_sampled > len(rows):
        raise DataError(f"{name!r} asks for {num_sampled} rows, but there are only {len(rows)}", key=key)
    chosen = np.random.default_rng(seed).choice(len(rows), size=num_sampled, replace=False)
    return rows.select(np.sort(chosen))


def split_per_class(name: str, *, key: str) -> tuple[str, int | None]:
    """``NAME#8-per-class`` -> (NAME, 8); any other name, or that of an existing file -> (name, None)."""
    base, _, count = name.rpartition("#")
    match = _PER_CLASS.fullmatch(count) if base and not _exists(name, key) else None
    return (name, None) if match is None else (base, int(match[1]))


def _local_split(base: str, key: str) -> tuple[Path, str | None] | None:
    """``(path, split)`` of ``PATH`` or ``PATH:SPLIT`` if the path exists, or if it can only be a file."""
    if _exists(base, key):
        return _local_path(base, key), None
    head, _, split = base.rpartition(":")
    if head and _SPLIT.fullmatch(split) and (_exists(head, key) or _is_meant_as_file(head)):
        return _local_path(head, key), split
    return None


def _refuse(
    base: str,
    *,
    format: str,
    column_names: Sequence[str] | None,
    delimiter: str | None,
    encoding: str,
    subset: str | None,
) -> None:
    """Raises DataError for an argument that has no effect on a built-in data set."""
    given = {
        "format": format != "auto",
        "column_names": column_names is not None,
        "delimiter": delimiter is not None,
        "encoding": encoding.lower() not in ("utf-8", "utf8"),
        "subset": subset is not None,
    }
    for name, is_given in given.items():
        if is_given:
            raise DataError(f"has no effect on the built-in data {base!r}; remove it", key=f"data.{name}")


def _split_sample_size(name: str, key: str) -> tuple[str, int | None]:
    """``NAME#500`` -> (NAME, 500); a name without ``#``, or the name of an existing file -> (name, None)."""
    if not name.strip():
        raise DataError("the name of the data is empty", key=key)
    if "#" not in name or _exists(name, key):
        return name, None
    base, _, count = name.rpartition("#")
    if base and _PER_CLASS.fullmatch(count):
        raise DataError(
            f"{name!r}: rows here have no class, so there is nothing to draw per class; use NAME#500", key=key
        )
    if not base or not re.fullmatch(r"[1-9][0-9]{0,17}", count):
        raise DataError(
            f"{name!r}: expected a number of rows to sample after '#', 1 or more, as in NAME#500 or, of each class, "
            f"NAME#8-per-class; found {count!r} (and no file has this whole name)",
            key=key,
        )
    return base, int(count)


def _exists(name: str, key: str) -> bool:
    try:
        return os.path.exists(_local_path(name, key))
    except DataError:
        return False


def _local_path(name: str, key: str) -> Path:
    """The path of a local source with this name, which need not exist (for ``package:`` a missing one is an error)."""
    if name.startswith(PACKAGE_PREFIX):
        return package_path(name, key=key, error=DataError)
    return Path(os.path.expanduser(name))  # unlike Path.expanduser, leaves the home of an unknown user as it is


def _is_meant_as_file(name: str) -> bool:
    """Whether a missing name can only be a file: hub ids have none of these forms."""
    looks_local = name.startswith((".", "/", "~")) or _is_pattern(name) or name.endswith("/") or name.count("/") > 1
    return looks_local or format_of(name.rpartition("/")[2]) is not None


def _is_pattern(name: str) -> bool:
    return "*" in name or "?" in name


def _load_local(name: str, path: Path, shown: str, options: Options) -> Rows:
    if path.is_dir():
        found = contents_of(path, options)
        if found.split_taken:
            options = options._replace(split=None)
    elif path.is_file():
        found = Contents([path])
    else:
        raise _no_such_file(path, shown, options.key)
    is_tables = found.kind == "tables"
    rows = _load_tables(name, found.files, options) if is_tables else _load_single_rows(name, path, found, options)
    return dataclasses.replace(rows, notes=(*found.notes, *rows.notes))


def _load_tables(name: str, files: Sequence[Path], options: Options) -> Rows:
    digest = hashlib.sha256()
    tables: list[Table] = []
    for file in files:
        raw = _bytes_of(file, options.key)
        digest.update(raw)
        tables.append(read_table(raw, file, options))
        _require_same_columns(tables, files, options.key)
    rows = Rows(
        name=name,
        columns={column: _joined([table.columns[column] for table in tables]) for column in tables[0].columns},
        fingerprint=digest.hexdigest(),
        origins=tuple(Origin(str(file), table.unit) for file, table in zip(files, tables, strict=True)),
        origin_index=np.repeat(np.arange(len(tables)), [len(table.positions) for table in tables]),
        positions=np.concatenate([table.positions for table in tables]),
        class_names=tables[0].class_names,
        notes=tuple(note for table in tables for note in table.notes),
    )
    return _with_odd_characters(rows, options) if any(table.may_be_odd for table in tables) else rows


def _with_odd_characters(rows: Rows, options: Options) -> Rows:
    return dataclasses.replace(rows, notes=(*rows.notes, *odd_character_notes(rows, encoding=options.encoding)))


def _load_single_rows(name: str, folder: Path, found: Contents, options: Options) -> Rows:
    """One row per image or text; the fingerprint is over their paths, which hold the classes, and contents."""
    digest = hashlib.sha256()
    texts: list[Any] = []
    notes: list[Note] = []
    for path in found.files:
        raw = _bytes_of(path, options.key)
        _add_file(digest, folder, path, raw)
        if found.kind == "texts":
            text, noted = decode(raw, path, encoding=options.encoding, key=options.key)
            texts.append(text.strip("\r\n"))
            notes += noted
    columns: dict[str, list[Any]] = (
        {"text": texts} if found.kind == "texts" else {"image": [str(path.absolute()) for path in found.files]}
    )
    if found.labels is not None:
        columns["label"] = list(found.labels)
    if found.masks is not None:
        columns["mask"] = [None if path is None else str(path.absolute()) for path in found.masks]
        for path in (path for path in found.masks if path is not None):
            _add_file(digest, folder, path, _bytes_of(path, options.key))
    count = len(found.files)
    rows = Rows(
        name=name,
        columns=columns,
        fingerprint=digest.hexdigest(),
        origins=tuple(Origin(str(path), "line" if found.kind == "texts" else "record") for path in found.files),
        origin_index=np.arange(count),
        positions=np.ones(count, dtype=np.int64),
        notes=tuple(notes),
    )
    return _with_odd_characters(rows, options) if found.kind == "texts" else rows


def _add_file(digest: Any, folder: Path, path: Path, raw: bytes) -> None:
    digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + hashlib.sha256(raw).digest())


def _bytes_of(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror}", key=key) from None


def _joined(parts: list[list[Any]]) -> list[Any]:
    return parts[0] if len(parts) == 1 else [value for part in parts for value in part]


def _require_same_columns(tables: Sequence[Table], files: Sequence[Path], key: str) -> None:
    """Raises DataError unless the newest table has the column names of the first, in any order."""
    first, newest = tables[0].columns, tables[-1].columns
    if first.keys() != newest.keys():
        raise DataError(
            f"{files[len(tables) - 1]} has the columns {listed(newest)}, but {files[0]} has {listed(first)}; all files of "
            "a folder need the same columns",
            key=key,
        )


def _no_such_file(path: Path, shown: str, key: str) -> DataError:
    folder = path.parent
    if "://" in shown:
        return DataError(f"{shown!r} is an address; download the file and name the local copy", key=key)
    if _is_pattern(shown):
        return DataError(
            f"{shown!r}: patterns are not expanded; name a folder, of which all readable files are read, or one file",
            key=key,
        )
    if not folder.is_dir():
        return DataError(f"{shown!r}: no such file, and the folder {folder} does not exist", key=key)
    near = difflib.get_close_matches(path.name, os.listdir(folder), n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return DataError(f"{shown!r}: no such file in the folder {folder.absolute()}{hint}", key=key)
