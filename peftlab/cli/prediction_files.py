"""Writes predictions to a file that appears only when it is complete."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from peftlab.errors import RecipeError, ResourceError

_FORMATS = (".jsonl", ".csv")


def check_destination(output: str, *, replace: bool) -> Path:
    """Checks the path before any work and returns it. Raises: RecipeError."""
    path = Path(output)
    if path.suffix.lower() not in _FORMATS:
        raise RecipeError(f"--output {output}: expected a name that ends in {' or '.join(_FORMATS)}")
    if path.is_dir():
        raise RecipeError(f"--output {output}: expected a file, found a folder")
    if not path.parent.is_dir():
        raise RecipeError(f"--output {output}: folder {path.parent} does not exist; create it first")
    if path.exists() and not replace:
        raise RecipeError(f"--output {output}: the file exists; overwrite it with --replace or choose another name")
    return path


def check_folder(masks: str, *, replace: bool) -> None:
    """Checks the folder of --masks before any work. Raises: RecipeError."""
    path = Path(masks)
    if path.exists() and not path.is_dir():
        raise RecipeError(f"--masks {masks}: expected a folder, found a file")
    if path.is_dir() and any(path.iterdir()) and not replace:
        raise RecipeError(
            f"--masks {masks}: the folder has files; overwrite those of the same name with --replace or choose another folder"
        )


class PredictionFile:
    """Writes records to a temporary file and renames it at the end; removes it after an error.

    The columns of a csv file are those of all records: a later record may bring one, such as ``note``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}")
        self._is_csv = path.suffix.lower() == ".csv"
        self._columns: list[str] = []
        self.num_rows = 0

    def __enter__(self) -> Self:
        try:
            self._file = open(self._partial, "w", encoding="utf-8", newline="")
        except OSError as error:
            raise RecipeError(f"cannot write {self._path}: {error.strerror}") from error
        return self

    def add(self, record: dict[str, Any]) -> None:
        """Writes one record."""
        try:
            self._file.write(
                self._csv_line(_flat(record)) if self._is_csv else json.dumps(record, ensure_ascii=False) + "\n"
            )
        except OSError as error:
            raise ResourceError(f"cannot write {self._path}: {error.strerror}") from error
        self.num_rows += 1

    def _csv_line(self, record: dict[str, Any]) -> str:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        self._columns += [name for name in record if name not in self._columns]
        writer.writerow([_cell(record.get(name)) for name in self._columns])
        return buffer.getvalue()

    def _add_header(self) -> None:
        """Writes the header of a csv file, whose columns are known at the end, before its rows."""
        rows = self._partial.with_name(f"{self._partial.name}.rows")
        os.replace(self._partial, rows)
        longest_cell = csv.field_size_limit(sys.maxsize)
        try:
            with (
                rows.open(encoding="utf-8", newline="") as old,
                self._partial.open("w", encoding="utf-8", newline="") as new,
            ):
                writer = csv.writer(new, lineterminator="\n")
                writer.writerow(self._columns)
                writer.writerows(row + [""] * (len(self._columns) - len(row)) for row in csv.reader(old))
        finally:
            csv.field_size_limit(longest_cell)
            rows.unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._file.close()
            if error is None:
                if self._is_csv:
                    self._add_header()
                os.replace(self._partial, self._path)
        except OSError as failure:
            raise ResourceError(f"cannot write {self._path}: {failure.strerror}") from failure
        finally:
            self._partial.unlink(missing_ok=True)


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """``{"probabilities": {"a": p}}`` becomes ``{"probability_a": p}``."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if name == "probabilities" and isinstance(value, dict):
            flat |= {f"probability_{inner}": number for inner, number in value.items()}
        else:
            flat[name] = value
    return flat


def _cell(value: Any) -> Any:
    """A value in a csv file: lists and mappings as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
