"""``data.empty``: rows without text, label or image are an error, or are left out and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import peftlab
from peftlab.assembly import Assembly
from peftlab.errors import DataError, RecipeError
from peftlab.recipe import load_recipe
from peftlab.training.progress import SilentProgress

LABELLED = [
    {"text": t, "label": k}
    for t, k in [
        ("good film", "a"),
        ("bad film", "b"),
        ("", "a"),
        (" \t", "b"),
        (None, "a"),
        ("no label", None),
        ("x", " "),
    ]
    + [(f"film {i}", "ab"[i % 2]) for i in range(8)]
]
ASKED = [
    *({"q": q, "a": a} for q, a in [("one", "1"), (None, "2"), ("three", None), ("four", "4"), ("five", "")]),
    *({"q": f"n{i}", "a": str(i)} for i in range(8)),
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(task: str, rows: list[dict[str, Any]], model: str = "tiny:bert", **data: Any) -> dict[str, Any]:
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"task": task, "model": {"name": model}, "data": {"train": "data.jsonl", "eval_rows": 4, **data}}


def check(document: dict[str, Any], *overrides: str) -> dict[str, Any]:
    return peftlab.check(document, overrides, progress=SilentProgress())


def left_out(report: dict[str, Any]) -> dict[str, list[str]]:
    return {entry["reason"]: entry["where"] for entry in report["left_out"]}


def test_data_empty_drops_and_counts_rows_of_a_classifier() -> None:
    report = check(recipe("seq_cls", LABELLED), "data.empty=drop")
    assert left_out(report["train"]) == {
        "dropped: the text is empty": ["data.jsonl:3", "data.jsonl:4", "data.jsonl:5"],
        "dropped: there is no label": ["data.jsonl:6", "data.jsonl:7"],
    }
    assert (report["train"]["rows"], report["train"]["kept"], report["held_out"]["rows"]) == (11, 6, 4)
    assert left_out(report["held_out"]) == {}


def test_data_empty_is_an_error_by_default() -> None:
    with pytest.raises(DataError, match=r"2 of 15 rows have no label.*data\.jsonl:6.*data\.empty=drop") as caught:
        check(recipe("seq_cls", LABELLED))
    assert caught.value.key == "data.columns.label"
    texts = [row for row in LABELLED if (row["label"] or "").strip()]
    with pytest.raises(DataError, match=r"data\.jsonl:\d: the text is empty; fill it in, or set data\.empty=drop"):
        check(recipe("seq_cls", texts))


def test_data_empty_drops_rows_of_the_evaluation_file() -> None:
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LABELLED[:6]))
    document = recipe("seq_cls", LABELLED[7:], eval_rows=None, eval="other.jsonl", empty="drop")
    report = check(document)
    assert left_out(report["train"]) == {}
    assert left_out(report["held_out"]) == {
        "dropped: the text is empty": ["other.jsonl:3", "other.jsonl:4", "other.jsonl:5"],
        "dropped: there is no label": ["other.jsonl:6"],
    }
    assert (report["held_out"]["rows"], report["held_out"]["kept"]) == (6, 2)


@pytest.mark.parametrize(
    "data",
    [
        {"template": {"user": "{q}", "assistant": "{a}"}},
        {"template": {"prompt": "{q}: ", "completion": "{a}"}},
        {"columns": {"prompt": "q", "completion": "a"}},
    ],
)
def test_data_empty_drops_null_questions_and_answers(data: dict[str, Any]) -> None:
    document = recipe("causal_lm", ASKED, "tiny:llama", **data)
    document["data"] |= {"eval": "data.jsonl", "eval_rows": None}
    with pytest.raises(DataError, match=r"data\.jsonl:2: .*data\.empty=drop leaves such rows out"):
        check(document)
    report = check(document, "data.empty=drop")
    assert left_out(report["train"])["dropped: nothing in the column 'q'"] == ["data.jsonl:2"]
    assert left_out(report["train"])["dropped: nothing in the column 'a'"] == ["data.jsonl:3"]
    assert report["train"]["rows"] == 13


def test_data_empty_keeps_rows_whose_null_column_is_not_used() -> None:
    rows = [{**row, "source": None} for row in ASKED if row["q"] and row["a"]]
    report = check(recipe("causal_lm", rows, "tiny:llama", columns={"prompt": "q", "completion": "a"}, empty="drop"))
    assert report["train"]["kept"] + report["held_out"]["kept"] == len(rows)


def test_data_empty_drops_rows_without_a_label_that_a_template_inserts() -> None:
    rows = [{"text": f"t{i}", "y": i % 2} for i in range(8)] + [{"text": "t8", "y": None}]
    columns = {"columns": {"label": "y"}, "label_names": {"0": "ham", "1": "spam"}}
    document = recipe("causal_lm", rows, "tiny:llama", **columns)
    document["data"]["template"] = {"user": "{text}", "assistant": "{label}"}
    with pytest.raises(DataError, match=r"1 of 9 rows have no label .*set data\.empty=drop"):
        check(document)
    assert left_out(check(document, "data.empty=drop")["train"]) == {"dropped: there is no label": ["data.jsonl:9"]}


def test_data_empty_drops_empty_conversations_of_a_text_file() -> None:
    turns = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).replace('"', '""')
    Path("chats.csv").write_text("messages,id\n" + "".join(f'"{turns}",{i}\n' for i in range(5)) + '"",5\n')
    document = recipe("causal_lm", [], "tiny:llama")
    document["data"] |= {"train": "chats.csv"}
    with pytest.raises(DataError, match=r"chats\.csv:7: .*found an empty text; data\.empty=drop leaves such rows out"):
        check(document, "data.eval=chats.csv", "data.eval_rows=null")
    report = check(document, "data.empty=drop")
    assert left_out(report["train"]) == {"dropped: nothing in the column 'messages'": ["chats.csv:7"]}


def test_data_empty_drops_no_row_that_is_wrong_for_another_reason() -> None:
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": m, "system": None} for m in [good] * 5 + [[{"role": "assistent", "content": "b"}]]]
    with pytest.raises(DataError, match=r"data\.jsonl:6, turn 1: unknown role 'assistent'") as caught:
        check(recipe("causal_lm", rows, "tiny:llama", empty="drop"), "data.eval=data.jsonl", "data.eval_rows=null")
    assert "data.empty" not in str(caught.value)


def test_data_empty_drops_rows_without_an_image() -> None:
    PIL.Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save("a.png")
    rows = [{"image": "a.png", "label": "ab"[i % 2]} for i in range(6)] + [{"image": None, "label": "a"}]
    document = recipe("image_cls", rows, "tiny:vit")
    with pytest.raises(DataError, match=r"data\.jsonl:7: expected an image .*, found None; data\.empty=drop"):
        check(document, "data.eval=data.jsonl")
    report = check(document, "data.empty=drop")
    assert left_out(report["train"]) == {"dropped: there is no image": ["data.jsonl:7"]}


def test_data_empty_that_leaves_no_row_says_why() -> None:
    with pytest.raises(DataError, match=r"leaves out all 2 rows: 2 because the text is empty \(data\.jsonl:1\)"):
        check(recipe("seq_cls", [{"text": "", "label": "a"}, {"text": " ", "label": "b"}], empty="drop"))


def test_data_empty_applies_to_the_transfer_rows() -> None:
    Path("more.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "three"}\n')
    document = recipe("seq_cls", LABELLED[7:], empty="drop")
    document["distill"] = {"teacher": "tiny:bert", "transfer": "more.jsonl"}
    train = Assembly(load_recipe(document), transfer=True).data.train
    assert (len(train), train.left_out) == (2, {"the text is empty": ["more.jsonl:2"]})


KINDS = ["ham"] * 24 + ["spam"] * 8


@pytest.mark.parametrize("split", ["part", "file"])
def test_data_balance_trains_on_equally_many_rows_of_each_class_and_keeps_the_held_out_ones(split: str) -> None:
    rows = [{"text": f"text {i}", "label": kind} for i, kind in enumerate(KINDS)]
    document = recipe("causal_lm", rows, "tiny:llama", balance=True, columns={"label": "label"}, eval_rows=8)
    document["data"]["template"] = {"prompt": "{text}:", "completion": " {label}"}
    document["eval"] = {"choices": [" ham", " spam"]}
    fewest = 6  # the split is stratified
    if split == "file":
        Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[20:28]))
        document["data"] |= {"eval": "other.jsonl"}
        del document["data"]["eval_rows"]
        fewest = 8
    report = check(document)
    assert {e["label"]: e["rows"] for e in report["train"]["labels"]} == {" ham": fewest, " spam": fewest}
    held_out = {e["label"]: e["rows"] for e in report["held_out"]["labels"]}
    assert held_out == ({" ham": 6, " spam": 2} if split == "part" else {" ham": 4, " spam": 4})
    assert {reason: len(where) for reason, where in left_out(report["train"]).items()} == {
        "dropped: of a class with more rows than the rarest (data.balance)": (18 if split == "part" else 24) - fewest
    }
    assert not report["held_out"]["left_out"]


def test_data_balance_gives_each_class_its_share() -> None:
    rows = [{"text": f"text {i}", "label": kind} for i, kind in enumerate(KINDS)]
    report = check(recipe("seq_cls", rows, balance={"spam": 3, "ham": 1.5}, eval_rows=8))
    assert {e["label"]: e["rows"] for e in report["train"]["labels"]} == {"ham": 3, "spam": 6}
    (reason,) = left_out(report["train"])
    assert reason == "dropped: of a class with more rows than its share (data.balance)"
    with pytest.raises(RecipeError, match=r"expected a share of each class \('ham', 'spam'\), found 'spam'"):
        check(recipe("seq_cls", rows, balance={"spam": 3}))
    with pytest.raises(RecipeError, match=r"the share of .ham. is 0; data\.exclude leaves"):
        check(recipe("seq_cls", rows, balance={"spam": 3, "ham": 0}))


def test_data_balance_counts_the_rows_that_data_exclude_leaves() -> None:
    rows = [{"text": f"text {i}", "label": kind} for i, kind in enumerate([*KINDS, "rare", "rare"])]
    report = check(recipe("seq_cls", rows, balance=True, exclude={"label": ["rare"]}))
    kept = {e["label"]: e["rows"] for e in report["train"]["labels"] if e["rows"]}
    assert set(kept) == {"ham", "spam"} and kept["ham"] == kept["spam"] >= 6
