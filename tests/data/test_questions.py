"""Questions: the layouts of SQuAD and simple ones, and what is wrong with their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftlab.data import Question, Questions, load_rows
from peftlab.errors import DataError

CONTEXT = "The cat lives in Paris, the dog lives in Rome."


def read(columns: dict[str, str] | None = None, *, labelled: bool = True, **row: Any) -> Question:
    row = {"question": "Where?", "context": CONTEXT, **row}
    return Questions(columns or {}).read(row, "a.jsonl:3", labelled=labelled)


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["Paris", "in Paris"], "answer_start": [17, 14]},
        [{"text": "Paris", "answer_start": 17}, {"text": "in Paris", "answer_start": 14}],
        [{"text": "Paris", "start": 17.0}, {"text": "in Paris"}],
        ["Paris", "in Paris"],
        '{"text": ["Paris", "in Paris"], "answer_start": [17, 14]}',
        "{'text': ['Paris', 'in Paris'], 'answer_start': [17, 14]}",
    ],
    ids=["hub", "squad", "start", "texts", "json in csv", "python in csv"],
)
def test_layouts_of_answers(answers: Any) -> None:
    question = read(answers=answers)
    assert question == Question("Where?", CONTEXT, ("Paris", "in Paris"), 17)
    assert CONTEXT[17:22] == "Paris"


def test_simple_rows() -> None:
    assert read(answer="Rome") == Question("Where?", CONTEXT, ("Rome",), 41)
    assert read(answer="lives").ambiguous and read(answer="lives").start == 8
    placed = read(answer="lives", answer_start="32")
    assert placed.start == 32 and not placed.ambiguous
    assert read({"answers": "gold"}, gold=" Rome ", answer="cat").answers == ("Rome",)
    assert read({"answers": "gold", "answer_start": "at"}, gold=" Rome", at=40).start == 41
    assert read({"question": "q", "context": "c"}, q=7, c="6 or 7", answer=7) == Question("7", "6 or 7", ("7",), 5)


@pytest.mark.parametrize(
    "row",
    [
        {"answers": {"text": [], "answer_start": []}},
        {"answers": []},
        {"answer": ""},
        {"answers": ["Paris"], "is_impossible": True},
        {"answers": None, "is_impossible": "true"},
        {"is_impossible": 1},
    ],
    ids=str,
)
def test_rows_without_an_answer(row: dict[str, Any]) -> None:
    assert read(**row) == Question("Where?", CONTEXT)


def test_labels_can_be_ignored() -> None:
    assert read(labelled=False, answers=["Oslo"]) == Question("Where?", CONTEXT)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "x7", "answers": ["Oslo"]}, r"^a.jsonl:3 \(id x7\): the answer 'Oslo' is not in the context"),
        ({"answers": ["Paris", "Oslo"]}, "'Oslo' is not in the context"),
        (
            {"answers": {"text": ["Paris"], "answer_start": [15]}},
            "answer_start is 15, where there is 'n Par'; the answer 'Paris' starts at 17, 2 characters later",
        ),
        ({"answers": {"text": ["cat"], "answer_start": [5]}}, "starts at 4, 1 character earlier"),
        ({"answers": {"text": ["cat"], "answer_start": [500]}}, "the context has 46 characters"),
        ({"answers": {"text": ["cat", "dog"], "answer_start": [4]}}, "2 answers with 1 starts"),
        (
            {"answers": {"text": ["cat"], "answer_start": ["four"]}},
            "expected a whole number as start of the answer, found 'four'",
        ),
        ({"answers": {"text": ["cat"], "answer_start": [4.5]}}, "expected a whole number"),
        ({"answers": [["cat"]]}, r"expected the text of an answer, found \['cat'\]"),
        ({"answers": [" "]}, "expected the text of an answer, found an empty text"),
        ({"answers": None}, "there is no answer; rows to train on and held-out rows need one"),
        ({"question": " ", "answers": []}, "the question is empty; fill it in, or set data.empty=drop"),
        ({"context": None, "answers": []}, "the context is empty"),
        ({"context": ["a"], "answers": []}, "expected text as context, found list"),
    ],
)
def test_wrong_rows_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(**row)


def article(**changes: Any) -> dict[str, Any]:
    asked = {"id": "a", "question": "Where is the cat?", "answers": [{"text": "Paris", "answer_start": 17}]}
    none = {"id": "b", "question": "Where is the fox?", "answers": [], "is_impossible": True}
    none["plausible_answers"] = [{"text": "Rome", "answer_start": 41}]
    return {"title": "Pets", "paragraphs": [{"context": CONTEXT, "qas": [asked, none]}], **changes}


@pytest.mark.parametrize("form", ["document", "articles", "paragraph lines", "one article"])
def test_nested_files_become_a_row_per_question(tmp_path: Path, form: str) -> None:
    one = article()
    text = {
        "document": json.dumps({"version": "v2.0", "data": [one, article(title="More")]}),
        "articles": json.dumps([one, article(title="More")]),
        "paragraph lines": "\n".join(json.dumps({"title": "Pets", **one["paragraphs"][0]}) for _ in range(2)),
        "one article": json.dumps({"data": [{**one, "paragraphs": 2 * one["paragraphs"]}]}),
    }[form]
    path = tmp_path / ("a.jsonl" if form == "paragraph lines" else "a.json")
    path.write_text(text)
    rows = load_rows(str(path))
    assert rows.columns["id"] == ["a", "b"] * 2 and rows.columns["context"] == [CONTEXT] * 4
    assert rows.columns["title"][0] == "Pets" and rows.columns["is_impossible"] == [None, True] * 2
    questions = [Questions({}).read(rows.row(i), rows.where(i), labelled=True) for i in range(4)]
    assert [q.answers for q in questions] == [("Paris",), ()] * 2
    assert rows.where(2) == (f"{path}:2" if form == "paragraph lines" else f"{path}, record 3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"paragraphs": [{"qas": []}]},
            "article 1, paragraph 1: expected a paragraph with 'context' and 'qas', found the keys 'qas'",
        ),
        ({"paragraphs": ["text"]}, "expected a paragraph with 'context' and 'qas', found str"),
        ({"paragraphs": [{"context": "a", "qas": {}}]}, "expected a list in 'qas', found dict"),
        ({"paragraphs": [{"context": "a", "qas": ["b"]}]}, "expected objects in 'qas', found str"),
    ],
)
def test_broken_nested_files_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": [article(**changes)]}))
    with pytest.raises(DataError, match=message):
        load_rows(str(tmp_path / "a.json"))


def test_missing_columns_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "a", "contxt": "b", "answr": "c"}\n')
    rows = load_rows(str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match=r"no column 'context'.*did you mean 'contxt'") as error:
        Questions({}).require(rows, answers=True)
    assert error.value.key == "data.columns.context"
    Questions({"context": "contxt"}).require(rows, answers=False)
    with pytest.raises(DataError, match="no column with answers; expected 'answers' or 'answer'"):
        Questions({"context": "contxt"}).require(rows, answers=True)
    with pytest.raises(DataError, match="no column 'gold'"):
        Questions({"context": "contxt", "answers": "gold"}).require(rows, answers=True)


def test_questions_about_docstrings_are_spans_and_do_not_cross_the_split() -> None:
    parts = {part: load_rows(f"docstring-questions:networkx:{part}") for part in ("train", "test")}
    assert not set(parts["train"].columns["context"]) & set(parts["test"].columns["context"])
    rows = load_rows("docstring-questions:networkx")
    assert len(rows) == sum(map(len, parts.values())) > 500
    answered = 0
    for i in range(len(rows)):
        row = rows.row(i)
        answered += bool(Questions({}).read(row, rows.where(i), labelled=True).answers)
        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
            assert row["context"][start : start + len(text)] == text
    assert 0.5 < answered / len(rows) < 0.7
    assert rows.fingerprint == load_rows("docstring-questions:networkx").fingerprint
    with pytest.raises(DataError, match="no docstring in numpy's format"):
        load_rows("docstring-questions:yaml")
