"""Turns the bytes of a file into columns and the position of each row.

The content decides the format; the file ending decides where the content allows several.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

from peftlab.data.catalogues import read_po
from peftlab.data.columnar import read_columnar
from peftlab.data.conll import looks_like_conll, read_conll
from peftlab.data.delimited import delimiter_of_a_table, read_csv, read_tsv
from peftlab.data.encodings import codec_name, decode, may_be_odd
from peftlab.data.json_tables import looks_like_json, read_json
from peftlab.data.rows import Note
from peftlab.data.table import Options, Table, choose_split, split_in_name
from peftlab.errors import DataError

ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".conll": "conll",
    ".conllu": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".py": "text",
    ".po": "po",
    ".pot": "po",
}
FORMATS = ("csv", "tsv", "json", "jsonl", "text", "document", "conll", "po", "parquet", "arrow")
_ZIP = b"PK\x03\x04"
_PACKED = (".gz", ".bz2", ".xz", ".zip")
_COLUMNAR = {b"PAR1": "parquet", b"ARROW1": "arrow", b"FEA1": "arrow", b"\xff\xff\xff\xff": "arrow"}
# Text files that may hold a table; notes and programs do not.
_PLAIN_ENDINGS = (".txt", ".text")
_OTHER_FILES = {
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file; save the sheet as csv",
    b"SQLite format 3": "an SQLite database; export the table as csv",
    b"%PDF": "a PDF; extract its text",
    b"\x80\x04": "a pickle, which can run code when it is loaded; save the table as parquet or csv",
    b"\x80\x05": "a pickle, which can run code when it is loaded; save the table as parquet or csv",
    b"\x93NUMPY": "a numpy array; save the table as parquet or csv",
    b"\xde\x12\x04\x95": "a compiled gettext catalogue; name the .po file that it was made from",
    b"\x95\x04\x12\xde": "a compiled gettext catalogue; name the .po file that it was made from",
    b"version https://git-lfs": "a pointer of Git LFS and not the file itself; fetch it with git lfs pull",
}
_WEB_PAGE = (b"<!doctype html", b"<html")
# Files that describe others, as the start of their names.
_ABOUT_STEMS = ("readme", "license", "licence", "changelog")


def format_of(name: str) -> str | None:
    """The format that a file ending stands for, also before ``.gz`` and the like; None: unknown ending."""
    return ENDINGS.get(PurePosixPath(_unpacked_name(name.lower())).suffix)


def is_data_file(name: str) -> bool:
    """Whether a file of a folder is read: a known ending, or an archive."""
    return format_of(name) is not None or PurePosixPath(name.lower()).suffix == ".zip"


def read_table(raw: bytes, path: Path, options: Options) -> Table:
    """The table in ``raw``, the content of the file at ``path``, decompressed here.

    Raises: DataError: damaged or empty file, unknown format, wrong encoding, or an option that does not apply.
    """
    codec_name(options.encoding)
    raw, name, notes, splits = _unpacked(raw, path, options)
    if options.format == "auto":
        _refuse_other_files(raw, path, name, options)
    format_name = next((known for magic, known in _COLUMNAR.items() if raw.startswith(magic)), None)
    if format_name is None and options.format in ("parquet", "arrow"):
        format_name = options.format
    if format_name is None and options.format == "auto" and format_of(name) in ("parquet", "arrow"):
        format_name = format_of(name)
    if format_name is not None:
        _require_columnar(path, format_name, options)
        table = read_columnar(raw, path, format_name, options)
    else:
        table = _read_text_file(raw, path, name, options)
    if len(table.positions) == 0:
        raise DataError(f"{path} has no rows", key=options.key)
    if not table.columns:
        raise DataError(f"{path} has no columns: its records are empty", key=options.key)
    if options.split is not None and not (splits or table.splits):
        raise DataError(f"{path} holds one table without a name; remove ':{options.split}'", key=options.key)
    return table._replace(notes=(*notes, *table.notes))


def _refuse_other_files(raw: bytes, path: Path, name: str, options: Options) -> None:
    what = next((what for magic, what in _OTHER_FILES.items() if raw.startswith(magic)), None)
    if what is None and format_of(name) != "text" and raw[:100].lstrip().lower().startswith(_WEB_PAGE):
        what = "a web page, such as that of a failed download; get the file itself"
    if what is not None:
        raise DataError(f"{path} is {what}", key=options.key)


def _require_columnar(path: Path, format_name: str, options: Options) -> None:
    """Raises DataError for an option that does not apply to a file whose format is ``format_name``."""
    if options.format not in ("auto", format_name):
        raise DataError(f"{path} is {format_name}, not {options.format}; remove data.format", key="data.format")
    if codec_name(options.encoding) != "utf-8":
        raise DataError(f"{path} is {format_name}, whose text is always utf-8", key="data.encoding")
    _require_no_csv_options(path, format_name, options)


def _require_no_csv_options(path: Path, format_name: str, options: Options) -> None:
    for key, what, value in (
        ("data.column_names", "column names apply to csv and tsv only", options.column_names),
        ("data.delimiter", "a delimiter applies to csv only", options.delimiter),
    ):
        if value is not None and not (format_name == "tsv" and key == "data.column_names"):
            raise DataError(f"{path} is read as {format_name}; {what}", key=key)


def _read_text_file(raw: bytes, path: Path, name: str, options: Options) -> Table:
    text, notes = decode(raw, path, encoding=options.encoding, key=options.key)
    named, format_name = format_of(name), options.format
    if format_name == "auto":
        format_name = _format_of_text(text, path, name, options)
        if named is not None and format_name != named and {named, format_name} != {"json", "jsonl"}:
            notes.append(Note("format", f"{path} is read as {format_name}, which is what it contains", "data.format"))
    if format_name != "csv":
        _require_no_csv_options(path, format_name, options)
    table = _TEXT_READERS[format_name](text, path, options)
    return table._replace(notes=(*notes, *table.notes), may_be_odd=may_be_odd(text))


def _format_of_text(text: str, path: Path, name: str, options: Options) -> str:
    """The format of a text: that of the file ending unless the content is another one."""
    named, suffix = format_of(name), PurePosixPath(_unpacked_name(name.lower())).suffix
    if named in ("csv", "tsv"):
        if options.delimiter is not None:
            return "csv"
        if looks_like_json(text):
            return "jsonl"
        if looks_like_conll(text):
            return "conll"
        first = text.lstrip("\n").split("\n", 1)[0]
        return "csv" if named == "tsv" and "\t" not in first and delimiter_of_a_table(text) else named
    if named in ("json", "jsonl"):
        starts = text.lstrip()[:1]
        return "csv" if starts not in ("", "{", "[") and delimiter_of_a_table(text) else named
    if named == "conll":
        return "jsonl" if looks_like_json(text) else named
    if named is None or suffix in _PLAIN_ENDINGS:
        if looks_like_json(text):
            return "jsonl"
        if options.delimiter is None and looks_like_conll(text):
            return "conll"
        if options.delimiter is not None or delimiter_of_a_table(text):
            return "csv"
    if named is None:
        raise DataError(
            f"{path}: unknown file ending {PurePosixPath(name).suffix!r}, and its content is no table that peftlab "
            f"recognizes; set data.format to one of {', '.join(FORMATS)}",
            key="data.format",
        )
    return named


def _unpacked_name(name: str) -> str:
    return name.removesuffix(PurePosixPath(name).suffix) if PurePosixPath(name).suffix in _PACKED else name


def _unpacked(raw: bytes, path: Path, options: Options) -> tuple[bytes, str, list[Note], tuple[str, ...]]:
    """``(content, file name, notes, splits)`` of a compressed file, or of one file in an archive."""
    name, notes, splits = path.name, list[Note](), tuple[str, ...]()
    if raw.startswith(_ZIP):
        raw, name, notes, splits = _unzipped(raw, path, options)
        if raw.startswith(_ZIP):
            raise DataError(f"{path} holds an archive or a workbook, {name!r}; unpack it", key=options.key)
    for ending, magic, unpack in (
        (".gz", b"\x1f\x8b", gzip.decompress),
        (".bz2", b"BZh", bz2.decompress),
        (".xz", b"\xfd7zXZ", lzma.decompress),
    ):
        if raw.startswith(magic) or name.lower().endswith(ending):
            try:
                raw = unpack(raw)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as exc:
                says = "ends with" if name.lower().endswith(ending) else "is compressed like"
                raise DataError(f"{path} {says} {ending} but cannot be decompressed: {exc}", key=options.key) from None
    if raw[257:262] == b"ustar":
        raise DataError(f"{path} is a tar archive; unpack it and name the folder or the file in it", key=options.key)
    return raw, name, notes, splits


def _unzipped(raw: bytes, path: Path, options: Options) -> tuple[bytes, str, list[Note], tuple[str, ...]]:
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            if "xl/workbook.xml" in archive.namelist():
                raise DataError(f"{path} is an Excel workbook; save the sheet as csv", key=options.key)
            members = [info.filename for info in archive.infolist() if not info.is_dir() and _is_visible(info.filename)]
            members = _tables_among(members) or [m for m in members if is_data_file(m)] or members
            if not members:
                raise DataError(f"{path} holds no file", key=options.key)
            if len(members) > 1 and options.split is None and all(format_of(m) == "text" for m in members):
                raise DataError(
                    f"{path} holds {len(members):,} text files; unpack it and name the folder", key=options.key
                )
            by_split: dict[str, list[str]] = {}
            for member in members:
                by_split.setdefault(split_in_name(PurePosixPath(member).stem) or member, []).append(member)
            twice = next((files for files in by_split.values() if len(files) > 1), None)
            if twice or options.split in members:
                by_split = {member: [member] for member in members}
            split, notes = choose_split(by_split, path, options) if len(members) > 1 else (next(iter(by_split)), [])
            member = by_split[split][0]
            content = archive.read(member)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as exc:
        raise DataError(f"{path} cannot be unpacked: {exc}", key=options.key) from None
    return content, PurePosixPath(member).name, notes, tuple(by_split) if len(members) > 1 else ()


def _tables_among(members: list[str]) -> list[str]:
    """The files of an archive that are read beside a table: none that only describes it. Empty without a table."""
    if all(format_of(m) in (None, "text") for m in members):
        return []
    return [m for m in members if is_data_file(m) and not (format_of(m) == "text" and is_about(PurePosixPath(m).stem))]


def is_about(stem: str) -> bool:
    """Whether a file of this name describes others, such as README."""
    return stem.lower().startswith(_ABOUT_STEMS)


def _is_visible(member: str) -> bool:
    return not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(member).parts)


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


def _read_document(text: str, path: Path, options: Options) -> Table:
    """The whole file as one row, in the column ``text``; an empty file is a row without text, see data.empty."""
    lines = text.split("\n")
    start = next((i for i, line in enumerate(lines) if line.strip()), 0)
    body = "\n".join(line.removesuffix("\r") for line in lines[start:]).rstrip()
    return Table({"text": [body]}, np.array([start + 1], dtype=np.int64), "line")


_TEXT_READERS: dict[str, Callable[[str, Path, Options], Table]] = {
    "csv": read_csv,
    "tsv": read_tsv,
    "json": lambda text, path, options: read_json(text, path, options, lines=False),
    "jsonl": lambda text, path, options: read_json(text, path, options, lines=True),
    "text": _read_text,
    "conll": read_conll,
    "po": read_po,
    "document": _read_document,
}
