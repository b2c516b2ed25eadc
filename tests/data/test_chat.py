"""Formatter turns rows into text and trained characters. The expected values are by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from peftlab.data.chat import Formatter
from peftlab.errors import DataError, RecipeError

# Like templates that drop the thoughts of earlier turns: a later turn changes the text of an earlier one.
REWRITING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] if loop.last or m['role'] == 'user' else '(past)' }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REFUSING = "{{ raise_exception('only user turns, please') }}"


@pytest.fixture
def tokenizer(tokenizer_of: Callable[[str], Any]) -> Any:
    return tokenizer_of("tiny:llama")


def formatter(tokenizer: Any, available: list[str], **options: Any) -> Formatter:
    return Formatter(
        tokenizer, columns=options.get("columns", {}), template=options.get("template"), available=available
    )


def trained_text(rendered: Any) -> list[str]:
    return [rendered.text[part.start : part.end] for part in rendered.parts if part.trained]


def test_formatter_trains_the_whole_text(tokenizer: Any) -> None:
    f = formatter(tokenizer, ["text", "other"])
    assert f.style == "text"
    r = f.render({"text": "hello", "other": 1}, "here")
    assert (r.text, trained_text(r)) == ("hello", ["hello"])
    assert f.render_prompt({"text": "hello"}, "here").text == "hello"


def test_formatter_trains_the_completion(tokenizer: Any) -> None:
    f = formatter(
        tokenizer, ["question", "completion", "prompt"], columns={"prompt": "question", "completion": "completion"}
    )
    assert f.style == "completion"
    r = f.render({"question": "Q: ", "completion": "A", "prompt": "no"}, "here")
    assert (r.text, trained_text(r)) == ("Q: A", ["A"])
    assert f.render_prompt({"question": "Q: "}, "here").text == "Q: "
    assert f.prompt_row("Q?") == {"question": "Q?"}


@pytest.mark.parametrize(
    "options",
    [
        {"columns": {"prompt": "q", "completion": "a"}},
        {"template": {"prompt": "{q}", "completion": "{a}"}},
        {"template": {"user": "{q}", "assistant": "{a}"}},
        {"columns": {"messages": "a"}},
    ],
)
def test_formatter_refuses_a_row_without_the_column(tokenizer: Any, options: dict[str, Any]) -> None:
    """distill.transfer is such a file: the columns were chosen from another file."""
    f = formatter(tokenizer, ["q", "a"], **options)
    with pytest.raises(DataError, match=r"^b\.csv:7: no column 'a'; found the columns 'q', 'x'$"):
        f.render({"q": "1+1", "x": None}, "b.csv:7")


def test_formatter_fills_a_completion_template(tokenizer: Any) -> None:
    f = formatter(tokenizer, ["q", "a"], template={"prompt": "{{Q}} {q}\n", "completion": "{a}!"})
    r = f.render({"q": "1+1", "a": 2}, "here")
    assert (r.text, trained_text(r)) == ("{Q} 1+1\n2!", ["2!"])
    assert f.prompt_column == "q"
    assert f.prompt_row("3+3") == {"q": "3+3"}


def test_formatter_fills_a_chat_template(tokenizer: Any) -> None:
    f = formatter(tokenizer, ["q", "a"], template={"system": "Be kind.", "user": "{q}", "assistant": "{a}"})
    r = f.render({"q": "hi", "a": "yo"}, "here")
    prompt = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert r.text == prompt + "yo<|im_end|>\n"
    assert trained_text(r) == ["yo<|im_end|>\n"]
    assert f.render_prompt({"q": "hi"}, "here").text == prompt
    assert f.prompt_row("hi") == {"q": "hi"}


def test_messages_train_every_assistant_turn(tokenizer: Any) -> None:
    f = formatter(tokenizer, ["messages"])
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "u1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "u2"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "u3"},
        {"role": "assistant", "content": "a3"},
    ]
    r = f.render({"messages": messages}, "here")
    assert trained_text(r) == ["a1<|im_end|>\n", "<|im_end|>\n", "a3<|im_end|>\n"]
    assert f.render_prompt({"messages": messages}, "here").text == r.text.removesuffix("a3<|im_end|>\n")
    assert f.render_prompt({"messages": messages[:4]}, "here").text.endswith("u2<|im_end|>\n<|im_start|>assistant\n")
    assert r.text.startswith(f.render_prompt({"messages": messages[:3]}, "here").text)


def test_messages_may_come_as_an_array(tokenizer: Any) -> None:
    messages = np.array([{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], dtype=object)
    r = formatter(tokenizer, ["messages"]).render({"messages": messages}, "here")
    assert trained_text(r) == ["a<|im_end|>\n"]


def test_messages_without_assistant_train_nothing(tokenizer: Any) -> None:
    r = formatter(tokenizer, ["messages"]).render({"messages": [{"role": "user", "content": "u"}]}, "here")
    assert trained_text(r) == []


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, ": expected a list of messages with role and content, found null"),
        ("text", ": expected a list of messages, found 'text'"),
        ([], ": expected a list of messages with role and content, found an empty list"),
        ({}, ": expected a list of messages with role and content, found {}"),
        ([{"role": "user"}], ", turn 1 (user): the message has no content; complete or remove it"),
        (["hi"], ", turn 1: expected a message with role and content, found 'hi'"),
    ],
)
def test_messages_column_refuses_other_values(tokenizer: Any, value: Any, says: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"a.jsonl:3{says}")) as caught:
        formatter(tokenizer, ["messages"]).render({"messages": value}, "a.jsonl:3")
    assert caught.value.key == "data.columns.messages"


def test_chat_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = REWRITING
    f = formatter(tokenizer, ["messages"])
    turns = [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]
    f.render({"messages": turns[:2]}, "here")
    with pytest.raises(DataError, match=r"a\.jsonl:1, turn 2 \(assistant\): .*writes it differently") as caught:
        f.render({"messages": turns}, "a.jsonl:1")
    assert caught.value.key == "model.chat_template"


def test_chat_template_that_raises_names_the_row(tokenizer: Any) -> None:
    tokenizer.chat_template = REFUSING
    with pytest.raises(DataError, match=r"a\.jsonl:9, turn 1 \(user\): the chat template rejects it: only user turns"):
        formatter(tokenizer, ["messages"]).render({"messages": [{"role": "user", "content": "u"}]}, "a.jsonl:9")


def test_chat_template_missing_is_an_error(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        formatter(tokenizer, ["messages"])
    with pytest.raises(DataError, match="no chat template") as caught:
        formatter(tokenizer, ["q"], template={"user": "{q}", "assistant": "{q}"})
    assert caught.value.key == "data.template"


def test_formatter_refuses_missing_columns(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="found 'a', 'b'"):
        formatter(tokenizer, ["a", "b"])
    with pytest.raises(DataError, match=r"uses \{qq\}, but the columns are q, a"):
        formatter(tokenizer, ["q", "a"], template={"prompt": "{qq}", "completion": "{a}"})


def test_template_that_is_broken_is_a_recipe_error(tokenizer: Any) -> None:
    with pytest.raises(RecipeError, match="not a valid template"):
        formatter(tokenizer, ["q", "a"], template={"prompt": "{q", "completion": "{a}"})


@pytest.mark.parametrize("template", ["{q.upper}", "{q[0]}", "{}", "{0}"])
def test_template_fields_are_column_names_only(tokenizer: Any, template: str) -> None:
    """str.format would otherwise reach into attributes of the values, or fail with an IndexError."""
    with pytest.raises((DataError, RecipeError)):
        formatter(tokenizer, ["q", "a"], template={"prompt": template, "completion": "{a}"}).render(
            {"q": "x", "a": "y"}, "h"
        )


def test_formatter_names_row_and_column_of_an_empty_cell(tokenizer: Any) -> None:
    f = formatter(tokenizer, ["q", "a"], template={"prompt": "{q}", "completion": "{a}"})
    with pytest.raises(DataError, match=r"a\.csv:7: column 'a' is empty"):
        f.render({"q": "x", "a": None}, "a.csv:7")
    with pytest.raises(DataError, match=r"a\.csv:7: expected text in the column 'text', found \[3\]"):
        formatter(tokenizer, ["text"]).render({"text": [3]}, "a.csv:7")
    with pytest.raises(DataError, match=r"a\.csv:7: column 'a' has bytes; a field of data\.template needs text"):
        f.render({"q": "x", "a": b"y"}, "a.csv:7")
    with pytest.raises(DataError, match=r"a\.csv:7: column 'a' is empty"):
        f.render({"q": "x", "a": math.nan}, "a.csv:7")


def test_formatter_notes_numbers(tokenizer: Any) -> None:
    rendered = formatter(tokenizer, ["prompt", "completion"]).render({"prompt": "1+1=", "completion": 2}, "here")
    assert (rendered.text, rendered.notes) == ("1+1=2", ("numbers",))


def test_formatter_keeps_braces_in_the_data(tokenizer: Any) -> None:
    f = formatter(tokenizer, ["q", "a"], template={"prompt": "{q}", "completion": "{a}"})
    assert f.render({"q": "{a} {", "a": "}"}, "here").text == "{a} {}"


def test_prompt_row_refuses_a_prompt_of_several_columns(tokenizer: Any) -> None:
    f = formatter(tokenizer, ["q", "c", "a"], template={"prompt": "{c}: {q}", "completion": "{a}"})
    assert f.prompt_column is None
    with pytest.raises(RecipeError, match="several columns"):
        f.prompt_row("hello")


@pytest.mark.parametrize("empty", [None, "", math.nan])
@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{q}\n\n{c}", "say"),
        ("{c}\n\n{q}", "say"),
        ("Context: {c}\nQuestion: {q}", "Context:\nQuestion: say"),
        ("{c}{q} {c}.", "say."),
    ],
)
def test_template_leaves_an_empty_column_out_with_the_white_space_before_it(
    tokenizer: Any, template: str, text: str, empty: str | float | None
) -> None:
    f = formatter(tokenizer, ["q", "c", "a"], template={"prompt": template, "completion": "{a}"})
    assert f.render({"q": "say", "c": empty, "a": "x"}, "here").text == text + "x"


def test_template_leaves_an_empty_system_message_out(tokenizer: Any) -> None:
    f = formatter(tokenizer, ["s", "q", "a"], template={"system": "{s}", "user": "{q}", "assistant": "{a}"})
    row = {"s": None, "q": "hi", "a": "yo"}
    assert f.render(row, "here").text.startswith("<|im_start|>user\nhi<|im_end|>")
    with pytest.raises(DataError, match=r"a\.csv:7: column 'q' is empty"):
        f.render(row | {"q": None}, "a.csv:7")
    with pytest.raises(DataError, match=r"a\.csv:7: column 'q' has a list; a field of data\.template needs text"):
        f.render(row | {"q": ["hi"]}, "a.csv:7")
