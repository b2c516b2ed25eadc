"""One reader per file format: turns bytes into columns and the position of each row.

Each reader reports the first problem in the file with ``file:line`` (or record).
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from peftlab.data.rows import IntArray
from peftlab.errors import DataError


class Table(NamedTuple):
    """Columns of N values each, and [N] the 1-based line or record number of each row in its file."""

    columns: dict[str, list[Any]]
    positions: IntArray
    unit: Literal["line", "record"]


class Options(NamedTuple):
    """How to read a file; ``key`` is the recipe key that named it."""

    key: str
    encoding: str = "utf-8"
    column_names: tuple[str, ...] | None = None


def read_table(raw: bytes, path: Path, format_name: str, options: Options) -> Table:
    """The table in ``raw``, the content of the file at ``path`` (decompressed here if it ends with .gz).

    Raises: DataError: damaged or empty file, wrong encoding, or an option that does not apply to this format.
    """
    codec = _codec_name(options.encoding)
    if options.column_names is not None and format_name not in ("csv", "tsv"):
        raise DataError(
            f"{path} is read as {format_name}; column names apply to csv and tsv only", key="data.column_names"
        )
    if path.name.lower().endswith(".gz"):
        raw = _gunzip(raw, path, options)
    if format_name == "parquet":
        if codec != "utf-8":
            raise DataError(f"{path} is parquet, whose text is always utf-8", key="data.encoding")
        table = _read_parquet(raw, path, options)
    else:
        table = _TEXT_READERS[format_name](_decode(raw, codec, path, options), path, options)
    if len(table.positions) == 0:
        raise DataError(f"{path} has no rows", key=options.key)
    if not table.columns:
        raise DataError(f"{path} has no columns: its records are empty", key=options.key)
    return table


def _gunzip(raw: bytes, path: Path, options: Options) -> bytes:
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as exc:
        raise DataError(f"{path} ends with .gz but cannot be decompressed: {exc}", key=options.key) from None


def _codec_name(encoding: str) -> str:
    """The standard name of a text encoding; utf-8-sig becomes utf-8, because a byte order mark is always removed."""
    try:
        codec = codecs.lookup(encoding).name
        "".encode(codec)  # fails for codecs that are not text encodings, such as hex and rot13
    except (LookupError, ValueError):
        raise DataError(
            f"unknown text encoding {encoding!r}; examples are utf-8, latin-1, cp1252 and utf-16",
            key="data.encoding",
        ) from None
    return "utf-8" if codec == "utf-8-sig" else codec


def _decode(raw: bytes, codec: str, path: Path, options: Options) -> str:
    """The text of the file without a byte order mark; CR line ends of old Macs become LF."""
    try:
        text = raw.decode(codec).removeprefix("\ufeff")
    except UnicodeDecodeError as exc:
        raise _undecodable(raw, exc, path, options) from None
    nul = text.find("\0")
    if nul >= 0:
        line = 1 + text.count("\n", 0, nul)
        raise DataError(
            f"{path}:{line}: NUL character at offset {nul}; "
            f"this is a binary file, or text in another encoding than {options.encoding} (utf-16?)",
            key=options.key,
        )
    return text if "\n" in text else text.replace("\r", "\n")


def _undecodable(raw: bytes, exc: UnicodeDecodeError, path: Path, options: Options) -> DataError:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        remedy = "the file starts like utf-16: set data.encoding=utf-16"
    elif b"\0" in raw:
        return DataError(f"{path} is not a text file: it is binary (it contains NUL bytes)", key=options.key)
    else:
        remedy = "set data.encoding=latin-1 (or cp1252), or convert the file to utf-8"
    line = 1 + raw[: exc.start].decode(exc.encoding, errors="replace").count("\n")
    return DataError(
        f"{path}:{line}: not {options.encoding}: byte 0x{raw[exc.start]:02x} at byte offset {exc.start} "
        f"({exc.reason}); {remedy}",
        key="data.encoding",
    )


@contextmanager
def _unlimited_fields() -> Iterator[None]:
    """Lifts the csv module's limit of 128 KiB per field, which is global to the process, and restores it afterwards."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv_records(text: str, path: Path, options: Options) -> Iterator[tuple[int, list[str]]]:
    """(line where the record starts, its fields) of each record that is not a blank line."""
    # StringIO breaks lines at LF only, as editors and grep -n do; CR inside a quoted field is not a new line.
    reader = csv.reader(io.StringIO(text), strict=True)
    line = 1
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as exc:
        reason = str(exc)
        if reason == "unexpected end of data":
            reason = "the quote that opens in this record is never closed"
        elif reason.startswith("new-line character"):
            reason = "carriage return outside quotes"
        raise DataError(f"{path}:{line}: broken csv record: {reason}", key=options.key) from None


def _tsv_records(text: str, path: Path, options: Options) -> Iterator[tuple[int, list[str]]]:
    """Like `_csv_records`; a tab always separates and a quote is a plain character (IANA text/tab-separated-values)."""
    for line, content in enumerate(text.split("\n"), 1):
        content = content.removesuffix("\r")
        if content:
            yield line, content.split("\t")


def _read_csv(text: str, path: Path, options: Options) -> Table:
    with _unlimited_fields():
        return _read_delimited(_csv_records(text, path, options), path, options, "fields that contain a comma, quoted")


def _read_tsv(text: str, path: Path, options: Options) -> Table:
    return _read_delimited(_tsv_records(text, path, options), path, options, "no tab or line break inside a field")


