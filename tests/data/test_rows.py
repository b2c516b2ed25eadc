from __future__ import annotations

import numpy as np
import pytest

from peftlab.data import Rows
from peftlab.data.rows import Origin
from peftlab.errors import DataError


@pytest.fixture
def rows() -> Rows:
    return Rows(
        name="folder",
        columns={"text": ["a", "b", "c"], "label": [0, 1, 0]},
        fingerprint="f00",
        origins=(Origin("folder/a.csv", "line"), Origin("folder/b.json", "record")),
        origin_index=np.array([0, 0, 1]),
        positions=np.array([2, 5, 17]),
    )


def test_rows_have_length_rows_and_columns(rows: Rows) -> None:
    assert len(rows) == 3
    assert rows.row(1) == {"text": "b", "label": 1}
    assert rows.column("text") == ["a", "b", "c"]


def test_where_counts_lines_or_records(rows: Rows) -> None:
    assert [rows.where(i) for i in range(3)] == ["folder/a.csv:2", "folder/a.csv:5", "folder/b.json, record 17"]


def test_column_that_is_unknown_names_the_nearest(rows: Rows) -> None:
    with pytest.raises(DataError) as info:
        rows.column("txet", key="data.columns.text")
    assert str(info.value) == "folder: no column 'txet'; found the columns 'text', 'label'; did you mean 'text'?"
    assert info.value.key == "data.columns.text"


def test_column_that_is_unknown_without_a_near_name(rows: Rows) -> None:
    with pytest.raises(DataError, match=r"found the columns 'text', 'label'$") as info:
        rows.column("zzz")
    assert info.value.key == "data.columns"


@pytest.mark.parametrize("indices", [[2, 0], (2, 0), np.array([2, 0])])
def test_select_keeps_order_and_provenance(rows: Rows, indices: list[int]) -> None:
    chosen = rows.select(indices)
    assert chosen.columns == {"text": ["c", "a"], "label": [0, 0]}
    assert [chosen.where(0), chosen.where(1)] == ["folder/b.json, record 17", "folder/a.csv:2"]
    assert (chosen.name, chosen.fingerprint) == ("folder", "f00")
    assert chosen.select([1]).where(0) == "folder/a.csv:2"
    assert len(rows) == 3


def test_select_of_nothing_is_empty(rows: Rows) -> None:
    assert len(rows.select([])) == 0
    assert rows.select([]).columns == {"text": [], "label": []}


def test_rows_store_provenance_as_two_numbers_per_row(rows: Rows) -> None:
    many = rows.select(np.zeros(1000, dtype=np.int64))
    assert many.positions.dtype == many.origin_index.dtype == np.int64
    assert many.origins is rows.origins


def test_from_dicts_makes_rows_in_memory() -> None:
    rows = Rows.from_dicts([{"a": 1, "b": "x"}, {"b": "y", "a": 2}], name="chat")
    assert rows.columns == {"a": [1, 2], "b": ["x", "y"]}
    assert rows.where(1) == "chat, record 2"
    assert len(Rows.from_dicts([], name="chat")) == 0
