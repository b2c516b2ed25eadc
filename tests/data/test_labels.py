from __future__ import annotations

import dataclasses
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import yaml

from peftlab.data import Rows, class_names, load_rows, read_labels
from peftlab.data.labels import similar_labels
from peftlab.data.rows import Origin
from peftlab.errors import DataError


def rows_of(values: list[Any]) -> Rows:
    count = len(values)
    return Rows(
        name="a.csv",
        columns={"label": values},
        fingerprint="",
        origins=(Origin("a.csv", "line"),),
        origin_index=np.zeros(count, dtype=np.int64),
        positions=np.arange(2, count + 2),
    )


def test_read_labels_converts_values_to_text() -> None:
    values = ["ham", " spam ", 3, 4.0, 2.5, True, False, -1.0, 0, "1.0", "2.50", "True", "1.0.0", "007", "1e3"]
    expected = ["ham", "spam", "3", "4", "2.5", "true", "false", "-1", "0", "1", "2.5", "true", "1.0.0", "007", "1e3"]
    assert read_labels(rows_of(values), "label") == expected


@pytest.mark.parametrize("missing", [None, "", "  ", float("nan")])
def test_read_labels_counts_and_locates_missing_labels(missing: Any) -> None:
    with pytest.raises(DataError) as info:
        read_labels(rows_of(["a", missing, "b", missing]), "label")
    assert str(info.value).startswith("2 of 4 rows have no label in the column 'label': a.csv:3, a.csv:5;")
    assert info.value.key == "data.columns.label"


def test_read_labels_names_only_the_first_missing_labels() -> None:
    with pytest.raises(DataError, match=r"^9 of 9 rows .*: a.csv:2, a.csv:3, a.csv:4, a.csv:5, a.csv:6, \.\.\.;"):
        read_labels(rows_of([None] * 9), "label")


def test_read_labels_of_an_unknown_column_names_the_key() -> None:
    with pytest.raises(DataError, match="did you mean 'label'") as info:
        read_labels(rows_of(["a"]), "lable", key="data.columns.label")
    assert info.value.key == "data.columns.label"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (["a"], "list"),
        ("['a']", "a list as text"),
        ("[1, 0.5]", "a list as text"),
        ("[]", "a list as text"),
        ({"a": 1}, "dict"),
        (b"a", "bytes"),
    ],
)
def test_read_labels_refuses_other_types(value: Any, kind: str) -> None:
    with pytest.raises(
        DataError,
        match=f"^a.csv:3: expected text, a number or true/false .* found {kind}(; a row has one label here|; store the label as text$|$)",
    ):
        read_labels(rows_of(["a", value]), "label")


def test_label_names_rename_labels() -> None:
    assert read_labels(rows_of([0, 1.0, "1"]), "label", label_names={"0": "ham", "1": "spam"}) == [
        "ham",
        "spam",
        "spam",
    ]
    assert read_labels(rows_of([True]), "label", label_names={"true": "yes"}) == ["yes"]


def test_label_names_refuse_a_value_they_lack() -> None:
    with pytest.raises(DataError) as info:
        read_labels(rows_of(["pos", "negg"]), "label", label_names={"pos": "+", "neg": "-"})
    assert str(info.value) == (
        "a.csv:3: the column 'label' contains 'negg', which is missing in data.label_names; it has 'pos', 'neg'; "
        "did you mean 'neg'?"
    )
    assert info.value.key == "data.label_names"


def test_label_names_refuse_a_name_that_no_row_has() -> None:
    names = {"0": "ham", "1": "spam", "2": "other"}
    with pytest.raises(DataError, match=r"^a.csv: no row has '2' in the column 'label', found '0', '1';") as info:
        read_labels(rows_of([0, 1]), "label", label_names=names)
    assert info.value.key == "data.label_names"
    assert read_labels(rows_of([0, 1]), "label", label_names=names, all_names_used=False) == ["ham", "spam"]


def test_bins_put_a_value_above_an_edge_into_the_next_bin() -> None:
    bins = ([-0.5, 0.5], ["negative", "neutral", "positive"])
    values = [-4, -0.5, "-0.49", "0.5", 0.51, " 3e0 ", "inf", "-inf"]
    expected = ["negative", "negative", "neutral", "neutral", "positive", "positive", "positive", "negative"]
    assert read_labels(rows_of(values), "label", bins=bins) == expected


@pytest.mark.parametrize("value", ["good", "nan", "1,5", True])
def test_bins_need_numbers(value: Any) -> None:
    with pytest.raises(
        DataError, match=r"^a.csv:3: expected a number in the column 'label' to cut into bins, "
    ) as info:
        read_labels(rows_of([0, value]), "label", bins=([0.0], ["low", "high"]))
    assert info.value.key == "data.bins"


