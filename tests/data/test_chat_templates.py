"""Which tokens are trained under common chat templates. The templates are written for these tests in the style of each
family. The expected masks are by hand, or those of transformers for the same template with its marks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peftlab.adapters import HeadLoss
from peftlab.data import Rows
from peftlab.data.chat import ControlRule, Formatter
from peftlab.data.chat_template import Rendered
from peftlab.data.tokens import Tokens, tokenize
from peftlab.errors import DataError
from peftlab.tasks import causal_lm
from peftlab.tasks.causal_lm import CausalLM


@dataclass(frozen=True)
class Family:
    """special: added special tokens. eos: the tokenizer's end of text. masks: for ``DIALOG``, the text that is
    trained, turn by turn. marked: the same template with transformers' own marks around what an assistant writes. Its line
    breaks are expressions, because Jinja drops one that follows a mark. refused: roles that the template has no turn for."""

    template: str
    special: tuple[str, ...]
    eos: str
    masks: tuple[str, ...]
    marked: str
    refused: tuple[str, ...] = ()


FAMILIES = {
    "chatml": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        ("one<|im_end|>", "<|im_end|>", "three<|im_end|>"),
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "llama 3": Family(
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
        "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        "<|end_of_text|>",
        ("one<|eot_id|>", "<|eot_id|>", "three<|eot_id|>"),
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|eot_id|>{% endgeneration %}"
        "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ),
    "mistral": Family(
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content | trim }}</s>{% else %}"
        "{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        "</s>",
        (" one</s>", " </s>", " three</s>"),
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
        "{% generation %} {{ m.content | trim }}</s>{% endgeneration %}"
        "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}",
        refused=("system", "tool"),
    ),
    "gemma": Family(
        "<bos>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"),
        "<eos>",
        ("one<end_of_turn>", "<end_of_turn>", "three<end_of_turn>"),
        "<bos>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}<start_of_turn>"
        "{% if m.role == 'assistant' %}{{ 'model\n' }}{% generation %}{{ m.content | trim }}<end_of_turn>{% endgeneration %}"
        "{% else %}{{ m.role }}\n{{ m.content | trim }}<end_of_turn>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        refused=("system",),
    ),
    # It drops thoughts of turns before the last question. The last answer always has its thoughts, even empty ones.
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
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
        "{% endfor %}{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
        "{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}"
        "{% generation %}{% if loop.index0 > ns.last %}<think>{{ '\n' + thought }}\n</think>\n\n{% endif %}{{ said }}<|im_end|>"
        "{% endgeneration %}{% elif m.role == 'tool' %}<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "phi": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|endoftext|>",
        ("one<|end|>", "<|end|>", "three<|end|>"),
        "{% for m in messages %}<|{{ m.role }}|>{{ '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    ),
    "zephyr": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("</s>",),
        "</s>",
        ("one</s>", "</s>", "three</s>"),
        "{% for m in messages %}<|{{ m.role }}|>{{ '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + eos_token }}{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
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


def equipped(tokenizer: Any, family: Family) -> Any:
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.special), "eos_token": family.eos})
    tokenizer.chat_template = family.template
    return tokenizer


def merging(*, trim_offsets: bool = False) -> Any:
    """A byte-level tokenizer with merges, some of them across the border of a header and an answer."""
    line, space = "\u010a", "\u0120"  # as byte-level vocabularies write them
    merges = [("]", space), (line, "o"), (space, "o"), ("n", "e"), (line, line)]
    words = ["<|pad|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|pad|>")


@pytest.fixture
def make(tokenizer_of: Callable[[str], Any]) -> Callable[..., Any]:
    def tokenizer(name: str, *, merged: bool = False) -> Any:
        return equipped(merging() if merged else tokenizer_of("tiny:llama"), FAMILIES[name])

    return tokenizer


def encoded(
    tokenizer: Any, messages: list[dict[str, str]], *, control_tokens: ControlRule = "keep"
) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them are trained. Control tokens in the data are the tokens, as for transformers."""
    rows = Rows.from_dicts([{"messages": messages}], name="a.jsonl")
    formatter = Formatter(tokenizer, columns={}, template=None, available=["messages"], control_tokens=control_tokens)
    task = CausalLM(tokenizer, formatter, head_loss=HeadLoss())
    (example,) = task.encode(rows, max_length=10_000, too_long="error", training=True).examples
    return example.ids.tolist(), example.trained.tolist()


