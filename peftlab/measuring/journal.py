"""A benchmark's folder and its journal, which gets a line after each measurement, so that a kill loses none."""

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
# Header entries that may differ between the two halves of a resumed benchmark.
_FREE = ("command", "date", "clocks")
_MOST_DIFFERENCES = 4


class Journal:
    """The records of a file, one JSON object per line, the header first; ``write`` appends a record and syncs it to disk.

    Several processes may have the file open: each line is written whole, under a lock, after removing a torn line of a
    killed process. ``records`` are those read at the start and those of this process.
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
        """Removes a torn line. A live writer holds the lock, so a line without an end is from a killed process."""
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
        """Returns the records of a kind, for one cell or all."""
        return [r for r in self.records if r["kind"] == kind and cell in (None, r.get("cell"))]


@contextlib.contextmanager
def _locked(file: int) -> Iterator[None]:
    """Locks the file. Windows has no such lock, but no journal with several writers either."""
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
    """Starts a new journal; overwrites an existing file."""
    path.unlink(missing_ok=True)
    journal = Journal(path, [])
    journal.write({"kind": "header", **header})
    return journal


def resume_journal(path: Path, header: Mapping[str, Any], *, restart: str = "--replace") -> Journal:
    """Opens the journal at ``path`` to resume it. restart: the option that its messages name for starting over.

    Raises: RecipeError (it is missing), ArtifactError (it is damaged, or from another version or machine).
    """
    if not path.is_file():
        raise RecipeError(f"no benchmark in {path.parent} to resume; run without --resume")
    records = _repaired(path, restart)
    check_same(records[0], header, path)
    return Journal(path, records)


def open_journal(folder: Path, header: Mapping[str, Any], *, resume: bool, replace: bool) -> Journal:
    """Opens the journal of ``folder``, new or resumed.

    Raises: RecipeError (the folder is in use, or there is nothing to resume), ArtifactError (its journal is damaged, or from
        another version, machine, recipe or protocol).
    """
    path = folder / JOURNAL
    if folder.is_file():
        raise RecipeError(f"{folder} is a file, not a folder; choose another --out")
    taken = folder.exists() and any(folder.iterdir())
    if taken and not path.is_file():
        raise RecipeError(f"{folder} contains other files and no benchmark; choose another --out")
    if resume:
        return resume_journal(path, header)
    if taken and not replace:
        raise RecipeError(
            f"{folder} already has a benchmark; use --resume to resume it, --replace to overwrite it, or choose another --out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stem in ("bench", "quality"):
            for ending in ("json", "csv", "png", "svg"):
                (folder / f"{stem}.{ending}").unlink(missing_ok=True)
        return begin(path, header)
    except OSError as error:
        raise RecipeError(f"cannot write {folder}: {error.strerror}; choose another --out") from error


def read_records(path: Path, *, restart: str = "--replace") -> list[dict[str, Any]]:
    """Reads the records of a file that may be written concurrently, the header first, without an incomplete last line.

    Raises: ArtifactError, as ``resume_journal``.
    """
    return _records(path, path.read_bytes().rpartition(b"\n")[0].split(b"\n"), restart)


def _records(path: Path, lines: list[bytes], restart: str, *, torn: bool = False) -> list[dict[str, Any]]:
    """Parses the lines. torn: skip a damaged last line."""
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else None
            if record is not None:
                record["kind"]
                records.append(record)
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines) or not torn:
                raise ArtifactError(f"{path}, line {number} is damaged: {error}; start over with {restart}") from error
    if not records or records[0]["kind"] != "header":
        raise ArtifactError(f"{path} has no header line; start over with {restart}")
    return records


def _repaired(path: Path, restart: str) -> list[dict[str, Any]]:
    """Returns the records, and removes a torn last line from the file."""
    lines = path.read_bytes().split(b"\n")
    records = _records(path, lines, restart, torn=True)
    if len(lines[-1]):  # a torn line, or a complete one without line break
        whole = b"".join(json.dumps(r).encode() + b"\n" for r in records)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_bytes(whole)
        os.replace(partial, path)
    return records


def check_same(stored: Mapping[str, Any], header: Mapping[str, Any], path: Path) -> None:
    """Raises ArtifactError with the differences between the file's header and this call's."""
    now = json.loads(json.dumps({"kind": "header", **header}))
    changes = list(differences(stored, now))
    if changes:
        more = f", and {len(changes) - _MOST_DIFFERENCES} more" if len(changes) > _MOST_DIFFERENCES else ""
        raise ArtifactError(
            f"{path} was measured with other settings: {'; '.join(changes[:_MOST_DIFFERENCES])}{more}. Their figures cannot share "
            "a table: resume with the original settings, or choose another --out"
        )


def differences(stored: Any, now: Any, key: str = "") -> Iterator[str]:
    """Yields ``key: X there, Y now`` for each leaf that differs."""
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
    """Reads the bench.json of a file or folder. Raises: RecipeError (it is missing), ArtifactError (it is another file)."""
    path = source / RESULT if source.is_dir() else source
    if not path.is_file():
        unfinished = (path.parent / JOURNAL).is_file() and source.is_dir()
        hint = (
            "the benchmark there is not finished: peftlab bench RECIPE --resume" if unfinished else "give a bench.json"
        )
        raise RecipeError(f"{path} does not exist; {hint}, or a folder that contains one")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version = document["header"]["format"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is not a result of peftlab bench, or damaged: {error!r}") from error
    if version != FORMAT:
        raise ArtifactError(
            f"{path} has format {version}, expected {FORMAT}: measure again with this version of peftlab"
        )
    return dict(document)
