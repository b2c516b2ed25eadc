"""What a chat template reads of messages, and the proof that everything of an answer is in what is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from peftlab.adapters import HeadLoss
from peftlab.data import Rows, find
from peftlab.data.chat import Formatter
from peftlab.errors import DataError
from peftlab.tasks.causal_lm import CausalLM

HEAD, END = "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}", "<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PARTS_ONLY = f"{HEAD}{{% for p in m.content %}}{{{{ p.text }}}}{{% endfor %}}{END}{PROMPT}"
BOTH = (
    f"{HEAD}{{% if m.content is string %}}{{{{ m.content }}}}{{% else %}}{{% for p in m.content %}}{{{{ p.text | trim }}}};"
    f"{{% endfor %}}{{% endif %}}{END}{PROMPT}"
)
TRIM = f"{HEAD}{{{{ m.content | trim }}}}{END}{PROMPT}"
THOUGHT = "{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}"
# Like Qwen 3: thoughts before the last question are left out.
LATE = (
    "{% set ns = namespace(q=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.q = loop.index0 %}{% endif %}"
    f"{{% endfor %}}{HEAD}{{% if loop.index0 > ns.q and m.reasoning_content %}}<think>{{{{ m.reasoning_content }}}}</think>"
    f"{{% endif %}}{{{{ m.content }}}}{END}{PROMPT}"
)
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} ARGUMENTS</call>{% endfor %}"
CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": 'B"n', "n": 2, "ok": True}}}
ASKED, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def with_calls(arguments: str) -> str:
    return f"{HEAD}{{{{ m.content }}}}{CALLS.replace('ARGUMENTS', arguments)}{END}{PROMPT}"


@pytest.fixture
def equipped(tokenizer_of: Callable[[str], Any]) -> Callable[[str], Any]:
    def make(template: Any) -> Any:
        tokenizer = tokenizer_of("tiny:llama")
        tokenizer.chat_template = template
        return tokenizer

    return make


def trained(tokenizer: Any, *messages: dict[str, Any], **columns: Any) -> tuple[str, list[str], list[str]]:
    """The text of a row, its trained stretches, and the kinds of findings."""
    rows = Rows.from_dicts([{"messages": list(messages), **columns}], name="data")
    formatter = Formatter(tokenizer, columns={}, template=None, available=list(rows.columns), sample=rows.sample())
    result = CausalLM(tokenizer, formatter, head_loss=HeadLoss()).encode(
        rows, max_length=10_000, too_long="error", training=True
    )
    rendered = formatter.render(rows.row(0), rows.where(0))
    texts = [rendered.text[p.start : p.end].removesuffix("\n") for p in rendered.parts if p.trained]
    return rendered.text, texts, [f.kind for f in find(result.ledger)]


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("template", "content", "learnt"),
    [
        (TRIM, parts("one ", "two"), "one two<|im_end|>"),
        (TRIM, parts("one"), "one<|im_end|>"),
        (PARTS_ONLY, parts("one ", "two"), "one two<|im_end|>"),
        (PARTS_ONLY, "one", "one<|im_end|>"),
        (BOTH, parts("one ", "two"), "one;two;<|im_end|>"),
        (BOTH, parts("one"), "one<|im_end|>"),
        (BOTH, "one", "one<|im_end|>"),
    ],
)
def test_text_parts_are_joined_unless_the_template_reads_parts(
    equipped: Callable[[str], Any], template: str, content: Any, learnt: str
) -> None:
    asked = {"role": "user", "content": content}
    text, texts, kinds = trained(equipped(template), asked, {"role": "assistant", "content": content})
    assert texts == [learnt] and not kinds
    assert text == f"<|im_start|>user\n{learnt}\n<|im_start|>assistant\n{learnt}\n"


@pytest.mark.parametrize(
    ("template", "kinds"),
    [
        (f"{HEAD}{THOUGHT}{{{{ m.content }}}}{END}{PROMPT}", []),
        (f"{HEAD}{THOUGHT.replace('thinking', 'reasoning_content')}{{{{ m.content }}}}{END}{PROMPT}", []),
        (f"{HEAD}{{{{ m.content }}}}{END}{PROMPT}", ["wrong_mask"]),
    ],
)
def test_reasoning_is_given_in_the_key_that_the_template_reads(
    equipped: Callable[[str], Any], template: str, kinds: list[str]
) -> None:
    _, texts, found = trained(equipped(template), ASKED, {**SAID, "reasoning": "hm"})
    assert found == kinds and texts == (["a<|im_end|>"] if kinds else ["<think>hm</think>a<|im_end|>"])
    # An answer that is not trained needs no proof, but what the template does not read is noted.
    _, texts, found = trained(equipped(template), ASKED, {**SAID, "reasoning": "hm", "weight": 0}, ASKED, SAID)
    assert found == ["masked_turns", *(["unread_key"] if kinds else [])] and texts == ["a<|im_end|>"]


def test_reasoning_before_the_last_question_may_be_left_out(equipped: Callable[[str], Any]) -> None:
    answer = {**SAID, "reasoning_content": "hm"}
    _, texts, kinds = trained(equipped(LATE), ASKED, answer, {**ASKED, "content": "r"}, answer)
    assert texts == ["a<|im_end|>", "<think>hm</think>a<|im_end|>"] and kinds == ["dropped_reasoning"]


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ("{{ c.function.arguments | tojson }}", r'{"city": "B\"n", "n": 2, "ok": true}'),
        # Arguments that must be text: the template joins them, or writes them as they are.
        ("{{ '' + c.function.arguments }}", r'{"city": "B\"n", "n": 2, "ok": true}'),
        ("{{ c.function.arguments }}", r'{"city": "B\"n", "n": 2, "ok": true}'),
        ("{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}", '<city>B"n<n>2<ok>True'),
    ],
)
def test_arguments_are_given_in_the_form_that_the_template_reads(
    equipped: Callable[[str], Any], arguments: str, written: str
) -> None:
    answer = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    _, texts, kinds = trained(equipped(with_calls(arguments)), ASKED, answer)
    assert texts == [f"<call>f {written}</call><|im_end|>"] and "wrong_mask" not in kinds


@pytest.mark.parametrize(
    ("template", "missing"),
    [
        (f"{HEAD}{{{{ m.content }}}}{END}{PROMPT}", "the tool calls"),
        (with_calls("{}"), "the tool calls"),
        (with_calls("{{ c.function.arguments.keys() | list | tojson }}"), "the tool calls"),
        (with_calls("{{ c.function.arguments | tojson }}").replace("{{ m.content }}", ""), "the message"),
    ],
)
def test_answers_without_their_calls_or_words_are_an_error(
    equipped: Callable[[str], Any], template: str, missing: str
) -> None:
    rows = Rows.from_dicts(
        [{"messages": [ASKED, {"role": "assistant", "content": "zebra", "tool_calls": [CALL]}]}], name="data"
    )
    tokenizer = equipped(template)
    task = CausalLM(
        tokenizer, Formatter(tokenizer, columns={}, template=None, available=["messages"]), head_loss=HeadLoss()
    )
    (error,) = (f for f in find(task.encode(rows, max_length=999, too_long="error", training=True).ledger) if f.error)
    assert error.kind == "wrong_mask" and f"the trained tokens do not contain {missing}: " in error.message


def test_keys_that_a_template_does_not_read_are_noted(equipped: Callable[[str], Any]) -> None:
    named = f"{HEAD.replace('m.role', '(m.name or m.role)')}{{{{ m.content }}}}{END}{PROMPT}"
    text, _, kinds = trained(equipped(named), {**ASKED, "name": "ann", "id": 3}, SAID)
    assert text.startswith("<|im_start|>ann\nq") and kinds == ["unread_key"]
    # The template names the key, but of a tool and not of a message.
    text, _, kinds = trained(
        equipped("{% if tools %}{{ tools[0].name }}{% endif %}" + TRIM), {**ASKED, "name": "ann"}, SAID
    )
    assert text.startswith("<|im_start|>user\nq") and kinds == ["unread_key"]


def test_developer_is_system_unless_the_template_knows_it(equipped: Callable[[str], Any]) -> None:
    rules = {"role": "developer", "content": "be"}
    assert trained(equipped(TRIM), rules, ASKED, SAID)[0].startswith("<|im_start|>system\nbe")
    assert trained(equipped("{# developer #}" + TRIM), rules, ASKED, SAID)[0].startswith("<|im_start|>developer\nbe")


def test_tools_that_a_template_does_not_write_are_noted(equipped: Callable[[str], Any]) -> None:
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    assert trained(equipped(TRIM), ASKED, SAID, tools=tools)[2] == ["unused_tools"]
    writes = "{% if tools %}{{ tools | tojson }}{% endif %}" + TRIM
    text, texts, kinds = trained(equipped(writes), ASKED, SAID, tools=tools)
    assert text.startswith('[{"type": "function", "function": {"name": "look_up"}}]') and not kinds
    # As transformers does, tools choose the template of that name.
    assert trained(equipped({"default": TRIM, "tool_use": writes}), ASKED, SAID, tools=tools)[:2] == (text, texts)


def test_chat_template_errors_name_the_turn(equipped: Callable[[str], Any]) -> None:
    strict = "{% for m in messages if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endfor %}" + TRIM
    result = {"role": "tool", "content": "x"}
    with pytest.raises(DataError) as caught:
        trained(equipped(strict), ASKED, SAID, result, SAID)
    assert str(caught.value) == "data, record 1, turn 3 (tool): the chat template rejects it: no tools here"
    fails = TRIM.replace("m.content | trim", "m.content + (1 if m.content == 'odd' else '')")
    with pytest.raises(DataError, match=r"^data, record 1, turn 2 \(assistant\): the chat template cannot write it \("):
        trained(equipped(fails), ASKED, {**SAID, "content": "odd"}, ASKED)


def test_masked_answers_are_counted_and_not_trained(equipped: Callable[[str], Any]) -> None:
    rows = Rows.from_dicts(
        [
            {"messages": [ASKED, {**SAID, "content": "bad", "weight": 0}, ASKED, SAID]},
            {"messages": [ASKED, {**SAID, "weight": 0}]},
        ],
        name="data",
    )
    tokenizer = equipped(TRIM)
    task = CausalLM(
        tokenizer, Formatter(tokenizer, columns={}, template=None, available=["messages"]), head_loss=HeadLoss()
    )
    ledger = task.encode(rows, max_length=999, too_long="error", training=True).ledger
    report = ledger.report()
    assert report["masked"] == {"turns": 1, "tokens": len("bad") + 2}  # its end and the line break
    assert {e["reason"]: e["rows"] for e in report["left_out"]} == {
        "dropped: the data masks all assistant turns in it": 1
    }
    assert [(r["role"], r["trained"]) for r in report["roles"]] == [("user", 0), ("assistant", 2), ("template", 0)]
    (note,) = find(ledger)
    assert note.kind == "masked_turns" and note.message.startswith("1 assistant turn (5 tokens) is not trained")
