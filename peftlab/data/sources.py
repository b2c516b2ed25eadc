"""Loads the rows of a data source by its name in a recipe."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import re
import socket
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from peftlab.data.builtin import is_builtin, load_builtin
from peftlab.data.images import IMAGE_ENDINGS
from peftlab.data.readers import FORMATS, Options, Table, read_table
from peftlab.data.rows import Origin, Rows
from peftlab.errors import DataError
from peftlab.paths import PACKAGE_PREFIX, package_path

_ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".py": "text",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_CONNECT_TIMEOUT_S = 5.0


def load_rows(
    name: str,
    *,
    key: str = "data.train",
    format: str = "auto",
    encoding: str = "utf-8",
    column_names: Sequence[str] | None = None,
    subset: str | None = None,
    seed: int = 0,
    default_split: str = "train",
) -> Rows:
    """The rows of a data source.

    A name is one of:

    - a file;
    - a folder: its readable files, also in subfolders, sorted by name. They need the same columns; hidden files are
      skipped. With ``format`` only files with an ending of that format are read, or all if none has one;
    - a folder of images with one subfolder per class (columns ``image``, a path, and ``label``);
    - ``package:IMPORT_NAME/PATH``: a file or folder inside an installed package, which is not imported;
    - ``ID`` or ``ID:SPLIT``: a hub data set;
    - a built-in data set, see ``load_builtin``.

    The suffix ``#500`` draws 500 rows with ``seed`` and keeps their order. An existing file or folder of exactly this
    name always wins.

    The ending determines the format, also before ``.gz``. csv (quotes, RFC 4180) and tsv (no quotes) need a header or
    ``column_names``; their values are text. json: an array of objects, or an object with exactly one list in it.
    jsonl: one object per line. A missing key is None. text: one row per paragraph (a block of lines between blank
    lines), not per file or line, in the column ``text``. Hub columns come as stored: class labels are numbers.

    Args:
        key: the recipe key that holds ``name``, for the errors.
        format: csv, tsv, json, jsonl, parquet or text; ``auto``: by the file ending.
        encoding: encoding of text files; a byte order mark is removed.
        column_names: for csv and tsv files without a header, whose first line is data.
        subset: the configuration of a hub data set.
        seed: seed of the ``#500`` sample.
        default_split: split of a hub data set without ``:SPLIT``.

    Raises: DataError: something is missing, empty or broken, or an argument has no effect on this source.
    """
    if format != "auto" and format not in FORMATS:
        raise DataError(f"unknown format {format!r}; expected auto, {', '.join(FORMATS)}", key="data.format")
    base, num_sampled = _split_sample_size(name, key)
    path = _local_path(base, key)
    if is_builtin(base) and not os.path.exists(path):
        _refuse(base, format=format, column_names=column_names, encoding=encoding, subset=subset)
        rows = dataclasses.replace(load_builtin(base, key=key), name=name)
    elif os.path.exists(path) or _is_meant_as_file(base) or format != "auto":
        if subset is not None:
            raise DataError(f"{base!r} is a file or folder; only hub data sets have subsets", key="data.subset")
        rows = _load_local(name, path, base, key, format, encoding, column_names)
    else:
        if column_names is not None:
            raise DataError(f"{base!r} is a hub data set, which has its own column names", key="data.column_names")
        if encoding.lower() not in ("utf-8", "utf8"):
            raise DataError(f"{base!r} is a hub data set, whose text is always utf-8", key="data.encoding")
        rows = _load_hub(name, base, key, subset, default_split)
    if num_sampled is None:
        return rows
    if num_sampled > len(rows):
        raise DataError(f"{name!r} asks for {num_sampled} rows, but there are only {len(rows)}", key=key)
    chosen = np.random.default_rng(seed).choice(len(rows), size=num_sampled, replace=False)
    return rows.select(np.sort(chosen))


def _refuse(base: str, *, format: str, column_names: Sequence[str] | None, encoding: str, subset: str | None) -> None:
    """Raises DataError for an argument that has no effect on a built-in data set."""
    given = {
        "format": format != "auto",
        "column_names": column_names is not None,
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
    if not base or not re.fullmatch(r"[1-9][0-9]{0,17}", count):
        raise DataError(
            f"{name!r}: expected a number of rows to sample after '#', 1 or more, as in NAME#500; found {count!r} "
            "(and no file has this whole name)",
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


def _format_of(path: Path) -> str | None:
    """The format of the file ending (before ``.gz``); None: unknown ending."""
    return _ENDINGS.get(Path(path.name.lower().removesuffix(".gz")).suffix)


def _is_meant_as_file(name: str) -> bool:
    """Whether a missing name can only be a file: hub ids have none of these forms."""
    looks_local = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1
    return looks_local or _format_of(Path(name)) is not None


def _load_local(
    name: str,
    path: Path,
    shown: str,
    key: str,
    format: str,
    encoding: str,
    column_names: Sequence[str] | None,
) -> Rows:
    if path.is_dir() and format == "auto" and (images := _images_in(path)):
        return _load_images(name, path, images, key)
    if path.is_dir():
        files = _files_in(path, format, key)
    elif path.is_file():
        files = [path]
    else:
        raise _no_such_file(path, shown, key)
    options = Options(key, encoding, None if column_names is None else tuple(column_names))
    digest = hashlib.sha256()
    tables: list[Table] = []
    for file in files:
        file_format = _format_of(file) if format == "auto" else format
        if file_format is None:
            raise DataError(
                f"{file}: unknown file ending {file.suffix!r}; set data.format to one of {', '.join(FORMATS)}",
                key="data.format",
            )
        try:
            raw = file.read_bytes()
        except OSError as exc:
            raise DataError(f"{file} cannot be read: {exc.strerror}", key=key) from None
        digest.update(raw)
        tables.append(read_table(raw, file, file_format, options))
        _require_same_columns(tables, files, key)

    return Rows(
        name=name,
        columns={column: _joined([table.columns[column] for table in tables]) for column in tables[0].columns},
        fingerprint=digest.hexdigest(),
        origins=tuple(Origin(str(file), table.unit) for file, table in zip(files, tables, strict=True)),
        origin_index=np.repeat(np.arange(len(tables)), [len(table.positions) for table in tables]),
        positions=np.concatenate([table.positions for table in tables]),
    )


def _images_in(folder: Path) -> list[Path]:
    """The images in subfolders of ``folder``; none if it contains tables, which may name the images."""
    files = _visible(folder)
    if any(_format_of(path) not in (None, "text") for path in files):
        return []
    return [p for p in files if p.suffix.lower() in IMAGE_ENDINGS and len(p.relative_to(folder).parts) > 1]


def _load_images(name: str, folder: Path, images: list[Path], key: str) -> Rows:
    labels = [path.relative_to(folder).parts[0] for path in images]
    digest = hashlib.sha256()
    for path in images:
        try:
            digest.update(
                f"{path.relative_to(folder).as_posix()}\0".encode() + hashlib.sha256(path.read_bytes()).digest()
            )
        except OSError as exc:
            raise DataError(f"{path} cannot be read: {exc.strerror}", key=key) from None
    return Rows(
        name=name,
        columns={"image": [str(path.absolute()) for path in images], "label": list(labels)},
        fingerprint=digest.hexdigest(),
        origins=tuple(Origin(str(path), "record") for path in images),
        origin_index=np.arange(len(images)),
        positions=np.ones(len(images), dtype=np.int64),
    )


def _joined(parts: list[list[object]]) -> list[object]:
    return parts[0] if len(parts) == 1 else [value for part in parts for value in part]


def _require_same_columns(tables: list[Table], files: list[Path], key: str) -> None:
    """Raises DataError unless the newest table has the column names of the first, in any order."""
    first, newest = tables[0].columns, tables[-1].columns
    if first.keys() != newest.keys():
        raise DataError(
            f"{files[len(tables) - 1]} has the columns {', '.join(map(repr, newest))}, but {files[0]} has "
            f"{', '.join(map(repr, first))}; all files of a folder need the same columns",
            key=key,
        )


def _visible(folder: Path) -> list[Path]:
    """All files in and below ``folder``, sorted by name, without hidden ones."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _files_in(folder: Path, format: str, key: str) -> list[Path]:
    files = _visible(folder)
    readable = [path for path in files if _format_of(path) is not None and format in ("auto", _format_of(path))]
    if format != "auto" and not readable:
        readable = files
    if not readable:
        raise DataError(f"the folder {folder} has no file with a known ending: {', '.join(_ENDINGS)}", key=key)
    return readable


