"""Which tokens are trained under the templates people use. The templates are written for the purpose, in the manner of each
family; the expected masks are worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from peftlab.adapters import HeadLoss
from peftlab.data import Rows
from peftlab.data.chat import Formatter
from peftlab.errors import DataError
from peftlab.tasks import CausalLM


@dataclass(frozen=True)
class Family:
    """special: tokens beside the tokenizer's own. eos: the tokenizer's end of text. masks: for ``DIALOG``, the text that is
    trained, turn by turn."""

    template: str
    special: tuple[str, ...]
    eos: str
    masks: tuple[str, ...]
    system: bool = True


FAMILIES = {
    "chatml": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        ("one<|im_end|>", "<|im_end|>", "three<|im_end|>"),
    ),
    "llama 3": Family(
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
        "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        "<|end_of_text|>",
        ("one<|eot_id|>", "<|eot_id|>", "three<|eot_id|>"),
    ),
    "mistral": Family(
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content | trim }}</s>{% else %}"
        "{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        "</s>",
        (" one</s>", " </s>", " three</s>"),
        system=False,
    ),
    "gemma": Family(
        "<bos>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"),
        "<eos>",
        ("one<end_of_turn>", "<end_of_turn>", "three<end_of_turn>"),
        system=False,
    ),
    # Thoughts of turns before the last question are dropped; the last answer always has its thoughts, even empty ones.
    "qwen 3": Family(
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
        "{% endfor %}{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
        "{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}"
        "{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
        "{% elif m.role == 'tool' %}<tool_response>\n{{ m.content }}\n</tool_response>{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        "<|im_end|>",
        ("one<|im_end|>", "<|im_end|>", "<think>\n\n</think>\n\nthree<|im_end|>"),
    ),
    "phi": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|endoftext|>",
        ("one<|end|>", "<|end|>", "three<|end|>"),
    ),
    "zephyr": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("</s>",),
        "</s>",
        ("one</s>", "</s>", "three</s>"),
    ),
}
DIALOG = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "first one"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "second"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "third"},
    {"role": "assistant", "content": "three"},
]
EACH_FAMILY = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def make(tokenizer_of: Callable[[str], Any]) -> Callable[[str], Any]:
    def tokenizer(name: str) -> Any:
        family, made = FAMILIES[name], tokenizer_of("tiny:llama")
        made.add_special_tokens({"additional_special_tokens": list(family.special), "eos_token": family.eos})
        made.chat_template = family.template
        return made

    return tokenizer


def trained(tokenizer: Any, messages: list[dict[str, str]]) -> list[str]:
    """The trained tokens as text, one piece for each run of them."""
    rows = Rows.from_dicts([{"messages": messages}], name="a.jsonl")
    task = CausalLM(
        tokenizer, Formatter(tokenizer, columns={}, template=None, available=["messages"]), head_loss=HeadLoss()
    )
    (example,) = task.encode(rows, max_length=10_000, too_long="error", training=True).examples
    runs: list[list[int]] = [[]]
    for token, chosen in zip(example.ids.tolist(), example.trained.tolist(), strict=True):
        if chosen:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def dialog(name: str) -> list[dict[str, str]]:
    return DIALOG if FAMILIES[name].system else DIALOG[1:]


@EACH_FAMILY
def test_answers_and_their_ends_are_trained_and_nothing_else(make: Callable[[str], Any], name: str) -> None:
    assert tuple(trained(make(name), dialog(name))) == FAMILIES[name].masks


@EACH_FAMILY
def test_words_of_an_answer_elsewhere_are_not_trained(make: Callable[[str], Any], name: str) -> None:
    turns = [
        {"role": "user", "content": "say three three"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "three three"},
    ]
    first, last = trained(make(name), turns)
    assert first == FAMILIES[name].masks[2].removeprefix("<think>\n\n</think>\n\n")
    assert last.replace("three three", "three", 1) == FAMILIES[name].masks[2]


@EACH_FAMILY
def test_a_dialog_that_ends_with_the_user(make: Callable[[str], Any], name: str) -> None:
    assert tuple(trained(make(name), dialog(name)[:-1])) == FAMILIES[name].masks[:2]


def test_thoughts_of_the_last_answer_are_trained_those_of_earlier_ones_are_gone(make: Callable[[str], Any]) -> None:
    turns = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
        {"role": "user", "content": "b?"},
        {"role": "assistant", "content": "<think>\nwell\n</think>\n\nno"},
    ]
    assert trained(make("qwen 3"), turns) == ["yes<|im_end|>", "<think>\nwell\n</think>\n\nno<|im_end|>"]


def test_tool_messages_are_not_trained(make: Callable[[str], Any]) -> None:
    turns = [
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": "<think>\nask\n</think>\n\ncall clock"},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "noon"},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "welcome"},
    ]
    assert trained(make("qwen 3"), turns) == [
        "call clock<|im_end|>", "noon<|im_end|>", "<think>\n\n</think>\n\nwelcome<|im_end|>",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_a_system_turn_that_the_template_refuses(make: Callable[[str], Any], name: str) -> None:
    with pytest.raises(DataError, match=r"record 1: the chat template refused"):
        trained(make(name), DIALOG)