def test_bins_and_label_names_exclude_each_other() -> None:
    with pytest.raises(DataError, match="label_names or bins, not both"):
        read_labels(rows_of([1]), "label", label_names={"1": "one"}, bins=([0.0], ["low", "high"]))


def test_class_names_are_sorted_by_number_or_by_text() -> None:
    assert class_names(["10", "9", "-1", "9"]) == ["-1", "9", "10"]
    assert class_names(["10", "9", "a"]) == ["10", "9", "a"]
    assert class_names(["1.5", "10.5", "2.5"]) == ["1.5", "10.5", "2.5"]


def test_class_names_refuse_one_class_or_none() -> None:
    with pytest.raises(DataError) as info:
        class_names(["ham"] * 412)
    assert str(info.value) == "one class only: 'ham' in all 412 rows; classification needs at least two"
    assert info.value.key == "data.columns.label"
    with pytest.raises(DataError, match="no labels"):
        class_names([])


def test_labels_are_the_same_from_every_file_format(tmp_path: Path) -> None:
    for values, expected in (
        ([1, 0, 1], ["1", "0", "1"]),
        ([1.0, 0.0, 1.0], ["1", "0", "1"]),
        ([0.5, 1.25, 3.0], ["0.5", "1.25", "3"]),
        ([True, False, True], ["true", "false", "true"]),
        ([Decimal("1.00"), Decimal("0.50"), Decimal("2.125000000000000000")], ["1", "0.5", "2.125"]),
        (["b", "a", "b"], ["b", "a", "b"]),
    ):
        frame = pandas.DataFrame({"text": ["x", "y", "z"], "label": values})
        frame.to_csv(tmp_path / "a.csv", index=False)
        frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
        frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
        frame.to_json(tmp_path / "a.json")
        frame.to_parquet(tmp_path / "a.parquet")
        frame.to_feather(tmp_path / "a.feather")
        for file in ("a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet", "a.feather"):
            assert read_labels(load_rows(str(tmp_path / file)), "label") == expected, (file, values)


def test_label_names_may_name_the_value_in_the_file_or_its_number() -> None:
    values = rows_of(["True", "False", "1.0"])
    assert read_labels(values, "label", label_names={"True": "yes", "false": "no", "1.0": "one"}) == [
        "yes",
        "no",
        "one",
    ]
    carried = dataclasses.replace(rows_of(["ham", "spam"]), class_names={"label": ("ham", "spam")})
    assert read_labels(carried, "label", label_names={"0": "good", "1": "bad"}) == ["good", "bad"]
    assert read_labels(carried, "label", label_names={"ham": "good", "1": "bad"}) == ["good", "bad"]


def test_label_message_about_many_names_is_short() -> None:
    names = {f"name {i}": str(i) for i in range(3000)}
    with pytest.raises(DataError) as info:
        read_labels(rows_of(["name 7", "Name 8"]), "label", label_names=names)
    assert "'name 7' and 2,992 more; did you mean 'name 8'? It differs by case, spaces or Unicode form only" in str(
        info.value
    )
    with pytest.raises(DataError) as info:
        read_labels(rows_of(["name 7"]), "label", label_names=names)
    assert len(str(info.value)) < 400


def test_class_names_refuse_scores_and_their_remedy_works() -> None:
    values = [f"{i / 7 - 100:.4f}" for i in range(3000)]
    with pytest.raises(DataError) as info:
        class_names(read_labels(rows_of(values), "label"))
    message = str(info.value)
    assert message.startswith("the labels are 3,000 different numbers from -100 to 328.429: a score, not a class")
    assert info.value.key == "data.bins"
    bins = yaml.safe_load(message.partition("data.bins=")[2])
    labels = read_labels(rows_of(values), "label", bins=(bins["edges"], bins["names"]))
    assert class_names(labels) == ["high", "low"]
    assert abs(labels.count("low") - 1500) <= 10
    assert len(class_names([f"{i / 2}" for i in range(12)])) == 12  # ratings with halves are classes
    assert len(class_names([str(i) for i in range(3000)] * 3)) == 3000
    with pytest.raises(
        DataError, match=r"^the labels are 3,000 different numbers from 0 to 2999: a score, not a class"
    ):
        class_names([str(i) for i in range(3000)])


def test_similar_labels_differ_by_case_spaces_or_unicode_form() -> None:
    names = ["ham", "Ham", "very good", "very  good", "caf\u00e9", "cafe\u0301", "x", "x\u200b", "y"]
    assert similar_labels(names) == [names[0:2], names[2:4], names[4:6], names[6:8]]