def _no_such_file(path: Path, shown: str, key: str) -> DataError:
    folder = path.parent
    if not folder.is_dir():
        return DataError(f"{shown!r}: no such file, and the folder {folder} does not exist", key=key)
    near = difflib.get_close_matches(path.name, os.listdir(folder), n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return DataError(f"{shown!r}: no such file in the folder {folder.absolute()}{hint}", key=key)


def _load_hub(name: str, base: str, key: str, subset: str | None, default_split: str) -> Rows:
    hub_id, _, split = base.partition(":")
    if not _HUB_ID.fullmatch(hub_id):
        raise DataError(f"{base!r} is not an existing file or folder, nor a valid hub data set id", key=key)
    if os.path.exists(hub_id):
        raise DataError(f"{base!r}: {hub_id!r} is a local file or folder; only hub data sets have splits", key=key)
    import datasets

    split = split or default_split
    tried = f"{base!r} is not a local file or folder; looked for hub data set {hub_id!r}, split {split!r}"
    advice = "files, folders and package:IMPORT_NAME/PATH work without network"
    offline = datasets.config.HF_HUB_OFFLINE
    if not offline and (reason := _why_unreachable(datasets.config.HF_ENDPOINT)):
        raise DataError(
            f"{tried}; {datasets.config.HF_ENDPOINT} cannot be reached ({reason}); {advice}, "
            "and so does a cached hub data set with HF_HUB_OFFLINE=1",
            key=key,
        )
    try:
        table = datasets.load_dataset(hub_id, subset, split=split)
    except Exception as exc:  # datasets, huggingface_hub, httpx and pyarrow raise too many types to list
        offline_note = "; HF_HUB_OFFLINE=1 allows only cached data sets" if offline else ""
        raise DataError(f"{tried}; {type(exc).__name__}: {exc}{offline_note}; {advice}", key=key) from exc
    if len(table) == 0:
        raise DataError(f"the split {split!r} of the hub data set {hub_id!r} has no rows", key=key)
    return Rows(
        name=name,
        columns=table.to_dict(),
        fingerprint=table._fingerprint,
        origins=(Origin(f"{hub_id}:{split}", "record"),),
        origin_index=np.zeros(len(table), dtype=np.int64),
        positions=np.arange(1, len(table) + 1),
    )


def _why_unreachable(endpoint: str) -> str | None:
    """Why the hub (or the proxy to it) is unreachable; None: it is reachable.

    ``datasets`` itself makes six attempts with pauses first: 23 s without DNS, minutes behind a firewall.
    """
    target = urlsplit(endpoint)
    if not urllib.request.proxy_bypass(target.hostname or ""):
        proxies = urllib.request.getproxies()
        proxy = proxies.get(target.scheme) or proxies.get("all")
        target = urlsplit(proxy) if proxy else target
    port = target.port or (80 if target.scheme == "http" else 443)
    try:
        socket.create_connection((target.hostname, port), timeout=_HUB_CONNECT_TIMEOUT_S).close()
    except OSError as exc:
        return str(exc)
    return None
