"""Annotated rows: the forms that are read, and what each fault says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftlab.data import Annotated, Annotations, Rows, load_rows
from peftlab.errors import DataError, RecipeError

TEXT = "Ann Lee saw caf\u00e9s in Rome"


def read(
    row: dict[str, Any],
    columns: dict[str, str] | None = None,
    *,
    names: dict[str, str] | None = None,
    labelled: bool = True,
    per_word: bool = False,
) -> Annotated:
    rows = Rows.from_dicts([row], name="a.jsonl")
    annotations = Annotations(columns or {}, names or {}, per_word=per_word)
    return annotations.reader(rows, labelled=labelled)(rows.row(0), rows.where(0))


SPANS = [{"start": 0, "end": 7, "label": "PER"}, {"start": 21, "end": 25, "label": "LOC"}]
FORMS: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"text": TEXT, "spans": SPANS}, {}),
    ({"text": TEXT, "spans": SPANS[::-1]}, {}),
    ({"text": TEXT, "entities": [[0, 7, "PER"], [21, 25, "LOC"]]}, {}),
    ({"body": TEXT, "label": [(0, 7, "PER"), (21, 25, "LOC")]}, {"text": "body", "spans": "label"}),
    ({"text": TEXT, "spans": {"entities": [[0, 7, "PER"], [21, 25, "LOC"]]}}, {}),
    ({"text": TEXT, "spans": [{"start": s["start"], "end": s["end"], "type": s["label"]} for s in SPANS]}, {}),
    ({"text": TEXT, "spans": json.dumps(SPANS)}, {}),
    ({"text": TEXT, "spans": [{**SPANS[0], "text": "Ann Lee"}, SPANS[1]]}, {}),
    ({"tokens": TEXT.split(), "tags": ["B-PER", "I-PER", "O", "O", "O", "B-LOC"]}, {}),
    ({"tokens": TEXT.split(), "ner_tags": ["I-PER", "I-PER", "O", "O", "O", "I-LOC"]}, {}),
    ({"tokens": TEXT.split(), "tags": ["B-PER", "E-PER", "O", "O", "O", "S-LOC"], "text": "x"}, {}),
    ({"words": TEXT.split(), "t": ["PER", "PER", "O", "O", "O", "LOC"]}, {"tokens": "words", "tags": "t"}),
    ({"tokens": json.dumps(TEXT.split()), "tags": json.dumps(["B-PER", "I-PER", "O", "O", "O", "B-LOC"])}, {}),
]


@pytest.mark.parametrize(("row", "columns"), FORMS)
def test_every_form_gives_the_same_entities(row: dict[str, Any], columns: dict[str, str]) -> None:
    found = read(row, columns)
    assert found.text == TEXT and found.entities == [(0, 7, "PER"), (21, 25, "LOC")]
    assert [TEXT[a:b] for a, b in found.words] == TEXT.split()


def test_numbers_get_the_names_of_the_file_or_the_recipe(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({
        "tokens": datasets.List(datasets.Value("string")),
        "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-PER", "I-PER"])),
    })  # fmt: skip
    rows = [{"tokens": ["Ann", "Lee", "saw"], "ner_tags": [1, 2, 0]}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    loaded = load_rows(str(tmp_path / "a.parquet"))
    assert loaded.columns["ner_tags"] == [["B-PER", "I-PER", "O"]]
    assert Annotations({}, {}, per_word=False).labels(loaded) == ["PER"]
    names = {"0": "O", "1": "B-PER", "2": "I-PER"}
    assert read(rows[0], names=names).entities == [(0, 7, "PER")]


def test_a_tag_per_word_and_unlabelled_rows() -> None:
    row = {"tokens": ["a", "b"], "pos": ["DET", "O"]}
    assert read(row, {"word_tags": "pos"}, per_word=True).tags == ["DET", "O"]
    assert read({"tokens": ["a", "b"]}, labelled=False).words == [(0, 1), (2, 3)]
    # A run that was trained on lists reads texts too, and the other way round.
    assert read({"text": "a b"}, {"tokens": "tokens", "tags": "tags"}, labelled=False).text == "a b"
    assert read({"tokens": ["a", "b"]}, {"text": "text", "spans": "spans"}, labelled=False).is_list


def test_white_space_around_a_span_is_cut_off() -> None:
    found = read({"text": TEXT, "spans": [[11, 18, "X"]]})
    assert found.entities == [(12, 17, "X")] and found.notes == ("trimmed",)


FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"text": TEXT, "spans": [[0, 99, "PER"]]}, "spans", "span 1: ends at character 99, but the text has 25; .* not bytes"),
    ({"text": TEXT, "spans": [[-1, 3, "PER"]]}, "spans", r"expected 0 <= start < end, found start -1 and end 3"),
    ({"text": TEXT, "spans": [[3, 3, "PER"]]}, "spans", r"found start 3 and end 3"),
    ({"text": TEXT, "spans": [[7, 8, "PER"]]}, "spans", "there is no word in ' '"),
    ({"text": TEXT, "spans": [[0, 7, "PER"], [4, 9, "LOC"]]}, "spans", r"'Ann Lee' \(0 to 7\) and 'Lee s' \(4 to 9\) overlap"),
    ({"text": TEXT, "spans": [[0, 7, "PER"], [0, 7, "PER"]]}, "spans", "overlap; a word belongs to one entity"),
    ({"text": TEXT, "spans": [[0, 7, ""]]}, "spans", "the span has no label"),
    ({"text": TEXT, "spans": [[0, 7, "O"]]}, "spans", "'O' stands for no entity"),
    ({"text": TEXT, "spans": [[0, 7]]}, "spans", r"expected \{start: 0, end: 5, label: PERSON\} or .*; found \[0, 7\]"),
    ({"text": TEXT, "spans": [{"start": "0", "end": 7, "label": "PER"}]}, "spans", "expected {start: 0"),
    ({"text": TEXT, "spans": [{"start": 0, "end": 6, "label": "PER", "text": "Ann Lee"}]}, "spans",
     "its text is 'Ann Lee', but characters 0 to 6 are 'Ann Le'"),
    ({"text": TEXT, "spans": None}, "spans", r"expected a list of spans, found nothing; a text without entities has \[\]"),
    ({"text": TEXT, "spans": "PER"}, "spans", "expected a list of spans, found 'PER'"),
    ({"text": "  ", "spans": []}, "text", "the text is empty; data.empty=drop"),
    ({"text": ["a"], "spans": []}, "text", r"expected text, found \['a'\]"),
    ({"text": TEXT, "spam": []}, "spans", "no column 'spans'; found the columns 'text', 'spam'; did you mean 'spam'"),
    ({"tokens": ["a", "b"], "tags": ["O"]}, "tags", "2 words but 1 tags; a word has one tag"),
    ({"tokens": ["a", "b"], "tags": "O O"}, "tags", "expected a list of tags, one per word, found 'O O'"),
    ({"tokens": ["a", "b"], "tags": ["B-X", None]}, "tags", r"word 2 \('b'\) has no label"),
    ({"tokens": ["a", "b"], "tags": ["B-X", "X"]}, "tags", r"word 2 \('b'\): the tag 'X' has no prefix such as B- or I-"),
    ({"tokens": ["a", None], "tags": ["O", "O"]}, "tokens", "word 2: expected text, found null"),
    ({"tokens": [], "tags": []}, "tokens", "there are no words; data.empty=drop"),
    ({"tokens": "a b", "tags": ["O", "O"]}, "tokens", "expected a list of words, found 'a b'"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "part", "message"), FAULTS)
def test_a_fault_is_named_with_its_row(row: dict[str, Any], part: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(row)
    assert caught.value.key == f"data.columns.{part}"
    assert str(caught.value).startswith("a.jsonl")


def test_label_names_are_all_used_and_all_there() -> None:
    row = {"text": TEXT, "spans": [[0, 7, "p"]]}
    assert read(row, names={"p": "PER"}).entities == [(0, 7, "PER")]
    with pytest.raises(DataError, match=r"has 'p', which is missing in data\.label_names; it has 'q'"):
        read(row, names={"q": "PER"})
    with pytest.raises(DataError, match="no row has 'q', found 'p'; remove it"):
        Annotations({}, {"p": "PER", "q": "LOC"}, per_word=False).labels(Rows.from_dicts([row], name="a"))


def test_columns_of_both_forms_are_refused() -> None:
    with pytest.raises(RecipeError, match="not both: found 'tags', 'text'"):
        Annotations({"tags": "t", "text": "x"}, {}, per_word=False)


def test_blank_rows_say_what_is_missing() -> None:
    texts = [
        {"text": "a", "spans": []},
        {"text": " ", "spans": []},
        {"text": "b", "spans": None},
        {"text": "", "spans": None},
    ]
    annotations = Annotations({}, {}, per_word=False)
    found = annotations.blank_rows(Rows.from_dicts(texts, name="a"), labelled=True)
    assert found == {1: "there are no words", 2: "there are no spans", 3: "there are no words"}
    lists = [{"tokens": ["a"], "tags": ["O"]}, {"tokens": [], "tags": []}, {"tokens": ["a"], "tags": None}]
    rows = Rows.from_dicts(lists, name="a")
    assert annotations.blank_rows(rows, labelled=True) == {1: "there are no words", 2: "there are no tags"}
    assert annotations.blank_rows(rows, labelled=False) == {1: "there are no words"}