def _read_delimited(records: Iterator[tuple[int, list[str]]], path: Path, options: Options, form: str) -> Table:
    """Columns from records with as many fields as the header or ``options.column_names``."""
    if options.column_names is not None:
        names, source, key = list(options.column_names), "data.column_names", "data.column_names"
    else:
        line, names = next(records, (1, []))
        source, key = f"{path}:{line}", options.key
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{source}: the column name {twice[0]!r} appears more than once", key=key)

    width = len(names)
    rows: list[list[str]] = []
    lines: list[int] = []
    for line, fields in records:
        if len(fields) != width:
            raise DataError(
                f"{path}:{line}: expected {width} fields as in {source} ({', '.join(map(repr, names))}), "
                f"found {len(fields)}; a record needs all its fields, and {form}",
                key=key,
            )
        rows.append(fields)
        lines.append(line)
    columns = {name: list(values) for name, values in zip(names, zip(*rows, strict=True), strict=False)}
    return Table(columns, np.array(lines, dtype=np.int64), "line")


def _read_jsonl(text: str, path: Path, options: Options) -> Table:
    lines: list[int] = []

    def records() -> Iterator[dict[str, Any]]:
        for line, content in enumerate(_lines_of(text), 1):
            if content.strip():
                record = _checked_record(_parse_json(content, line, path, options), f"{path}:{line}", options)
                if _may_hold_half_characters(content):
                    _reject_half_characters(record, f"{path}:{line}", options)
                lines.append(line)
                yield record

    return Table(_columns_of(records()), np.array(lines, dtype=np.int64), "line")


def _lines_of(text: str) -> Iterator[str]:
    """``text.split("\\n")`` without a second copy of the whole text."""
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end]
        start = end + 1
    yield text[start:]


def _read_json(text: str, path: Path, options: Options) -> Table:
    """Records from an array of objects, or from the one list in an object such as ``{"version": 1, "data": [...]}``."""
    content = _parse_json(text, 1, path, options) if text.strip() else []
    if isinstance(content, dict):
        lists = [name for name, value in content.items() if isinstance(value, list)]
        if len(lists) != 1:
            lists_text = f"{len(lists)} lists: {', '.join(map(repr, lists))}" if lists else "no list"
            raise DataError(
                f"{path}: expected an array of objects, or an object with exactly one list in it; "
                f"found an object with {lists_text}",
                key=options.key,
            )
        content = content[lists[0]]
    if not isinstance(content, list):
        raise DataError(f"{path}: expected an array of objects, found {type(content).__name__}", key=options.key)
    records = [_checked_record(r, f"{path}, record {i}", options) for i, r in enumerate(content, 1)]
    if _may_hold_half_characters(text):
        for i, record in enumerate(records, 1):
            _reject_half_characters(record, f"{path}, record {i}", options)
    return Table(_columns_of(records), np.arange(1, len(records) + 1, dtype=np.int64), "record")


def _parse_json(text: str, first_line: int, path: Path, options: Options) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as exc:
        line = first_line + exc.lineno - 1
        raise DataError(f"{path}:{line}: broken JSON at column {exc.colno}: {exc.msg}", key=options.key) from None
    except (ValueError, RecursionError) as exc:  # a number of over 4,300 digits, or nested too deeply
        raise DataError(f"{path}:{first_line}: cannot read this JSON: {exc}", key=options.key) from None


def _checked_record(record: Any, where: str, options: Options) -> dict[str, Any]:
    if isinstance(record, dict):
        return record
    raise DataError(f"{where}: expected an object, found {type(record).__name__}", key=options.key)


def _may_hold_half_characters(text: str) -> bool:
    return "\\ud" in text or "\\uD" in text


def _reject_half_characters(record: dict[str, Any], where: str, options: Options) -> None:
    """JSON can escape half of a surrogate pair (a cut emoji), on which tokenizers would fail much later."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as exc:
        half = f"\\u{ord(exc.object[exc.start]):04x}"
        raise DataError(f"{where}: {half} is half of a surrogate pair, not a character", key=options.key) from None


def _columns_of(records: Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    """Column name -> values; None if a record lacks the key."""
    columns: dict[str, list[Any]] = {}
    for i, record in enumerate(records):
        for name in record:
            if name not in columns:
                columns[name] = [None] * i
        for name, values in columns.items():
            values.append(record.get(name))
    return columns


def _read_text(text: str, path: Path, options: Options) -> Table:
    """One row per paragraph (a block of lines without a blank line), in the column ``text``."""
    paragraphs: list[list[str]] = []
    lines: list[int] = []
    inside = False
    for line, content in enumerate(text.split("\n"), 1):
        content = content.removesuffix("\r")
        blank = not content.strip()
        if not blank and not inside:
            paragraphs.append([])
            lines.append(line)
        if not blank:
            paragraphs[-1].append(content)
        inside = not blank
    return Table({"text": ["\n".join(block) for block in paragraphs]}, np.array(lines, dtype=np.int64), "line")


def _read_parquet(raw: bytes, path: Path, options: Options) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(raw)).read()
    except (pyarrow.ArrowException, OSError) as exc:
        raise DataError(f"{path} is not a readable parquet file: {exc}", key=options.key) from None
    names = table.column_names
    if len(set(names)) != len(names):
        raise DataError(f"{path}: two columns have the same name: {', '.join(map(repr, names))}", key=options.key)
    columns = {name: table.column(name).to_pylist() for name in names}
    return Table(columns, np.arange(1, table.num_rows + 1, dtype=np.int64), "record")


_TEXT_READERS: dict[str, Callable[[str, Path, Options], Table]] = {
    "csv": _read_csv,
    "tsv": _read_tsv,
    "json": _read_json,
    "jsonl": _read_jsonl,
    "text": _read_text,
}
FORMATS = (*_TEXT_READERS, "parquet")
