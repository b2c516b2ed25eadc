"""Decodes text files, and notices characters that a wrong encoding leaves behind."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftlab.data.rows import Note, Rows
from peftlab.errors import DataError

# The longer marks first: that of utf-32 begins with that of utf-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Encodings of languages in which most letters are not ASCII; every byte sequence is valid in none of them.
_NOT_WESTERN = ("shift_jis", "euc_kr", "gb18030", "big5", "cp1251", "cp1253", "cp1255", "cp1256")
_WIDE = ("utf-16", "utf-32")
_MOST_OFFERED = 3
_LONGEST_SAMPLE = 50
_C1 = re.compile("[\x80-\x9f]")
_LOST = re.compile("\ufffd")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
_ODD_ESCAPED = re.compile(r"\\(?:u00[01789]|ufffd|[bf])", re.IGNORECASE)


def codec_name(encoding: str) -> str:
    """The standard name of a text encoding; utf-8-sig becomes utf-8, because a byte order mark is always removed.

    Raises: DataError: no text encoding has this name.
    """
    try:
        codec = codecs.lookup(encoding).name
        "".encode(codec)  # fails for codecs that are not text encodings, such as hex and rot13
    except (LookupError, ValueError):
        raise DataError(
            f"unknown text encoding {encoding!r}; examples are utf-8, cp1252, utf-16 and gb18030",
            key="data.encoding",
        ) from None
    return "utf-8" if codec == "utf-8-sig" else codec


def decode(raw: bytes, path: Path, *, encoding: str, key: str) -> tuple[str, list[Note]]:
    """The text of a file without a byte order mark, and notes; CR line ends of old Macs become LF.

    A byte order mark decides the encoding, unless the file does not follow it and ``encoding`` does.

    Raises: DataError with line and remedy: not text, or in another encoding.
    """
    codec = codec_name(encoding)
    if raw and codec.startswith(_WIDE) and b"\0" not in raw and _is_utf_8(raw):
        raise DataError(
            f"{path}: not {encoding}, in which each line break has a NUL byte: it is valid utf-8; remove data.encoding",
            key="data.encoding",
        )
    mark, marked = next(((m, name) for m, name in _MARKS if raw.startswith(m)), (b"", None))
    if marked is not None and not codec.startswith(marked):
        try:
            text = raw.decode(marked)
        except UnicodeDecodeError as exc:
            if codec == "utf-8":
                raise _undecodable(raw, exc, path, marked, key) from None
            raw = raw[len(mark) :] if marked == "utf-8" else raw
        else:
            note = Note("encoding", f"{path} is read as {marked}, as its byte order mark says", "data.encoding")
            return _without_nul(text, path, raw, marked, key), [note]
    try:
        text = raw.decode(codec)
    except UnicodeDecodeError as exc:
        raise _undecodable(raw, exc, path, encoding, key) from None
    notes = [] if codec.startswith("utf") or raw.isascii() else _utf_8_notes(raw, path, encoding)
    return _without_nul(text, path, raw, encoding, key), notes


def _utf_8_notes(raw: bytes, path: Path, encoding: str) -> list[Note]:
    """A note if a file that is read in another encoding is valid utf-8, which hardly any other text is."""
    if not _is_utf_8(raw):
        return []
    count = sum(c > "\x7f" for c in raw.decode("utf-8"))
    what = "character is" if count == 1 else "characters are"
    text = f"{path} is read as {encoding}, but its {count:,} {what} valid utf-8; remove data.encoding if the text looks wrong"
    return [Note("encoding", text, "data.encoding")]


def _is_utf_8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def may_be_odd(text: str) -> bool:
    """Whether a file has characters for ``odd_character_notes``, as they are or escaped as in JSON."""
    return _ODD.search(text) is not None or _ODD_ESCAPED.search(text) is not None


def odd_character_notes(rows: Rows, *, encoding: str) -> Iterator[Note]:
    """Notes about characters that no text has: control characters, and what is left of lost ones.

    Args: encoding: how the files were decoded.
    """
    found: dict[re.Pattern[str], list[tuple[int, str, str]]] = {_C1: [], _LOST: [], _CONTROL: []}
    for name, values in rows.columns.items():
        for row, value in enumerate(values):
            for text in _texts(value):
                if _ODD.search(text):
                    for pattern, places in found.items():
                        if match := pattern.search(text):
                            places.append((row, name, match[0]))
    latin = codec_name(encoding) == "iso8859-1"
    for pattern, what, remedy in (
        (
            _C1,
            "characters from U+0080 to U+009F, which are cp1252 bytes read as latin-1",
            "set data.encoding=cp1252" if latin else "an earlier conversion made them; correct the file",
        ),
        (_LOST, "U+FFFD, which an earlier conversion wrote for characters that it lost", "correct the file"),
        (_CONTROL, "control characters", "remove them if they are not meant"),
    ):
        if places := found[pattern]:
            row, name, character = min(places)
            count = len({row for row, _, _ in places})
            yield Note(
                "odd_characters",
                f"{count:,} row{' contains' if count == 1 else 's contain'} {what} (first in {rows.where(row)}, column "
                f"{name!r}: U+{ord(character):04X}); {remedy}",
                "data.encoding",
            )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list) and value and isinstance(value[0], str | dict | list):  # not a line of pixels
        for part in value:
            yield from _texts(part)


def _without_nul(text: str, path: Path, raw: bytes, encoding: str, key: str) -> str:
    text = text.removeprefix("\ufeff")
    nul = text.find("\0")
    if nul >= 0:
        utf_16 = _utf_16_of(raw)
        raise DataError(
            f"{path}:{1 + text.count(chr(10), 0, nul)}: NUL character at offset {nul}; "
            + (f"the file looks like utf-16: set data.encoding={utf_16}" if utf_16 else "this is a binary file")
            + f" (found while reading as {encoding})",
            key="data.encoding" if utf_16 else key,
        )
    return text if "\n" in text else text.replace("\r", "\n")


def _utf_16_of(raw: bytes) -> str | None:
    """The utf-16 without byte order mark that ``raw`` is in, as far as every second NUL byte shows."""
    pairs = len(raw) // 2
    for name, first in (("utf-16-le", 1), ("utf-16-be", 0)):
        if raw[first::2].count(0) > 0.5 * pairs and raw[1 - first :: 2].count(0) == 0:
            return name
    return None


def _undecodable(raw: bytes, exc: UnicodeDecodeError, path: Path, encoding: str, key: str) -> DataError:
    if b"\0" in raw and codec_name(encoding) == "utf-8":
        if (utf_16 := _utf_16_of(raw)) is not None:
            return DataError(f"{path}: the file looks like utf-16: set data.encoding={utf_16}", key="data.encoding")
        return DataError(f"{path} is not a text file: it is binary (it contains NUL bytes)", key=key)
    line = 1 + raw[: exc.start].decode(exc.encoding, errors="replace").count("\n")
    return DataError(
        f"{path}:{line}: not {encoding}: byte 0x{raw[exc.start]:02x} at byte offset {exc.start} "
        f"({exc.reason}); {_remedy(raw, exc)}",
        key="data.encoding",
    )


def _remedy(raw: bytes, exc: UnicodeDecodeError) -> str:
    escaped = raw.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")
    wrong = sum(map(_is_escaped, escaped))
    valid = sum(c > "\x7f" for c in escaped) - wrong
    if not wrong:
        return "set data.encoding=utf-8"
    if exc.reason == "unexpected end of data" and exc.end >= len(raw):
        return "the file ends inside a character, so it is cut off; get a complete copy"
    if valid > wrong:
        return (
            f"{valid:,} other characters are valid utf-8 and {wrong:,} bytes are not: the file mixes encodings; "
            "correct these lines"
        )
    letters = sum(c.isalpha() for c in escaped)
    western = ("cp1252",) if wrong <= 0.4 * (letters + wrong) else ()
    start = raw.rfind(b"\n", 0, exc.start) + 1
    sample = raw[start : raw.find(b"\n", exc.start) if b"\n" in raw[exc.start :] else len(raw)].rstrip(b"\r")
    offers = []
    for name in (*western, *_NOT_WESTERN, *(("cp1252",) if not western else ()), "cp850"):
        try:
            if _ODD.search(raw.decode(name)):
                continue
        except UnicodeDecodeError:
            continue
        offers.append(f"data.encoding={name} reads this line as {_clipped(sample.decode(name, errors='replace'))!r}")
        if western and valid:
            offers[-1] += _as_read(escaped, name)
        if western or len(offers) == _MOST_OFFERED:
            break
    if not offers:
        return "it is in no common encoding; convert the file to utf-8"
    return f"{'; '.join(offers)}; set it if that is right, or convert the file to utf-8"


def _clipped(text: str) -> str:
    return text if len(text) <= _LONGEST_SAMPLE else f"{text[:_LONGEST_SAMPLE]}..."


def _as_read(escaped: str, encoding: str) -> str:
    """What an encoding makes of the first line that is valid utf-8 and not ASCII; empty if there is none."""
    for number, line in enumerate(escaped.split("\n"), 1):
        if not line.isascii() and not any(map(_is_escaped, line)):
            line = line.rstrip("\r")
            read = line.encode().decode(encoding, errors="replace")
            return (
                f", but line {number} as {_clipped(read)!r}, which is {_clipped(line)!r} in utf-8: if that is right, the file "
                "mixes encodings and these lines need correction"
            )
    return ""


def _is_escaped(character: str) -> bool:
    """Whether it stands for a byte that is no utf-8, as ``surrogateescape`` writes it."""
    return "\udc80" <= character <= "\udcff"
