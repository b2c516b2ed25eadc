"""Reads JSON: arrays, lines, objects one after the other, and objects that hold lists, columns or splits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from peftlab.data.coco import is_coco, read_coco
from peftlab.data.rows import IntArray
from peftlab.data.squad import is_nested, questions_of
from peftlab.data.table import SPLITS, Options, Table, choose_split
from peftlab.errors import DataError, listed

Columns = dict[str, list[Any]]

# Names under which files keep their only table beside lists of something else.
_TABLE_NAMES = (*SPLITS, "data", "rows", "examples", "records", "instances")
_TURN_KEYS = ({"role", "content"}, {"from", "value"})
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],]', re.DOTALL)
_SPACE = re.compile(r"[ \t\r\n]*")


class _RepeatedKey(ValueError):
    """An object gives one key twice."""


def read_json(text: str, path: Path, options: Options, *, lines: bool) -> Table:
    """The rows of a JSON document, of JSON lines, or of objects one after the other.

    Args: lines: whether an object that could be a document or a single row is a row, as in a jsonl file.

    Raises: DataError with line and column: broken JSON, a key given twice, half a surrogate pair, or no table in it.
    """
    stripped = text.lstrip()
    if not stripped:
        return Table({}, np.zeros(0, dtype=np.int64), "line")
    if not stripped.startswith("{"):
        try:
            document = _parse(text, 1, path, options)
        except DataError:
            if not lines or stripped.startswith("["):
                raise
            table = _of_objects(text, path, options)
        else:
            if lines and not isinstance(document, list):
                raise DataError(f"{path}:1: expected an object, found {_kind(document)}", key=options.key)
            table = _of_document(document, path, options)
    else:
        table = _of_objects(text, path, options)
        if len(table.positions) == 1:
            only = {name: values[0] for name, values in table.columns.items()}
            if _names_a_table(only) or not lines:
                table = _of_document(only, path, options)
    if is_nested(table.columns):
        table = questions_of(table, path, options)
    if "\\ud" in text or "\\uD" in text:
        _reject_half_characters(table, path, options)
    return table


def looks_like_json(text: str) -> bool:
    """Whether a text without a telling file name begins with a JSON object, or with an array of them."""
    start = _SPACE.match(text)
    assert start is not None
    if text.startswith("[", start.end()):
        return re.match(r"\[\s*\{\s*\"", text[start.end() : start.end() + 1000]) is not None
    if not text.startswith("{", start.end()):
        return False
    try:
        json.JSONDecoder().raw_decode(text, start.end())
    except (ValueError, RecursionError):
        return False
    return True


def _of_objects(text: str, path: Path, options: Options) -> Table:
    """Rows from one object per line; if a line is no whole object, from objects that follow each other."""
    try:
        return _of_lines(text, path, options)
    except DataError as error:
        try:
            return _of_sequence(text, path, options)
        except DataError as second:
            # An object that is spread over lines is broken where the sequence breaks, one in a line is where the line does.
            line = next((line for line in text.split("\n") if line.strip() and not _is_object(line)), "").rstrip()
            spread = line.endswith(("{", "[", ",", ":")) or "Extra data" in str(error)
            raise (second if spread else error) from None


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _of_lines(text: str, path: Path, options: Options) -> Table:
    lines: list[int] = []

    def records() -> Iterator[dict[str, Any]]:
        for line, content in enumerate(_lines_of(text), 1):
            if content.strip():
                record = _checked(_parse(content, line, path, options), f"{path}:{line}", options)
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


def _of_sequence(text: str, path: Path, options: Options) -> Table:
    lines: list[int] = []

    def records() -> Iterator[dict[str, Any]]:
        at, line, counted = 0, 1, 0
        while (at := _after_space(text, at)) < len(text):
            line, counted = line + text.count("\n", counted, at), at
            with _Broken(text, 1, path, options):
                value, end = _DECODER.raw_decode(text, at)
            yield _checked(value, f"{path}:{line}", options)
            lines.append(line)
            at = end

    return Table(_columns_of(records()), np.array(lines, dtype=np.int64), "line")


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _RepeatedKey
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _parse(text: str, first_line: int, path: Path, options: Options) -> Any:
    with _Broken(text, first_line, path, options):
        return _DECODER.decode(text)


class _Broken:
    """Turns the errors of parsing ``text`` into a DataError with the place."""

    def __init__(self, text: str, first_line: int, path: Path, options: Options) -> None:
        self._text, self._first_line, self._path, self._options = text, first_line, path, options

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        text, first, path, key = self._text, self._first_line, self._path, self._options.key
        if isinstance(exc, _RepeatedKey):
            name, at = _repeated_key(text)
            line = first + text.count("\n", 0, at)
            raise DataError(f"{path}:{line}: one object gives the key {name!r} twice; keep one", key=key) from None
        if isinstance(exc, json.JSONDecodeError):
            raise DataError(
                f"{path}:{first + exc.lineno - 1}: broken JSON at column {exc.colno}: {exc.msg}{_hint(text, exc.pos)}",
                key=key,
            ) from None
        if isinstance(exc, ValueError | RecursionError):  # a number of over 4,300 digits, or nested too deeply
            raise DataError(f"{path}:{first}: cannot read this JSON: {exc}", key=key) from None


def _hint(text: str, at: int) -> str:
    """What to do about a common mistake at this place."""
    before = text[max(0, at - 1000) : at].rstrip()[-1:]
    if before == "," and text[at : at + 1] in ("]", "}"):
        return "; remove the comma before it"
    if before == "}" and text.startswith(",", at):
        return "; objects that follow each other have no comma between them: remove it, or write [ ] around all"
    if text.startswith("'", at):
        return "; JSON strings have double quotes"
    if text.startswith(("None", "True", "False"), at):
        return "; JSON has null, true and false"
    if text.startswith(("//", "/*", "#"), at):
        return "; JSON has no comments"
    if before == "]":
        return "; expected one array, or objects one after the other"
    return ""


def _repeated_key(text: str) -> tuple[str, int]:
    """The first key that an object gives twice, and where it is given again."""
    # Per open bracket: the keys so far and whether a string is a key here; None for an array.
    stack: list[tuple[set[str], bool] | None] = []
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in ("{", "["):
            stack.append((set(), True) if token == "{" else None)
        elif token in ("}", "]"):
            stack.pop()
        elif stack and (top := stack[-1]) is not None:
            keys, expected = top
            if token == ",":
                stack[-1] = (keys, True)
            elif expected:
                name = json.loads(token, strict=False)
                if name in keys:
                    return name, match.start()
                keys.add(name)
                stack[-1] = (keys, False)
    raise AssertionError("no key is repeated")


def _checked(record: Any, where: str, options: Options) -> dict[str, Any]:
    if isinstance(record, dict):
        return record
    raise DataError(f"{where}: expected an object, found {_kind(record)}", key=options.key)


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _reject_half_characters(table: Table, path: Path, options: Options) -> None:
    """JSON can escape half of a surrogate pair (a cut emoji), on which tokenizers would fail much later."""
    for i, position in enumerate(table.positions.tolist()):
        try:
            json.dumps([values[i] for values in table.columns.values()], ensure_ascii=False).encode()
        except UnicodeEncodeError as exc:
            where = f"{path}:{position}" if table.unit == "line" else f"{path}, record {position}"
            half = f"\\u{ord(exc.object[exc.start]):04x}"
            raise DataError(f"{where}: {half} is half of a surrogate pair, not a character", key=options.key) from None


def _columns_of(records: Iterable[dict[str, Any]]) -> Columns:
    """Column name -> values; None if a record lacks the key."""
    columns: Columns = {}
    for i, record in enumerate(records):
        for name in record:
            if name not in columns:
                columns[name] = [None] * i
        for name, values in columns.items():
            values.append(record.get(name))
    return columns


def _table(columns: Columns, **about: Any) -> Table:
    count = len(next(iter(columns.values()), []))
    return Table(columns, np.arange(1, count + 1, dtype=np.int64), "record", **about)


def _of_document(document: Any, path: Path, options: Options) -> Table:
    if isinstance(document, list):
        records = [_checked(r, f"{path}, record {i}", options) for i, r in enumerate(document, 1)]
        positions: IntArray = np.arange(1, len(records) + 1, dtype=np.int64)
        return Table(_columns_of(records), positions, "record")
    if not isinstance(document, dict):
        raise DataError(f"{path}: expected an array of objects, found {_kind(document)}", key=options.key)
    if is_coco(document):
        return read_coco(document, path, options)
    tables = _tables_in(document, path, options)
    if isinstance(tables, list):
        return _table(_columns_of(tables))
    if tables.keys() == {""}:
        return _table(tables[""])
    if not tables:
        kinds = f"an object with the keys {listed(document)}" if document else "an empty object"
        raise DataError(
            f"{path}: expected an array of objects, an object with a list of objects, or one list per column; found "
            f"{kinds}",
            key=options.key,
        )
    name, notes = choose_split(tables, path, options)
    return _table(tables[name], notes=tuple(notes), splits=tuple(tables))


def _tables_in(document: dict[str, Any], path: Path, options: Options) -> dict[str, Columns] | list[dict[str, Any]]:
    """The tables in an object by name; one without a name is called ``""``; a list of rows if it is rows itself."""
    if _is_row(document):
        return [document]
    tabular = {name: value for name, value in document.items() if isinstance(value, list | dict)}
    lists = {name: value for name, value in tabular.items() if isinstance(value, list)}
    records = {name: value for name, value in lists.items() if _are_objects(value)}
    if _is_split_orient(document):
        names = [str(name) for name in document["columns"]]
        return {"": {name: [row[i] for row in document["data"]] for i, name in enumerate(names)}}
    named = {name: value for name, value in records.items() if name.lower() in _TABLE_NAMES}
    if named or (records and len(records) == len(lists)):
        return {name: _columns_of(value) for name, value in (named or records).items()}
    if lists:
        lengths = {name: len(value) for name, value in lists.items()}
        if len(set(lengths.values())) == 1:
            return {"": lists}
        if len(records) == 1:
            return {name: _columns_of(value) for name, value in records.items()}
        raise DataError(
            f"{path}: the lists have different lengths ("
            + ", ".join(f"{name!r} {length:,}" for name, length in list(lengths.items())[:8])
            + "); expected equally many values in each column, or one list of objects",
            key=options.key,
        )
    return _of_nested(tabular, path, options)


def _of_nested(objects: dict[str, Any], path: Path, options: Options) -> dict[str, Columns] | list[dict[str, Any]]:
    """Tables from an object of objects (without lists): splits, or what pandas writes with orient=columns or orient=index."""
    if not objects:
        return {}
    inner = list(objects.values())
    if all(value and all(isinstance(v, list | dict) for v in value.values()) for value in inner) and (
        all(name.lower() in SPLITS for name in objects) or not all(map(_numbered, inner))
    ):
        tables: dict[str, Columns] = {}
        for name, value in objects.items():
            within = _tables_in(value, path, options)
            if len(objects) == 1 and not isinstance(within, list) and within.keys() != {""}:
                return within
            if isinstance(within, list):
                tables[name] = _columns_of(within)
            elif within.keys() == {""}:
                tables[name] = within[""]
        return tables
    if all(map(_numbered, inner)):
        keys = list(dict.fromkeys(key for value in inner for key in value))
        return {"": {name: [value.get(key) for key in keys] for name, value in objects.items()}}
    if _numbered(objects):
        return inner
    raise DataError(
        f"{path}: an object of objects ({listed(objects, most=3)} with {listed(inner[0], most=3)}) can hold rows or "
        "columns; write an array of rows instead (pandas: orient='records')",
        key=options.key,
    )


def _is_row(document: dict[str, Any]) -> bool:
    """Whether an object is one row rather than a file's tables: it has no list or object, or a conversation."""
    if not document or _names_a_table(document):
        return False
    parts = [value for value in document.values() if isinstance(value, list | dict)]
    return not parts or any(_are_objects(v) and any(keys <= v[0].keys() for keys in _TURN_KEYS) for v in parts)


def _names_a_table(document: dict[str, Any]) -> bool:
    return any(name.lower() in _TABLE_NAMES and _are_objects(value) for name, value in document.items())


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _is_split_orient(document: dict[str, Any]) -> bool:
    """Whether pandas wrote the object with orient=split: ``{"columns": [...], "index": [...], "data": [[...], ...]}``."""
    names, data = document.get("columns"), document.get("data")
    return (
        isinstance(names, list)
        and isinstance(data, list)
        and all(isinstance(row, list) and len(row) == len(names) for row in data)
    )


def _numbered(value: dict[str, Any]) -> bool:
    return bool(value) and all(key.isdecimal() for key in value)
