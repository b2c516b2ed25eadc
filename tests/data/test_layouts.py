"""Layouts of chat rows: each is recognised, read into the same conversation, and trains the same tokens in every file format."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import peftlab
from peftlab.adapters import HeadLoss
from peftlab.assembly.assembly import Assembly
from peftlab.data import Rows, load_rows
from peftlab.data.chat import Formatter
from peftlab.data.layouts import find_layout
from peftlab.errors import DataError
from peftlab.recipe import load_recipe
from peftlab.tasks.causal_lm import CausalLM

# Writes tools, reasoning, tool calls and tool results.
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "a sum",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


# Rows whose keys differ, so that a columnar file fills many of them with null.
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call("weather", {"city": "Bern"})]},
            {"role": "tool", "tool_call_id": "c1", "content": "12 C"},
            {"role": "assistant", "reasoning_content": "cold", "content": "12 C."},
        ],
        "tools": [WEATHER],
    },
    {
        "messages": [
            {"role": "user", "content": "1+2?", "name": "ann"},
            {"role": "assistant", "tool_calls": [call("add", {"a": 1, "how": {"exact": True}})]},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
            {"role": "assistant", "content": "4", "weight": 0},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "3", "weight": 1},
        ],
        "tools": [ADD, WEATHER],
    },
    {"messages": [ASKED, SAID], "system": "Be kind.", "id": 7},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        text = path.stem == "text"
        values = {
            n: [json.dumps(r[n]) if text and isinstance(r.get(n), list) else r.get(n) for r in rows] for n in names
        }
        pyarrow.parquet.write_table(pyarrow.table(values), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            for row in rows:
                cells = [row.get(n, "") for n in names]
                writer.writerow([c if isinstance(c, str) else json.dumps(c) for c in cells])
    return path


@pytest.fixture
def tokenizer(tokenizer_of: Callable[[str], Any]) -> Any:
    tokenizer = tokenizer_of("tiny:llama")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encode(tokenizer: Any, rows: Rows) -> list[tuple[str, list[str]]]:
    """The text of each row, and its trained stretches."""
    formatter = Formatter(tokenizer, columns={}, template=None, available=list(rows.columns), sample=rows.sample())
    encoded = CausalLM(tokenizer, formatter, head_loss=HeadLoss()).encode(
        rows, max_length=10_000, too_long="error", training=True
    )
    texts = []
    for example in encoded.examples:
        runs: list[list[int]] = [[]]
        for token, trained in zip(example.ids.tolist(), example.trained.tolist(), strict=True):
            if trained:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        texts.append((tokenizer.decode(example.ids), [tokenizer.decode(run) for run in runs if run]))
    return texts


def of_rows(tokenizer: Any, *rows: dict[str, Any]) -> list[tuple[str, list[str]]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return encode(tokenizer, Rows.from_dicts([{n: row.get(n) for n in names} for row in rows], name="rows"))


@pytest.mark.parametrize("file", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "text.parquet"])
def test_conversations_train_the_same_tokens_in_every_file_format(tokenizer: Any, tmp_path: Path, file: str) -> None:
    first, second, third = encode(tokenizer, load_rows(str(write(tmp_path / file, ROWS))))
    assert first[1] == [
        '<call>{"name": "weather", "arguments": {"city": "Bern"}}</call><|im_end|>',
        "<think>cold</think>12 C.<|im_end|>",
    ]
    assert first[0].startswith(f"<|im_start|>tools\n{json.dumps(WEATHER)}\n<|im_end|>\n<|im_start|>user\nWeather?")
    assert second[1] == [
        '<call>{"name": "add", "arguments": {"a": 1, "how": {"exact": true}}}</call><|im_end|>', "3<|im_end|>",
    ]  # fmt: skip
    assert second[0].startswith(f"<|im_start|>tools\n{json.dumps(ADD)}\n{json.dumps(WEATHER)}\n<|im_end|>")
    chat = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"
    )
    assert third == (chat, ["ho<|im_end|>"])


@pytest.mark.parametrize(
    ("row", "title"),
    [
        ({"messages": [ASKED, SAID]}, "chat messages (column 'messages')"),
        ({"messages": json.dumps([ASKED, SAID])}, "chat messages (column 'messages')"),
        (
            {
                "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}],
                "system": "",
                "tools": "[]",
            },
            "ShareGPT conversations (columns 'conversations', 'system', 'tools')",
        ),
        (
            {"prompt": [ASKED], "completion": [SAID]},
            "prompt and completion as chat messages (columns 'prompt', 'completion')",
        ),
        (
            {"prompt": json.dumps([ASKED]), "completion": json.dumps([SAID])},
            "prompt and completion as chat messages (columns 'prompt', 'completion')",
        ),
        ({"instruction": "hi", "output": "ho"}, "Alpaca instructions (columns 'instruction', 'output')"),
        (
            {"instruction": "hi", "input": None, "output": "ho"},
            "Alpaca instructions (columns 'instruction', 'input', 'output')",
        ),
        (
            {"instruction": "hi", "input": "", "output": "ho"},
            "Alpaca instructions (columns 'instruction', 'input', 'output')",
        ),
    ],
)
def test_layouts_of_one_conversation_train_the_same_text(tokenizer: Any, row: dict[str, Any], title: str) -> None:
    assert find_layout({}, list(row), row).title == title
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"
    assert of_rows(tokenizer, row) == [(text, ["ho<|im_end|>"])]


def test_layout_of_plain_columns_is_plain() -> None:
    assert find_layout({}, ["text", "id"], {"text": "x"}).title == "plain text (column 'text')"
    plain = find_layout({}, ["prompt", "completion"], {"prompt": "[{]", "completion": "x"})
    assert (plain.kind, plain.title) == ("completion", "prompt and completion (columns 'prompt', 'completion')")
    assert find_layout({}, ["prompt"], {"prompt": "x"}, answer=False).kind == "completion"
    with pytest.raises(DataError, match=r"expected a column text, .*Alpaca\); found 'prompt', 'x'\. Map them with"):
        find_layout({}, ["prompt", "x"], {})


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "prompt", "completion": "chosen"}),
        ({"prompt": [ASKED], "chosen": [SAID], "rejected": [SAID]}, {"prompt": "prompt", "completion": "chosen"}),
        ({"prompt": "hi", "chosen": [ASKED, SAID], "rejected": [ASKED, SAID]}, {"messages": "chosen"}),
        ({"chosen": [ASKED, SAID], "rejected": [ASKED, SAID]}, {"messages": "chosen"}),
        ({"chosen": "a", "rejected": "b"}, {"text": "chosen"}),
    ],
)
def test_preferences_are_refused_with_columns_that_work(row: dict[str, Any], columns: dict[str, str]) -> None:
    shown = ", ".join(f"{part}: {column}" for part, column in columns.items())
    with pytest.raises(DataError, match=re.escape("these rows are preferences (chosen and rejected)")) as caught:
        find_layout({}, list(row), row)
    assert f"set data.columns={{{shown}}}" in str(caught.value)
    assert set(find_layout(columns, list(row), row).columns.values()) == set(columns.values())


@pytest.mark.parametrize(
    ("good", "bad"), [("true", "false"), ('"True"', '"False"'), ('"TRUE"', '"FALSE"'), ('"true"', '"false"')]
)
def test_judged_answers_are_refused_with_keys_that_work(tmp_path: Path, good: str, bad: str) -> None:
    path = tmp_path / "judged.jsonl"
    lines = [f'{{"prompt": "{i}?", "completion": "{i}", "label": {bad if i % 2 else good}}}' for i in range(8)]
    path.write_text("\n".join(lines))
    keys = {"task": "causal_lm", "model": {"name": "tiny:llama"}, "data": {"train": str(path), "eval_rows": 2}}
    with pytest.raises(DataError, match=r"whether a completion is good, .* data\.exclude=.* data\.columns=") as caught:
        peftlab.check(keys)
    remedies = re.findall(r"data\.\w+=\{.*?\}", str(caught.value))
    assert len(remedies) == 2
    labels = {str(label).lower() for label in Assembly(load_recipe(keys, remedies)).data.train.columns["label"]}
    assert labels == {"true"}
    peftlab.check(keys, remedies)


def test_judged_prompts_can_be_predicted() -> None:
    assert find_layout({}, ["prompt", "label"], {"prompt": "q", "label": True}, answer=False).kind == "completion"


def test_alpaca_reads_system_input_and_history(tokenizer: Any) -> None:
    row = {"instruction": "b?", "input": "more", "output": "b", "system": "s", "history": [["a?", "a"]]}
    assert of_rows(tokenizer, row) == [
        (
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
            "<|im_start|>user\nb?\n\nmore<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
            ["a<|im_end|>", "b<|im_end|>"],
        )
    ]


def test_history_may_be_json_text(tokenizer: Any) -> None:
    row = {"instruction": "b?", "output": "b"}
    history = [["a?", "a"], ["c?", "c"]]
    expected = of_rows(tokenizer, row | {"history": history})
    assert len(expected[0][1]) == 3
    assert of_rows(tokenizer, row | {"history": json.dumps(history)}) == expected
    assert of_rows(tokenizer, row | {"history": ""}) == of_rows(tokenizer, row | {"history": math.nan})


@pytest.mark.parametrize(
    "row",
    [
        {"text": 4},
        {"prompt": 1, "completion": 4},
        {"prompt": [{"role": "user", "content": 1}], "completion": 4},
        {"instruction": 1, "output": 4, "input": 2.5, "history": [[1, 2]]},
        {"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": 4}]},
    ],
)
def test_numbers_train_the_same_as_in_a_text_file(tokenizer: Any, row: dict[str, Any]) -> None:
    def as_text(value: Any) -> Any:
        if isinstance(value, list):
            return [as_text(v) for v in value]
        return {k: as_text(v) for k, v in value.items()} if isinstance(value, dict) else str(value)

    assert of_rows(tokenizer, row) == of_rows(tokenizer, as_text(row))
    layout = find_layout({}, list(row), row)
    if layout.style == "chat":
        assert layout.conversation(row, "here").notes == ("numbers",)


def test_answers_in_a_prompt_are_not_trained(tokenizer: Any) -> None:
    ((text, trained),) = of_rows(
        tokenizer, {"prompt": [ASKED, SAID, ASKED], "completion": [{**SAID, "content": "new"}]}
    )
    assert trained == ["new<|im_end|>"] and "assistant\nho<|im_end|>" in text


def test_old_function_calls_equal_tool_calls(tokenizer: Any) -> None:
    asked = {"role": "user", "content": "Weather?"}
    result = {"content": "12 C"}
    new = {
        "messages": [
            asked,
            {"role": "assistant", "tool_calls": [call("weather", {"city": "Bern"})]},
            {"role": "tool", **result},
        ],
        "tools": [WEATHER],
    }
    old = {
        "messages": [
            asked,
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "weather", "arguments": '{"city": "Bern"}'},
            },
            {"role": "function", **result},
        ],
        "functions": [WEATHER["function"]],
    }
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bern"}}'},
            {"from": "observation", "value": "12 C"},
        ],
        "tools": json.dumps([WEATHER["function"]]),
    }
    expected = of_rows(tokenizer, new)
    assert expected[0][1] == ['<call>{"name": "weather", "arguments": {"city": "Bern"}}</call><|im_end|>']
    assert of_rows(tokenizer, old) == of_rows(tokenizer, sharegpt) == expected


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"messages": [{"role": "system", "content": "a"}, ASKED, SAID], "system": "b"},
            "both the column 'system' and turn 1 (system) have a system message, and they differ; remove one",
        ),
        ({"messages": [ASKED, SAID], "system": 3}, "expected text in the column 'system', found 3"),
        (
            {"messages": [{"role": "user", "parts": [{"text": "x"}]}]},
            "turn 1 (user): the message has no content; complete or remove it; its other keys are 'parts'",
        ),
        ({"messages": [ASKED, SAID], "images": ["a.png"]}, "the column 'images' has images, audio or video"),
        ({"messages": [ASKED], "tools": [WEATHER], "functions": [ADD]}, "the columns 'tools' and 'functions' differ"),
        ({"instruction": b"3", "output": "x"}, "expected text in the column 'instruction', found b'3'"),
        ({"instruction": "a", "output": None}, "expected text in the column 'output', found null"),
        ({"instruction": "a", "output": "b", "history": [["q", None]]}, "text in the column 'history', found null"),
        ({"instruction": "a", "output": "b", "history": "[[1"}, "in the column 'history' as JSON, found '[[1'"),
        ({"instruction": "a", "output": "b", "history": ["a"]}, "expected pairs of question and answer in the column"),
        (
            {"prompt": [ASKED], "completion": [{"role": "assistant"}]},
            "completion turn 1 (assistant): the message has no",
        ),
    ],
)
def test_layout_refuses_rows_by_place(tokenizer: Any, row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=re.escape(says)) as caught:
        of_rows(tokenizer, row)
    assert str(caught.value).startswith("rows, record 1")


def test_system_column_may_repeat_the_system_turn(tokenizer: Any) -> None:
    system = {"role": "system", "content": "a"}
    assert of_rows(tokenizer, {"messages": [system, ASKED, SAID], "system": "a"}) == of_rows(
        tokenizer, {"messages": [ASKED, SAID], "system": "a"}
    )


@pytest.mark.parametrize("empty", [None, "", "  ", math.nan, []])
def test_empty_columns_beside_messages_say_nothing(tokenizer: Any, empty: Any) -> None:
    row = {"messages": [ASKED, SAID]}
    assert of_rows(tokenizer, row | {"system": empty, "tools": empty, "images": empty}) == of_rows(tokenizer, row)
    assert of_rows(tokenizer, row | {"images": "[]"}) == of_rows(tokenizer, row)


def test_formatter_reads_rows_of_another_layout(tokenizer: Any) -> None:
    """A file of data.eval or of predict may have other columns than the training data."""
    f = Formatter(tokenizer, columns={}, template=None, available=["messages"])
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    for row in (
        {"conversations": [{"from": "human", "value": "hi"}]}, {"prompt": [ASKED]}, {"prompt": "hi"}, {"instruction": "hi"},
    ):  # fmt: skip
        assert f.render_prompt(row, "here").text == prompt
    with pytest.raises(DataError, match=r"b\.csv:2: expected chat messages \(column 'messages'\), found plain text"):
        f.render_prompt({"text": "hi"}, "b.csv:2")


def test_formatter_without_data_takes_the_style_of_the_run(tokenizer: Any) -> None:
    def row(style: Any, **columns: str) -> dict[str, Any]:
        return Formatter(tokenizer, columns=columns, template=None, style=style).prompt_row("hi")

    assert row("text") == {"text": "hi"}
    assert row("completion", prompt="q", completion="a") == {"q": "hi"}
    assert row("chat") == row(None) == {"messages": [ASKED]}
