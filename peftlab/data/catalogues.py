"""Reads gettext catalogues (.po): translated strings of programs, as source and target."""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polib

from peftlab.data.near_duplicates import first_alike
from peftlab.data.rows import Note, Origin, Rows
from peftlab.data.table import Options, Table
from peftlab.errors import DataError, listed

# Where a catalogue of a language lies in a package: locale/de/LC_MESSAGES/django.po
_FOLDER = "LC_MESSAGES"


class Place(NamedTuple):
    """The catalogues of a package. Attributes: folder: of the package. language: of the targets. source: language of the
    sources; None: that of the program."""

    folder: Path
    language: str
    source: str | None = None


def read_po(text: str, path: Path, options: Options) -> Table:
    """One row per translated string: ``source``, ``target`` and ``context`` (the msgctxt, or None), at the line of its entry.

    Entries that are fuzzy, obsolete or not translated are left out and counted in a note. Of an entry with plural forms the
    singular is a row and each other form is one, with the plural as the source.
    """
    left_out: Counter[str] = Counter()
    rows: list[tuple[str, str, str | None, int]] = []
    for entry in _entries(text, path, options.key):
        if why := _unusable(entry):
            left_out[why] += 1
        else:
            rows += [(source, target, entry.msgctxt, entry.linenum) for source, target in _pairs(entry)]
    if not rows:
        raise DataError(f"{path} has no translated string{_counted(left_out, ': ')}", key=options.key)
    return _table(rows, path, left_out)


def _entries(text: str, path: Path, key: str) -> Any:
    try:
        return polib.pofile(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = str(error).removeprefix("Syntax error in po file ").removeprefix("None ")
        raise DataError(f"{path} is no gettext catalogue: syntax error {reason}", key=key) from None


def _table(rows: list[tuple[str, str, str | None, int]], path: Path, left_out: Counter[str]) -> Table:
    notes = (Note("catalogue", f"{path} has strings that are not read{_counted(left_out, ': ')}"),) if left_out else ()
    sources, targets, contexts, lines = (list[Any](column) for column in zip(*rows, strict=True))
    columns = {"source": sources, "target": targets, "context": contexts}
    return Table(columns, np.array(lines, dtype=np.int64), "line", notes=notes)


def _between(source_path: Path, path: Path, key: str) -> Table | None:
    """One row per string that both catalogues translate, with the translation of the first as its source; None if there is
    none. Plural forms are paired by their numbers, and left out if the languages have differently many."""
    left_out: Counter[str] = Counter()
    texts = {
        (entry.msgctxt, entry.msgid): _translations(entry)
        for entry in _entries(_text_of(source_path, key), source_path, key)
        if not _unusable(entry)
    }
    rows: list[tuple[str, str, str | None, int]] = []
    for entry in _entries(_text_of(path, key), path, key):
        if why := _unusable(entry):
            left_out[why] += 1
            continue
        sources, targets = texts.get((entry.msgctxt, entry.msgid), []), _translations(entry)
        if len(sources) != len(targets):
            left_out["with other plural forms" if sources else f"not translated in {source_path}"] += 1
            continue
        pairs = zip(sources, targets, strict=True)
        rows += [(s, t, entry.msgctxt, entry.linenum) for s, t in pairs if s.strip() and t.strip()]
    return _table(rows, path, left_out) if rows else None


def _translations(entry: Any) -> list[str]:
    """One, or the plural forms by their numbers."""
    if not entry.msgid_plural:
        return [entry.msgstr]
    return [entry.msgstr_plural[number] for number in sorted(entry.msgstr_plural)]


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


def catalogue_rows(name: str, places: list[Place], key: str) -> tuple[Rows, list[bytes]]:
    """The strings of all catalogues of ``places``, each pair of source and target once; and their sources, of near duplicates
    the first one, which say whether a row is for training.

    Raises: DataError.
    """
    tables, files = [], []
    for place in places:
        found = _found(name, place, place.language, key)
        if place.source is None:
            tables += [_of_package(path, key) for path in found]
            files += found
            continue
        # The same catalogue in another language differs in one folder.
        others = {_without_language(path): path for path in _found(name, place, place.source, key)}
        pairs = [(others[c], path) for path in found if (c := _without_language(path)) in others]
        read = [(path, table) for other, path in pairs if (table := _between(other, path, key)) is not None]
        if not read:
            languages = f"{place.source!r} and {place.language!r}"
            raise DataError(f"{name!r}: no string of {place.folder.name} is translated into {languages}", key=key)
        files += [path for path, _ in read]
        tables += [table for _, table in read]
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
    return rows, [source.encode() for source in first_alike([source for source, _ in chosen])]


def _found(name: str, place: Place, language: str, key: str) -> list[Path]:
    """The catalogues of a language."""
    folder = place.folder
    if found := sorted(folder.rglob(f"{language}/{_FOLDER}/*.po")):
        return found
    languages = sorted({path.parent.parent.name for path in folder.rglob(f"*/{_FOLDER}/*.po")})
    if not languages:
        raise DataError(f"{name!r}: {folder.name} has no gettext catalogues ({_FOLDER}/*.po)", key=key)
    near = difflib.get_close_matches(language, languages, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise DataError(
        f"{name!r}: {folder.name} has no catalogue of the language {language!r}{hint} It has {listed(languages, most=20)}",
        key=key,
    )


def _without_language(path: Path) -> tuple[Path, str]:
    return path.parent.parent.parent, path.name


def _of_package(path: Path, key: str) -> Table:
    return read_po(_text_of(path, key), path, Options(key))


def _text_of(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}", key=key) from None