def trained(tokenizer: Any, messages: list[dict[str, str]]) -> list[str]:
    """The trained tokens as text, one piece per run."""
    runs: list[list[int]] = [[]]
    for token, chosen in zip(*encoded(tokenizer, messages), strict=True):
        if chosen:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def dialog(name: str) -> list[dict[str, str]]:
    return [m for m in DIALOG if m["role"] not in FAMILIES[name].refused]


def chats(name: str) -> dict[str, list[dict[str, str]]]:
    """Conversations of every kind that the template of a family takes."""
    codes = " ".join(FAMILIES[name].special)
    turns = {
        "dialog": DIALOG,
        "ends with the user": DIALOG[:-1],
        "tool": [
            {"role": "user", "content": "time?"},
            {"role": "assistant", "content": "<think>\nask\n</think>\n\ncall clock"},
            {"role": "tool", "content": "one o'clock"},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "one?"},
            {"role": "assistant", "content": "<think>\none\n</think>\n\none"},
        ],
        "white space": [
            {"role": "user", "content": " a "},
            {"role": "assistant", "content": "\n one \n"},
            {"role": "user", "content": "\n"},
            {"role": "assistant", "content": "  "},
        ],
        "codes in the words": [
            {"role": "system", "content": codes},
            {"role": "user", "content": f"user {codes}"},
            {"role": "assistant", "content": f"one {codes} one"},
            {"role": "user", "content": f"{codes} assistant"},
            {"role": "assistant", "content": codes},
        ],
        "other letters": [
            {"role": "user", "content": "\u65e5\u672c\u00a0?"},
            {"role": "assistant", "content": "\u00e9\U0001f642"},
            {"role": "assistant", "content": "\u672c\u00e9"},
        ],
        "answers without a question": [
            {"role": "assistant", "content": "one"},
            {"role": "assistant", "content": "one"},
        ],
    }
    return {what: [m for m in chat if m["role"] not in FAMILIES[name].refused] for what, chat in turns.items()}


@EACH_FAMILY
def test_chat_masks_train_answers_and_their_ends_only(make: Callable[[str], Any], name: str) -> None:
    assert tuple(trained(make(name), dialog(name))) == FAMILIES[name].masks


@EACH_FAMILY
def test_chat_masks_do_not_train_repeated_words_elsewhere(make: Callable[[str], Any], name: str) -> None:
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
def test_chat_masks_of_a_dialog_that_ends_with_the_user(make: Callable[[str], Any], name: str) -> None:
    assert tuple(trained(make(name), dialog(name)[:-1])) == FAMILIES[name].masks[:2]


def test_chat_masks_train_thoughts_of_the_last_answer_only(make: Callable[[str], Any]) -> None:
    turns = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
        {"role": "user", "content": "b?"},
        {"role": "assistant", "content": "<think>\nwell\n</think>\n\nno"},
    ]
    assert trained(make("qwen 3"), turns) == ["yes<|im_end|>", "<think>\nwell\n</think>\n\nno<|im_end|>"]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (" b?", "yes"),  # the space makes it differ from the "b?" of the last question
        ("a?", "no<|im_end|>\nyes"),  # the words contain the end of a turn
    ],
)
def test_chat_masks_locate_earlier_answers_among_similar_text(
    make: Callable[[str], Any], question: str, answer: str
) -> None:
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "b?"},
        {"role": "assistant", "content": "yes"},
    ]
    assert trained(make("qwen 3"), turns) == [f"{answer}<|im_end|>", "<think>\n\n</think>\n\nyes<|im_end|>"]


def test_chat_masks_do_not_train_tool_messages(make: Callable[[str], Any]) -> None:
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
def test_chat_template_that_refuses_a_system_turn_names_the_row(make: Callable[[str], Any], name: str) -> None:
    with pytest.raises(DataError, match=r"record 1, turn 1 \(system\): the chat template rejects it: "):
        trained(make(name), DIALOG)


