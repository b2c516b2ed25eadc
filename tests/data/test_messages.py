"""The normal form of messages and tools. The expected values are by hand."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from peftlab.data.messages import read_messages, read_tools
from peftlab.errors import DataError

CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Bern"}}}
ASKED = {"role": "user", "content": "q"}


def answer(**more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "a", **more}


def read(*messages: Any, **options: Any) -> Any:
    return read_messages(list(messages), "a.jsonl:7", **options)


@pytest.mark.parametrize(
    ("message", "normal"),
    [
        ({"from": "human", "value": "hi"}, {"role": "user", "content": "hi"}),
        ({"from": "gpt", "value": "hi"}, {"role": "assistant", "content": "hi"}),
        ({"role": "Assistant", "content": "hi"}, {"role": "assistant", "content": "hi"}),
        ({"role": "model", "content": "hi"}, {"role": "assistant", "content": "hi"}),
        ({"from": "observation", "value": "12 C"}, {"role": "tool", "content": "12 C"}),
        ({"role": "function", "name": "f", "content": "x"}, {"role": "tool", "content": "x", "name": "f"}),
        ({"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "user", "content": "hi"}),
        ({"role": "user", "content": ["hi"]}, {"role": "user", "content": "hi"}),
        ({"role": "user", "content": 5}, {"role": "user", "content": "5"}),
        ({"role": "user", "content": 0.5}, {"role": "user", "content": "0.5"}),
        ({"role": "tool", "content": {"t": 12, "u": None}}, {"role": "tool", "content": '{"t": 12}'}),
        ({"role": "assistant", "content": None, "refusal": "No."}, {"role": "assistant", "content": "No."}),
        ({"role": "user", "content": "", "name": None, "tool_calls": []}, {"role": "user", "content": ""}),
        (answer(thinking="hm"), answer(reasoning_content="hm")),
        (answer(reasoning="hm", reasoning_content="hm"), answer(reasoning_content="hm")),
        (
            answer(content=[{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]),
            answer(reasoning_content="hm"),
        ),
    ],
)
def test_messages_have_one_normal_form(message: dict[str, Any], normal: dict[str, Any]) -> None:
    assert read(message).messages == [normal]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"city": "Bern"}'}]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": json.dumps('{"city": "Bern"}')}}]},
        {"role": "assistant", "function_call": {"name": "f", "arguments": '{"city": "Bern"}'}, "tool_calls": None},
        {"role": "assistant", "tool_calls": [{**CALL, "index": None, "function": {**CALL["function"], "x": None}}]},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"city": "Bern"}}'},
        {"from": "function_call", "value": '[{"name": "f", "arguments": {"city": "Bern", "zip": null}}]'},
    ],
)
def test_tool_calls_have_arguments_as_an_object(message: dict[str, Any]) -> None:
    assert read(message).messages == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]


def test_nulls_are_values_in_json_text_and_fillers_in_objects() -> None:
    def arguments(value: Any) -> tuple[Any, tuple[str, ...]]:
        chat = read({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": value}}]})
        return chat.messages[0]["tool_calls"][0]["function"]["arguments"], chat.notes

    assert arguments('{"a": null}') == ({"a": None}, ())
    assert arguments({"a": None, "b": {"c": None}, "d": [None]}) == ({"b": {}, "d": [None]}, ("nulls",))
    assert arguments(None) == arguments("") == arguments({}) == ({}, ())


@pytest.mark.parametrize(
    ("keys", "trained"),
    [
        ({}, True),
        ({"weight": 1}, True),
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"weight": "0.0"}, False),
        ({"loss": False}, False),
        ({"train": False, "training": False}, False),
        ({"training": "false"}, False),
        ({"loss": None, "weight": float("nan")}, True),
    ],
)
def test_messages_can_mask_an_answer(keys: dict[str, Any], trained: bool) -> None:
    chat = read(ASKED, answer(**keys))
    assert chat.trained == [False, trained] and chat.messages[1] == answer()


def test_messages_note_what_is_not_used() -> None:
    chat = read({**ASKED, "train": True, "thinking": "x"}, answer(tool_calls=[{**CALL, "odd": 1}], refusal="No."))
    assert chat.notes == ("unread_key thinking", "untrained_role", "unread_key tool_calls.odd", "unread_key refusal")
    assert read(ASKED, {"role": "tool", "content": "x", "tool_call_id": "c9"}).notes == ("unmatched_call",)
    called = answer(tool_calls=[{**CALL, "id": "c1"}])
    assert read(ASKED, called, {"role": "tool", "content": "x", "tool_call_id": "c1"}).notes == ()


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "assistant", "content": None}, " (assistant): the message has no content or tool_calls"),
        ({"role": "user", "content": True, "weight": 2}, " (user): expected 0 or 1 as weight, found 2"),
        ({"role": "user", "content": {"a": 1}}, " (user): expected text or a list of text parts as content, found {"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "of type 'image_url'"),
        (
            {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "input_audio"}]},
            ": part 2 of the content",
        ),
        ({"role": "user", "content": "x", "audio": {"id": 1}}, ": this message has audio; causal_lm reads text only"),
        (
            {"role": "asistant", "content": "x"},
            ": unknown role 'asistant'; expected system, .*did you mean 'assistant'",
        ),
        ({"content": "x"}, ": expected a message with role and content, found {'content': 'x'}"),
        ({"role": None, "content": None}, ": expected a message with role and content, found a message without values"),
        (answer(tool_calls=[{"name": "f", "arguments": "{"}]), ": expected the arguments of a tool call as JSON"),
        (answer(tool_calls=[{"name": "f", "arguments": "[1]"}]), ": expected an object as the arguments"),
        (answer(tool_calls=[{"arguments": {}}]), r': expected a tool call such as {"name": "f"'),
        (answer(tool_calls=[CALL], function_call=CALL["function"]), ": it has both tool_calls and function_call"),
        ({**ASKED, "tool_calls": [CALL]}, ": only an assistant can call tools"),
        (answer(loss=False, train=True), ": loss and train contradict each other"),
        (answer(thinking="a", reasoning="b"), ": reasoning and thinking differ; keep one of them"),
        ({"from": "function_call", "value": "f()"}, ": expected a tool call, found 'f()'"),
    ],
)
def test_messages_are_refused_by_place_and_turn(message: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        read(ASKED, message)
    first, _, last = says.partition(".*")
    assert (
        str(caught.value).startswith("a.jsonl:7, turn 2") and first in str(caught.value) and last in str(caught.value)
    )
    assert caught.value.key == "data.columns.messages"


def test_messages_come_as_json_text_or_arrays() -> None:
    messages = [ASKED, answer()]
    for value in (json.dumps(messages), np.array(messages, dtype=object), list(map(json.dumps, messages))):
        assert read_messages(value, "here").messages == messages
    with pytest.raises(
        DataError, match=re.escape("a.csv:2: expected a list of messages as JSON, found \"[{'role'")
    ) as caught:
        read_messages(str(messages), "a.csv:2")
    assert "write it with json.dumps, not as Python's text of a list" in str(caught.value)


def test_messages_take_the_roles_that_the_template_names() -> None:
    assert read({"role": "critic", "content": "x"}, roles={"critic"}).messages[0]["role"] == "critic"
    # A role of the normal form stays one, though templates of Gemma name `model`.
    assert read({"role": "model", "content": "x"}, roles={"model"}).messages[0]["role"] == "assistant"


FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize(
    ("value", "tools"),
    [
        ([TOOL], [TOOL]),
        ([FUNCTION], [TOOL]),
        ([{**FUNCTION, "description": None}], [TOOL]),
        ([{"name": "f", "parameters": '{"type": "object"}'}], [TOOL]),
        (json.dumps([TOOL]), [TOOL]),
        ([json.dumps(TOOL)], [TOOL]),
        (TOOL, [TOOL]),
        ([], None),
        ("[]", None),
        ("", None),
        (None, None),
    ],
)
def test_tools_have_one_normal_form(value: Any, tools: Any) -> None:
    assert read_tools(value, "here") == tools


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("search", "expected a list of tools, found 'search'"),
        ("[{", "expected a list of tools as JSON"),
        ([{"parameters": {}}], "expected a function with a name as tool 1, found {'parameters': {}}"),
        (3, "expected a function with a name as tool 1, found 3"),
    ],
)
def test_tools_are_refused_by_place(value: Any, says: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"a.jsonl:7: {says}")):
        read_tools(value, "a.jsonl:7")
