"""Rows that cannot be an input of a prediction."""

from __future__ import annotations

import pytest

from peftlab.data import Rows
from peftlab.errors import DataError
from peftlab.tasks.inputs import blank_values, cut_note, unusable_rows


def read(rows: Rows) -> None:
    for i, value in enumerate(rows.column("n")):
        if value < 0:
            raise DataError(f"{rows.where(i)}: {value} is negative")


def test_unusable_rows_are_blank_or_unreadable() -> None:
    rows = Rows.from_dicts(
        [{"n": n, "t": t} for n, t in [(1, "a"), (-2, "b"), (-3, ""), (4, None), (5, "c")]], name="x"
    )
    assert unusable_rows(rows, read, column="t") == {
        2: "the text is empty",
        3: "the text is empty",
        1: "-2 is negative",
    }
    assert unusable_rows(rows, read, column=None) == {1: "-2 is negative", 2: "-3 is negative"}
    with pytest.raises(DataError, match="no column 'u'"):
        unusable_rows(rows, read, column="u")


def test_blank_values_keep_the_first_reason() -> None:
    rows = Rows.from_dicts([{"a": "", "b": ""}, {"a": "x", "b": None}, {"a": "x", "b": "y"}], name="x")
    assert blank_values(rows, {"a": "no a", "b": "no b"}) == {0: "no a", 1: "no b"}


def test_cut_note_names_both_lengths() -> None:
    assert cut_note(12345, 512) == {"note": "cut to 512 of 12,345 tokens"}
    assert cut_note(512, 512) == {}
