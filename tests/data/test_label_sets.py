"""Sets of labels and numbers, read from the columns of a file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peftlab.data import Rows, read_numbers, rows_per_class, split_per_class
from peftlab.data.label_sets import label_set_names, read_label_sets
from peftlab.errors import DataError


def rows(**columns: Any) -> Rows:
    count = len(next(iter(columns.values())))
    return Rows.from_dicts(
        [{name: values[i] for name, values in columns.items()} for i in range(count)], name="a.jsonl"
    )


@pytest.mark.parametrize(
    ("values", "separator"),
    [
        ([["a", "b"], [], ["b", "b"]], None),
        (['["a", "b"]', "[]", "['b']"], None),
        (["a; b", "", "b"], ";"),
        ([np.array(["a", "b"]), None, ["b"]], None),
    ],
)
def test_lists_and_texts_give_the_same_sets(values: list[Any], separator: str | None) -> None:
    found = read_label_sets(rows(tags=values), "tags", separator=separator)
    assert found == [["a", "b"], [], ["b"]]
    assert label_set_names(found) == ["a", "b"]


def test_columns_of_0_and_1_give_sets() -> None:
    table = rows(rude=["1", "0", True], mean=[0, 1.0, "True"])
    assert read_label_sets(table, "rude, mean") == [["rude"], ["mean"], ["rude", "mean"]]
    with pytest.raises(DataError, match=r"record 1: expected 0 or 1 in the column 'mean', found 2"):
        read_label_sets(rows(rude=[1], mean=[2]), "rude, mean")
    with pytest.raises(DataError, match=r"no column 'mean'"):
        read_label_sets(rows(rude=[1]), "rude, mean")


def test_values_can_be_renamed() -> None:
    assert read_label_sets(rows(tags=[[1, 2], [2]]), "tags", label_names={"1": "one", "2": "two"}) == [
        ["one", "two"],
        ["two"],
    ]
    with pytest.raises(DataError, match=r"record 1: .*contains '3', which is missing in data\.label_names"):
        read_label_sets(rows(tags=[[3]]), "tags", label_names={"1": "one"})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a;b", r"found the text 'a;b'; set data\.separator"),
        (3, r"expected a list of labels in the column 'tags', found 3; .*columns=\{label: tags\}"),
        ([{"x": 1}], r"expected text or a number as label"),
        ([""], r"expected text or a number as label, found ''"),
    ],
)
def test_other_values_are_refused_with_their_row(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl, record 2: .*{message}"):
        read_label_sets(rows(tags=[[], value]), "tags")


def test_numbers_are_read_from_text_and_refused_with_their_row() -> None:
    assert read_numbers(rows(score=["3.5", 2, True]), "score").tolist() == [3.5, 2.0, 1.0]
    for value, message in (
        ("n/a", "expected a finite number .*'n/a'"),
        (float("inf"), "inf"),
        (None, "no number"),
        (" ", "no number"),
    ):
        with pytest.raises(DataError, match=rf"record 2: .*{message}"):
            read_numbers(rows(score=[1, value]), "score")


def test_rows_per_class_are_drawn_by_the_seed() -> None:
    labels = ["a"] * 30 + ["b"] * 10
    kept = rows_per_class(labels, 8, seed=1)
    assert [labels[i] for i in kept] == ["a"] * 8 + ["b"] * 8
    assert kept.tolist() == rows_per_class(labels, 8, seed=1).tolist() != rows_per_class(labels, 8, seed=2).tolist()
    with pytest.raises(DataError, match="expected 11 training rows of each class, found 10 of 'b'; draw fewer"):
        rows_per_class(labels, 11)


def test_the_suffix_is_that_of_no_file(tmp_path: Any) -> None:
    assert split_per_class("a.csv#8-per-class", key="data.train") == ("a.csv", 8)
    for name in ("a.csv", "a.csv#8", "a.csv#0-per-class", "#8-per-class"):
        assert split_per_class(name, key="data.train") == (name, None)
    (tmp_path / "x#8-per-class").write_text("a")
    assert split_per_class(str(tmp_path / "x#8-per-class"), key="data.train")[1] is None
