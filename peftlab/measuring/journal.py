"""A benchmark's folder: a journal that gets a line as soon as something is measured, so that a kill loses nothing of it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peftlab.errors import ArtifactError, RecipeError

JOURNAL = "measurements.jsonl"
RESULT, TABLE, PICTURE, VECTOR = (f"bench.{ending}" for ending in ("json", "csv", "png", "svg"))
FORMAT = 1
# Of a header: when, and how the machine was doing; two halves of one benchmark may differ in them.
_FREE = ("command", "date", "clocks")
_MOST_DIFFERENCES = 4


class Journal:
    """The records of a file, one JSON object a line, the header first; ``write`` appends one and brings it to the disk.

    Several processes may have the same file open: a line is written whole, under a lock, and what a killed process left of
    its last line goes before it. ``records`` are those of the beginning and of this process.
    """

    def __init__(self, path: Path, records: list[dict[str, Any]]) -> None:
        self.path, self.records = path, records
        self._file = path.open("ab+", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        with _locked(self._file.fileno()):
            self._drop_torn_line()
            self._file.write(line)
            os.fsync(self._file.fileno())
        self.records.append(dict(record))

    def _drop_torn_line(self) -> None:
        """Whoever lives and writes holds the lock: a line without an end belongs to a process that was killed."""
        size = self._file.seek(0, os.SEEK_END)
        if size == 0:
            return
        self._file.seek(size - 1)
        if self._file.read(1) == b"\n":
            return
        self._file.seek(0)
        whole = self._file.read()
        self._file.truncate(whole.rfind(b"\n") + 1)

    def close(self) -> None:
        self._file.close()

    def of(self, kind: str, cell: str | None = None) -> list[dict[str, Any]]:
        """Records of a kind, of one cell or of all."""
        return [r for r in self.records if r["kind"] == kind and cell in (None, r.get("cell"))]


@contextlib.contextmanager
def _locked(file: int) -> Iterator[None]:
    """Windows has no such lock, and nothing there in which several processes write one journal."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def begin(path: Path, header: Mapping[str, Any]) -> Journal:
    """A journal of its own, whatever ``path`` held before."""
    path.unlink(missing_ok=True)
    journal = Journal(path, [])
    journal.write({"kind": "header", **header})
    return journal


def go_on(path: Path, header: Mapping[str, Any], *, anew: str = "--replace") -> Journal:
    """The journal at ``path``, to be gone on with. anew: what its messages say begins another one.

    Raises: RecipeError (there is none), ArtifactError (it is damaged, or of another version or machine).
    """
    if not path.is_file():
        raise RecipeError(f"there is no benchmark in {path.parent} to resume; leave --resume out")
    records = _repaired(path, anew)
    check_same(records[0], header, path)
    return Journal(path, records)


def open_journal(folder: Path, header: Mapping[str, Any], *, resume: bool, replace: bool) -> Journal:
    """The journal of ``folder``, new or to be gone on with.

    Raises: RecipeError (the folder is taken, or there is nothing to resume), ArtifactError (its journal is damaged, or of
        another version, machine, recipe or protocol).
    """
    path = folder / JOURNAL
    if folder.is_file():
        raise RecipeError(f"{folder} is a file, not a folder; give another --out")
    taken = folder.exists() and any(folder.iterdir())
    if taken and not path.is_file():
        raise RecipeError(f"{folder} holds other files and no benchmark; give another --out")
    if resume:
        return go_on(path, header)
    if taken and not replace:
        raise RecipeError(
            f"{folder} holds another benchmark; go on with it with --resume, replace it with --replace, or give another --out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stem in ("bench", "quality"):
            for ending in ("json", "csv", "png", "svg"):
                (folder / f"{stem}.{ending}").unlink(missing_ok=True)
        return begin(path, header)
    except OSError as error:
        raise RecipeError(f"cannot write {folder}: {error.strerror}; give another --out") from error


def read_records(path: Path, *, anew: str = "--replace") -> list[dict[str, Any]]:
    """The records of a file that may be written to meanwhile, the header first; without a last line that has no end.

    Raises: ArtifactError, as ``go_on``.
    """
    return _records(path, path.read_bytes().rpartition(b"\n")[0].split(b"\n"), anew)


def _records(path: Path, lines: list[bytes], anew: str, *, torn: bool = False) -> list[dict[str, Any]]:
    """torn: the last line may be damaged, and is then left out."""
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else None
            if record is not None:
                record["kind"]
                records.append(record)
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines) or not torn:
                raise ArtifactError(f"{path}, line {number} is damaged: {error}; begin anew with {anew}") from error
    if not records or records[0]["kind"] != "header":
        raise ArtifactError(f"{path} has no header line; begin anew with {anew}")
    return records


def _repaired(path: Path, anew: str) -> list[dict[str, Any]]:
    """The records; a line that a kill left torn, which can only be the last, is removed from the file."""
    lines = path.read_bytes().split(b"\n")
    records = _records(path, lines, anew, torn=True)
    if len(lines[-1]):  # a torn line, or a whole one whose line break is missing
        whole = b"".join(json.dumps(r).encode() + b"\n" for r in records)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_bytes(whole)
        os.replace(partial, path)
    return records


def check_same(stored: Mapping[str, Any], header: Mapping[str, Any], path: Path) -> None:
    """Raises ArtifactError with what differs between the header of the file and that of this call."""
    now = json.loads(json.dumps({"kind": "header", **header}))
    found = list(differences(stored, now))
    if found:
        more = f", and {len(found) - _MOST_DIFFERENCES} more" if len(found) > _MOST_DIFFERENCES else ""
        raise ArtifactError(
            f"{path} was measured otherwise: {'; '.join(found[:_MOST_DIFFERENCES])}{more}. Figures of both do not belong in one "
            "table: resume as it was begun, or give another --out"
        )


def differences(stored: Any, now: Any, key: str = "") -> Iterator[str]:
    """``key: X there, Y now`` for each leaf that differs."""
    if isinstance(stored, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*stored, *now]):
            if not key and name in _FREE:
                continue
            yield from differences(stored.get(name), now.get(name), f"{key}.{name}" if key else str(name))
    elif stored != now:
        yield f"{key}: {_short(stored)} there, {_short(now)} now"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_result(source: Path) -> dict[str, Any]:
    """The bench.json of a file or folder. Raises: RecipeError (there is none), ArtifactError (it is something else)."""
    path = source / RESULT if source.is_dir() else source
    if not path.is_file():
        unfinished = (path.parent / JOURNAL).is_file() and source.is_dir()
        hint = (
            "the benchmark there is not finished: peftlab bench RECIPE --resume" if unfinished else "give a bench.json"
        )
        raise RecipeError(f"{path} does not exist; {hint}, or a folder that holds one")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = document["header"]["format"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is no result of peftlab bench, or damaged: {error!r}") from error
    if found != FORMAT:
        raise ArtifactError(f"{path} has format {found}, expected {FORMAT}: measure again with this version of peftlab")
    return dict(document)
