"""Reads gettext catalogues (.po): translated strings of programs, as source and target."""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polib

from peftlab.data.rows import Note, Origin, Rows
from peftlab.data.table import Options, Table
from peftlab.errors import DataError, listed

# Where a catalogue of a language lies in a package: locale/de/LC_MESSAGES/django.po
_FOLDER = "LC_MESSAGES"


def read_po(text: str, path: Path, options: Options) -> Table:
    """One row per translated string: ``source``, ``target`` and ``context`` (the msgctxt, or None), at the line of its entry.

    Entries that are fuzzy, obsolete or not translated are left out and counted in a note. Of an entry with plural forms the
    singular is a row and each other form is one, with the plural as the source.
    """
    try:
        entries = polib.pofile(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = str(error).removeprefix("Syntax error in po file ").removeprefix("None ")
        raise DataError(f"{path} is no gettext catalogue: syntax error {reason}", key=options.key) from None
    left_out: Counter[str] = Counter()
    rows: list[tuple[str, str, str | None, int]] = []
    for entry in entries:
        if why := _unusable(entry):
            left_out[why] += 1
        else:
            rows += [(source, target, entry.msgctxt, entry.linenum) for source, target in _pairs(entry)]
    if not rows:
        raise DataError(f"{path} has no translated string{_counted(left_out, ': ')}", key=options.key)
    notes = (Note("catalogue", f"{path} has strings that are not read{_counted(left_out, ': ')}"),) if left_out else ()
    sources, targets, contexts, lines = (list[Any](column) for column in zip(*rows, strict=True))
    columns = {"source": sources, "target": targets, "context": contexts}
    return Table(columns, np.array(lines, dtype=np.int64), "line", notes=notes)


def _unusable(entry: Any) -> str | None:
    if entry.obsolete:
        return "obsolete"
    if "fuzzy" in entry.flags:
        return "fuzzy"
    return None if any(target.strip() for _, target in _pairs(entry)) else "not translated"


def _pairs(entry: Any) -> Iterator[tuple[str, str]]:
    """Source and target; of plural forms, as many as the language has."""
    if not entry.msgid_plural:
        yield entry.msgid, entry.msgstr
        return
    forms = [entry.msgstr_plural[number] for number in sorted(entry.msgstr_plural)]
    for number, form in enumerate(forms):
        if form.strip():
            yield entry.msgid if number == 0 and len(forms) > 1 else entry.msgid_plural, form


def _counted(left_out: Counter[str], before: str) -> str:
    return before + ", ".join(f"{count:,} {why}" for why, count in left_out.items()) if left_out else ""


def catalogue_rows(name: str, places: list[tuple[Path, str]], key: str) -> tuple[Rows, list[bytes]]:
    """The strings of all catalogues of a language in packages, each pair of source and target once; and their sources, which
    say whether a row is for training.

    Args: places: folder and language of each. Raises: DataError.
    """
    tables, files = [], []
    for folder, language in places:
        found = sorted(folder.rglob(f"{language}/{_FOLDER}/*.po"))
        if not found:
            languages = sorted({path.parent.parent.name for path in folder.rglob(f"*/{_FOLDER}/*.po")})
            if not languages:
                raise DataError(f"{name!r}: {folder.name} has no gettext catalogues ({_FOLDER}/*.po)", key=key)
            near = difflib.get_close_matches(language, languages, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise DataError(
                f"{name!r}: {folder.name} has no catalogue of the language {language!r}{hint} It has "
                f"{listed(languages, most=20)}",
                key=key,
            )
        for path in found:
            tables.append(_of_package(path, key))
            files.append(path)
    chosen: dict[tuple[str, str], tuple[int, int, Any]] = {}
    for number, table in enumerate(tables):
        values = zip(
            *(table.columns[c] for c in ("source", "target", "context")), table.positions.tolist(), strict=True
        )
        for source, target, context, line in values:
            chosen.setdefault((source, target), (number, line, context))
    repeated = sum(len(table.positions) for table in tables) - len(chosen)
    notes = []
    if noted := [note for table in tables for note in table.notes]:
        more = f" (and {len(noted) - 1:,} more catalogues)" if len(noted) > 1 else ""
        notes.append(Note("catalogue", f"{noted[0].message}{more}"))
    if repeated:
        many = f"{repeated:,} strings that repeat" if repeated > 1 else "1 string that repeats"
        notes.append(Note("catalogue", f"{name}: {many} an earlier one with its translation, read once"))
    digest = hashlib.sha256("\0".join(part for pair in chosen for part in pair).encode())
    rows = Rows(
        name=name,
        columns={
            "source": [source for source, _ in chosen],
            "target": [target for _, target in chosen],
            "context": [context for _, _, context in chosen.values()],
        },
        fingerprint=digest.hexdigest(),
        origins=tuple(Origin(str(path), "line") for path in files),
        origin_index=np.array([number for number, _, _ in chosen.values()], dtype=np.int64),
        positions=np.array([line for _, line, _ in chosen.values()], dtype=np.int64),
        notes=tuple(notes),
    )
    return rows, [source.encode() for source, _ in chosen]


def _of_package(path: Path, key: str) -> Table:
    try:
        return read_po(path.read_text(encoding="utf-8"), path, Options(key))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}", key=key) from None
