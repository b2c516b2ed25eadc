"""metrics.jsonl: one JSON object per line, appended during training, repaired after a kill."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from peftlab.errors import ArtifactError


class MetricsLog:
    """Appends records to a file and flushes each, so that SIGKILL loses no complete line.

    Removes a torn last line first.

    Args:
        path: the file; it and its folder are created if missing.
        resume_step: the step of the checkpoint to resume from. Records of later steps are dropped, since those steps run
            again. Records without an integer ``step`` stay.

    Raises:
        ArtifactError: a line other than the last is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._repair(resume_step)
        self._file = self.path.open("a", encoding="utf-8", newline="\n")

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; non-finite floats become the strings "nan", "inf" and "-inf" (JSON has no such values)."""
        self._file.write(_to_line(record))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _repair(self, resume_step: int | None) -> None:
        records = read_metrics(self.path)
        if resume_step is not None:
            records = [r for r in records if not isinstance(r.get("step"), int) or r["step"] <= resume_step]
        whole = "".join(_to_line(record) for record in records).encode()
        if whole == self.path.read_bytes():
            return
        # Replaced by a rename: a kill here leaves the old file or the new one.
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        with temporary.open("wb") as file:
            file.write(whole)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the records of a metrics.jsonl, without a torn last line.

    Non-finite values are the strings "nan", "inf" and "-inf"; ``float`` reads them.

    Raises:
        ArtifactError: a line other than the last is not a JSON object.
    """
    lines = Path(path).read_bytes().rstrip(b"\n").split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            raise ArtifactError(
                f"{path}, line {number}: expected a JSON object, found {line[:60]!r}; the log is damaged"
            )
    return records


def _to_line(record: Mapping[str, Any]) -> str:
    return json.dumps(_json_safe(record), allow_nan=False) + "\n"


def _json_safe(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Mapping):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    return value