def check_masks(tokenizer: Any, name: str) -> None:
    """Checks our masks, with and without marks in the template, against those of transformers, which uses the marks."""
    for what, chat in chats(name).items():
        theirs = tokenizer.apply_chat_template(
            chat, chat_template=FAMILIES[name].marked, return_dict=True, return_assistant_tokens_mask=True
        )
        for template in (FAMILIES[name].template, FAMILIES[name].marked):
            tokenizer.chat_template = template
            ids, mask = encoded(tokenizer, chat)
            assert ids == theirs["input_ids"], what
            assert mask == list(map(bool, theirs["assistant_masks"])), what


# transformers 5.23 differs from us in four cases, none of them here. A marked line break after the end of a turn: we never train
# it. An answer that begins in the first token of a row: nothing predicts that one. A block that ends with a letter of several
# byte tokens: it marks the first of them only. A tokenizer that takes white space out of the offsets: see below.
@EACH_FAMILY
@pytest.mark.parametrize("merged", [False, True])
def test_chat_masks_equal_those_of_transformers(make: Callable[..., Any], name: str, merged: bool) -> None:
    check_masks(make(name, merged=merged), name)


@EACH_FAMILY
def test_chat_masks_train_a_token_across_the_start_of_an_answer(make: Callable[..., Any], name: str) -> None:
    header = "]" if name == "mistral" else "\n"
    assert trained(make(name, merged=True), dialog(name))[0] == header + FAMILIES[name].masks[0]


def test_chat_masks_train_an_answer_without_a_token_for_its_first_character() -> None:
    """This tokenizer leaves the space out of the offsets of " one". From there on transformers 5.23 marks nothing in the row;
    if no token has the last character of a block, it marks all that follows (its issue 47325)."""
    tokenizer = equipped(merging(trim_offsets=True), FAMILIES["chatml"])
    turns = [{"role": role, "content": " one"} for role in ("user", "assistant", "user", "assistant")]
    assert trained(tokenizer, turns) == [" one<|im_end|>", " one<|im_end|>"]


def test_chat_masks_train_white_space_outside_the_offsets() -> None:
    tokenizer = equipped(merging(trim_offsets=True), FAMILIES["chatml"])
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "if a:\n    b c"}]
    assert trained(tokenizer, turns) == ["if a:\n    b c<|im_end|>"]


def _shifted(by: int) -> Callable[..., Tokens]:
    def fault(*args: Any, **options: Any) -> Tokens:
        tokens = tokenize(*args, **options)
        return replace(tokens, trained=np.roll(tokens.trained, by))

    return fault


def _moved(start: int, end: int) -> Callable[..., Tokens]:
    def fault(tokenizer: Any, rendered: Sequence[Rendered], **options: Any) -> Tokens:
        wrong = [
            replace(r, parts=[replace(p, start=p.start + start, end=p.end + end) if p.trained else p for p in r.parts])
            for r in rendered
        ]
        return tokenize(tokenizer, wrong, **options)

    return fault


def _first_answer_lost(tokenizer: Any, rendered: Sequence[Rendered], **options: Any) -> Tokens:
    wrong = []
    for row in rendered:
        first = next(p for p in row.parts if p.trained)
        wrong.append(replace(row, parts=[p for p in row.parts if p is not first]))
    return tokenize(tokenizer, wrong, **options)


def _line_break_trained(tokenizer: Any, rendered: Sequence[Rendered], **options: Any) -> Tokens:
    return tokenize(tokenizer, rendered, **(options | {"stop_ids": ()}))


FAULTS = {
    "shifted": _shifted(1),
    "shifted back": _shifted(-1),
    "begins early": _moved(-1, 0),
    "begins late": _moved(1, 0),
    "ends early": _moved(0, -len("<|im_end|>\n")),
    "ends late": _moved(0, len("<")),
    "first answer lost": _first_answer_lost,
    "line break trained": _line_break_trained,
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_chat_masks_comparison_catches_faults(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, fault: str, merged: bool
) -> None:
    tokenizer = make("chatml", merged=merged)
    check_masks(tokenizer, "chatml")
    monkeypatch.setattr(causal_lm, "tokenize", FAULTS[fault])
    with pytest.raises(AssertionError):
        check_masks(tokenizer, "chatml")
