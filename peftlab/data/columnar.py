"""Reads parquet and Arrow files (IPC, streams, feather), with the class names that their metadata carries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peftlab.data.table import Options, Table
from peftlab.errors import DataError, listed


def read_columnar(raw: bytes, path: Path, format_name: str, options: Options) -> Table:
    """The rows of a parquet or Arrow file. Numbers of a ``datasets.ClassLabel`` become the names of their classes.

    Raises: DataError: damaged, two columns of one name, or a number that is no class.
    """
    import pyarrow

    try:
        table = _open(raw, format_name)
    except (pyarrow.ArrowException, OSError) as exc:
        raise DataError(f"{path} is not a readable {format_name} file: {exc}", key=options.key) from None
    names = table.column_names
    if len(set(names)) != len(names):
        raise DataError(f"{path}: two columns have the same name: {listed(names)}", key=options.key)
    carried = class_names_of(_features(table.schema.metadata or {}))
    columns = {}
    for name in names:
        column = table.column(name)
        values = column.to_pylist()
        if pyarrow.types.is_float32(column.type) or pyarrow.types.is_float16(column.type):
            # The shortest decimal, as text files have it: 0.1 and not 0.10000000149011612.
            short = {v: float(str(np.float32(v))) for v in set(values) if v is not None}
            values = [short.get(v, v) for v in values]
        columns[name] = (
            named(values, carried[name], f"{path}, column {name!r}", options.key) if name in carried else values
        )
    return Table(columns, np.arange(1, table.num_rows + 1, dtype=np.int64), "record", class_names=carried)


def class_names_of(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Column -> class names, from features as ``datasets`` stores them; also of a column of lists of classes."""
    named_by = {}
    for name, feature in features.items():
        while isinstance(feature, list) and len(feature) == 1:  # a list of one feature is a column of lists
            feature = feature[0]
        while isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
            feature = feature["feature"]
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
            named_by[name] = tuple(map(str, feature["names"]))
    return named_by


def named(values: list[Any], names: tuple[str, ...], where: str, key: str) -> list[Any]:
    """The class name of each number, also in lists; None for none, which ``datasets`` also writes as -1.

    Raises: DataError: a number that is no class.
    """

    def name(value: Any, record: int) -> Any:
        if isinstance(value, list):
            return [name(inner, record) for inner in value]
        if value is not None and not -1 <= value < len(names):
            raise DataError(
                f"{where}, record {record}: class number {value}, but the file names {len(names)} classes: {listed(names)}",
                key=key,
            )
        return None if value is None or value < 0 else names[value]

    return [name(value, record) for record, value in enumerate(values, 1)]


def _open(raw: bytes, format_name: str) -> Any:
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    source = pyarrow.BufferReader(raw)
    if format_name == "parquet":
        return pyarrow.parquet.ParquetFile(source).read()
    if raw.startswith(b"ARROW1"):
        return pyarrow.ipc.open_file(source).read_all()
    if raw.startswith(b"FEA1"):
        return pyarrow.feather.read_table(source)
    return pyarrow.ipc.open_stream(source).read_all()


def _features(metadata: Mapping[bytes, bytes]) -> Mapping[str, Any]:
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}
