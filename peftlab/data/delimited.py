"""Reads csv and tsv, and finds the delimiter of a file."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from peftlab.data.rows import Note
from peftlab.data.table import Options, Table
from peftlab.errors import DataError, listed

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
_SEP_LINE = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)  # Excel reads and removes it
_WORD = re.compile(r"[A-Za-z_][\w.-]{0,39}")
_NAME = re.compile(r"[A-Za-z_][\w .-]{0,39}")
_SAMPLE_CHARACTERS = 1 << 16
_SAMPLE_RECORDS = 50


def read_csv(text: str, path: Path, options: Options) -> Table:
    """Columns of a csv file (RFC 4180), with the delimiter that ``options`` names, or the one that the file uses."""
    text, first_line, declared = _without_sep_line(text)
    delimiter = options.delimiter or declared or find_delimiter(text, options) or ","
    form = f"fields that contain a {DELIMITERS.get(delimiter, repr(delimiter))}, quoted"
    if options.delimiter is None:
        form += "; data.delimiter sets another separator"
    notes: tuple[Note, ...] = ()
    if options.delimiter is None and delimiter != ",":
        name = DELIMITERS.get(delimiter, repr(delimiter))
        notes = (Note("delimiter", f"{path} separates fields by {name}", "data.delimiter"),)
    with _unlimited_fields():
        table = _read_records(_csv_records(text, delimiter, first_line, path, options), path, options, form)
    return table._replace(notes=notes)


def read_tsv(text: str, path: Path, options: Options) -> Table:
    """Columns of a tsv file, in which a tab always separates and a quote is a plain character (IANA)."""
    return _read_records(_tsv_records(text), path, options, "no tab or line break inside a field")


def find_delimiter(text: str, options: Options) -> str | None:
    """The delimiter with which the first records have equally many fields, two or more; a comma first.

    None: none has. If records differ for each, a delimiter that the header has, so that the error names the record.
    """
    widths = {delimiter: _widths(text, delimiter) for delimiter in DELIMITERS}
    names = options.column_names
    for delimiter, found in widths.items():
        if len(set(found)) == 1 and found[0] > 1 and (names is None or found[0] == len(names)):
            return delimiter
    if names is None:
        in_header = [delimiter for delimiter, found in widths.items() if found and found[0] > 1]
        if in_header:
            return max(in_header, key=lambda delimiter: Counter(widths[delimiter])[widths[delimiter][0]])
    return None


def delimiter_of_a_table(text: str) -> str | None:
    """The delimiter if a text without a telling file name is surely a table: names in its first line, two lines or
    more, and equally many fields in each."""
    if "\n" not in text.strip() or "\n\n" in text.replace("\r", "").strip():
        return None
    for delimiter in DELIMITERS:
        found = _widths(text, delimiter)
        if len(found) > 1 and len(set(found)) == 1 and found[0] > 1:
            header = next(csv.reader(io.StringIO(text), delimiter=delimiter))
            # A comma or a bar is also in prose: a column name is one word then.
            names = _NAME if delimiter == "\t" else _WORD
            if len(set(header)) == len(header) and all(names.fullmatch(name) for name in header):
                return delimiter
    return None


def _widths(text: str, delimiter: str) -> list[int]:
    """The number of fields of the first records; empty if they are no csv with this delimiter."""
    sample = text[:_SAMPLE_CHARACTERS]
    records = _SAMPLE_RECORDS
    if len(text) > len(sample):
        sample = sample[: sample.rfind("\n") + 1]
    try:
        with _unlimited_fields():
            return [len(f) for f in islice(csv.reader(io.StringIO(sample), delimiter=delimiter), records) if f]
    except csv.Error:
        return []


def _without_sep_line(text: str) -> tuple[str, int, str | None]:
    """``(text, its first line, delimiter)`` after a line such as ``sep=;``."""
    match = _SEP_LINE.match(text)
    return (text[match.end() :], 2, match[1]) if match else (text, 1, None)


@contextmanager
def _unlimited_fields() -> Iterator[None]:
    """Lifts the csv module's limit of 128 KiB per field, which is global to the process, and restores it afterwards."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv_records(
    text: str, delimiter: str, first_line: int, path: Path, options: Options
) -> Iterator[tuple[int, list[str]]]:
    """(line where the record starts, its fields) of each record that is not a blank line."""
    # StringIO breaks lines at LF only, as editors and grep -n do; CR inside a quoted field is not a new line.
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    line = first_line
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + first_line
    except csv.Error as exc:
        reason = str(exc)
        if reason == "unexpected end of data":
            reason = "the quote that opens in this record is never closed"
        elif reason.startswith("new-line character"):
            reason = "carriage return outside quotes"
        elif "expected after" in reason:
            reason = 'a field goes on after its closing quote; write a quote inside a quoted field twice ("")'
        raise DataError(f"{path}:{line}: broken csv record: {reason}", key=options.key) from None


def _tsv_records(text: str) -> Iterator[tuple[int, list[str]]]:
    for line, content in enumerate(text.split("\n"), 1):
        content = content.removesuffix("\r")
        if content:
            yield line, content.split("\t")


def _read_records(records: Iterator[tuple[int, list[str]]], path: Path, options: Options, form: str) -> Table:
    """Columns from records with as many fields as the header or ``options.column_names``."""
    if options.column_names is not None:
        names, source, key = list(options.column_names), "data.column_names", "data.column_names"
    else:
        line, names = next(records, (1, []))
        source, key = f"{path}:{line}", options.key

    width = len(names)
    rows: list[list[str]] = []
    lines: list[int] = []
    for line, fields in records:
        if len(fields) != width:
            if len(fields) == 1 and not fields[0].strip():
                continue
            raise DataError(
                f"{path}:{line}: expected {width} field{'' if width == 1 else 's'} as in {source} ({listed(names)}), "
                f"found {len(fields)}; a record needs all its fields, and {form}",
                key=key,
            )
        rows.append(fields)
        lines.append(line)
    names = names[: width - _num_empty(names, rows)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{source}: the column name {twice[0]!r} appears more than once; rename one of them", key=key)
    columns = {name: list(values) for name, values in zip(names, zip(*rows, strict=True), strict=False)}
    return Table(columns, np.array(lines, dtype=np.int64), "line")


def _num_empty(names: list[str], rows: list[list[str]]) -> int:
    """How many columns at the end have neither a name nor a value, as spreadsheets write them; never all."""
    count = 0
    while count + 1 < len(names) and not names[-1 - count].strip() and not any(row[-1 - count].strip() for row in rows):
        count += 1
    return count
