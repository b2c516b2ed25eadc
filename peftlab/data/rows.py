"""The rows of a data set: columns in memory, and the place of each row in its file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from peftlab.errors import DataError, listed

IntArray = npt.NDArray[np.int64]


class Origin(NamedTuple):
    """A file (or hub split) that rows came from, and the unit of their 1-based positions in it."""

    path: str
    unit: Literal["line", "record"]


class Note(NamedTuple):
    """What reading decided or noticed, for `peftlab check`; ``key`` is the recipe key that changes it."""

    kind: str
    message: str
    key: str | None = None


@dataclass(frozen=True, eq=False)
class Rows:
    """A table of N rows that records where each row came from.

    Args:
        name: the data source as written in the recipe.
        columns: column name -> N values; csv and tsv values are text, others have the type in the file.
        fingerprint: hex sha256 over the bytes of the files in order (for one file its ``sha256sum``), or the
            fingerprint of the hub data set. A selection keeps that of its source: the recipe determines the selection.
        origins: the files, in reading order.
        origin_index: [N] int64, the index into ``origins`` of each row.
        positions: [N] int64, the 1-based line (where the row starts) or record number of each row in its file.
        left_out: the places of rows of the source that are not in the table, by reason; a selection has none.
        class_names: column -> the class names that the file carries, in the order of their numbers; the values of such
            a column are these names.
        notes: what reading decided or noticed about the whole source. A selection keeps them.
    """

    name: str
    columns: dict[str, list[Any]]
    fingerprint: str
    origins: tuple[Origin, ...]
    origin_index: IntArray
    positions: IntArray
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    def __post_init__(self) -> None:
        num_rows = len(self.positions)
        assert len(self.origin_index) == num_rows
        assert all(len(values) == num_rows for values in self.columns.values())

    @classmethod
    def from_dicts(cls, rows: Sequence[Mapping[str, Any]], *, name: str) -> Rows:
        """Rows from memory, all with the keys of the first one. ``where`` counts them as records of ``name``."""
        columns = {column: [row[column] for row in rows] for column in (rows[0] if rows else {})}
        numbers = np.arange(len(rows), dtype=np.int64)
        return cls(name, columns, "", (Origin(name, "record"),), np.zeros_like(numbers), numbers + 1)

    def __len__(self) -> int:
        return len(self.positions)

    def where(self, index: int) -> str:
        """``path/file.csv:17`` for a row of a line-based file, ``path/file.json, record 17`` for the others."""
        path, unit = self.origins[self.origin_index[index]]
        position = self.positions[index]
        return f"{path}:{position}" if unit == "line" else f"{path}, record {position}"

    def row(self, index: int) -> dict[str, Any]:
        """Column name -> value of one row."""
        return {name: values[index] for name, values in self.columns.items()}

    def sample(self, most: int = 50) -> dict[str, Any]:
        """Column name -> the first of its first ``most`` values that is not null."""
        return {name: next((v for v in values[:most] if v is not None), None) for name, values in self.columns.items()}

    def column(self, name: str, *, key: str = "data.columns") -> list[Any]:
        """The N values of a column (not a copy).

        Raises: DataError at ``key``: no column has this name.
        """
        if name in self.columns:
            return self.columns[name]
        near = difflib.get_close_matches(name, self.columns, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{self.name}: no column {name!r}; found the columns {listed(self.columns)}{hint}", key=key)

    def select(self, indices: Sequence[int] | IntArray) -> Rows:
        """The rows at ``indices``, in that order, with their origins."""
        index = np.asarray(indices, dtype=np.int64)
        chosen = index.tolist()
        return replace(
            self,
            columns={name: [values[i] for i in chosen] for name, values in self.columns.items()},
            origin_index=self.origin_index[index],
            positions=self.positions[index],
            left_out={},
        )
