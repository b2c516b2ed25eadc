"""Who wrote which part of a chat, by the outline of its roles. Compared with the search, and with the record that
transformers keeps of a template with marks as it runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_templates import FAMILIES, Family, equipped
from transformers.utils.chat_template_utils import render_jinja_template

from peftlab.data.chat_template import ChatTemplate, Part, Rendered
from peftlab.data.messages import Conversation
from peftlab.errors import DataError

Chat = list[dict[str, str]]
# The system's words and the first question share a turn, and no prompt is written for an answer.
FOLDED = Family(
    "{% for m in messages %}{% if m.role == 'system' %}<s>[INST] <<SYS>>\n{{ m.content }}\n<</SYS>>\n\n"
    "{% elif m.role == 'user' %}{{ '' if loop.previtem is defined and loop.previtem.role == 'system' else '<s>[INST] ' }}"
    "{{ m.content }} [/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
    ("<s>", "</s>"),
    "</s>",
    (),
    "{% for m in messages %}{% if m.role == 'system' %}<s>[INST] <<SYS>>\n{{ m.content }}\n<</SYS>>\n\n"
    "{% elif m.role == 'user' %}{{ '' if loop.previtem is defined and loop.previtem.role == 'system' else '<s>[INST] ' }}"
    "{{ m.content }} [/INST]{% else %}{% generation %} {{ m.content }} </s>{% endgeneration %}{% endif %}{% endfor %}",
    refused=("tool",),
)
TEMPLATES = {**FAMILIES, "llama 2": FOLDED}
# They write all words unchanged or strip them all, and an answer does not depend on what follows: there is always an outline.
PLAIN = ("chatml", "llama 2", "llama 3", "gemma", "phi", "zephyr")
EACH_TEMPLATE = pytest.mark.parametrize("name", TEMPLATES)
# Text of headers, of what surrounds words, and of the outline itself; white space of all kinds; other letters.
WORDS = (
    "user", "assistant", "system", "tool", "model", "one", "two one", "I", "<|im_start|>assistant\n", "<|im_end|>\n",
    "<|user|>\n", "<|end_header_id|>\n\n", "<start_of_turn>model\n", " [/INST]", "<s>[INST] ", "<think>\n", "\n</think>\n\n",
    "{{ m.content }}", "peftlab probe", "peftlab probe 1;", " ", "\n", "\t", "\u00a0", "\u00e9", "\u65e5\u672c", "\U0001f642",
)  # fmt: skip


def conversation(chat: list[dict[str, Any]]) -> Conversation:
    return Conversation(chat, [m["role"] == "assistant" for m in chat], [f"turn {i}" for i in range(1, len(chat) + 1)])


@dataclass(frozen=True)
class Lab:
    """A family's template, its tokenizer, and the ChatTemplate that keeps outlines between conversations."""

    family: Family
    tokenizer: Any
    template: ChatTemplate

    def write(self, chat: Chat) -> str:
        return str(self.tokenizer.apply_chat_template(chat, tokenize=False))

    def marks(self, chat: Chat) -> list[tuple[int, int]]:
        """Where the template wrote the answers and their ends, as transformers records it."""
        (text,), (marks,) = render_jinja_template(
            [chat],
            chat_template=self.family.marked,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        assert text == self.write(chat)
        return marks

    def asked(self, chat: Chat, text: str) -> list[Part]:
        """Parts of the messages that are no answers, from what the template writes around unique words."""
        words = [f"\u2402{i}\u2403" for i in range(len(chat))]
        around = re.split(
            "\u2402[0-9]+\u2403", self.write([m | {"content": w} for m, w in zip(chat, words, strict=True)])
        )
        for contents in ([m["content"] for m in chat], [m["content"].strip() for m in chat]):
            at, parts = len(around[0]), []
            for message, own, after in zip(chat, contents, around[1:], strict=True):
                if message["role"] != "assistant" and own:
                    parts.append(Part(at, at + len(own), message["role"]))
                at += len(own) + len(after)
            if at == len(text):
                return parts
        raise AssertionError(f"neither the words as they are nor the stripped ones make up {text!r}")


@pytest.fixture(scope="module")
def lab_of(tokenizer_of: Callable[[str], Any]) -> Callable[[str], Lab]:
    labs: dict[str, Lab] = {}

    def lab(name: str) -> Lab:
        if name not in labs:
            tokenizer = equipped(tokenizer_of("tiny:llama"), TEMPLATES[name])
            labs[name] = Lab(TEMPLATES[name], tokenizer, ChatTemplate(tokenizer))
        return labs[name]

    return lab


def check_parts(lab: Lab, chat: Chat, rendered: Rendered) -> None:
    """Checks that all parts are in order and that the answers are where the template wrote them."""
    text = lab.write(chat)
    assert rendered.text == text
    assert all(part.start < part.end for part in rendered.parts)
    assert all(one.end <= next_.start for one, next_ in pairwise(rendered.parts))
    answers = [part for part in rendered.parts if part.trained]
    marks = lab.marks(chat)
    assert [part.start for part in answers] == [start for start, _ in marks]
    # A line break after the end of the turn is in the part, and no trained token.
    assert [text[end : part.end].strip() for part, (_, end) in zip(answers, marks, strict=True)] == [""] * len(marks)


def check(lab: Lab, chat: Chat) -> bool:
    """Whether ``chat`` has an outline. Checks that outline and search find all parts where the template wrote them."""
    text = lab.write(chat)
    searched = lab.template._searched(conversation(chat), text, "here")
    check_parts(lab, chat, searched)
    outlined = lab.template._outlined(conversation(chat), text)
    if outlined is None:
        return False
    check_parts(lab, chat, outlined)
    assert not any(part.flaw for part in outlined.parts)
    assert [part for part in outlined.parts if not part.trained] == lab.asked(chat, text)
    assert searched.parts == outlined.parts
    return True


@st.composite
def chats(draw: st.DrawFn, name: str) -> Chat:
    """Any order of the roles that a template takes. There are few contents, so they often repeat."""
    family = TEMPLATES[name]
    content = st.lists(st.sampled_from([*WORDS, *family.special]), max_size=4).map("".join) | st.text(max_size=5)
    pool = draw(st.lists(content | content.map(str.strip), min_size=1, max_size=3))
    roles = [role for role in ("user", "assistant", "system", "tool") if role not in family.refused]
    turn = st.fixed_dictionaries({"role": st.sampled_from(roles), "content": st.sampled_from(pool)})
    return draw(st.lists(turn, min_size=1, max_size=6))


@EACH_TEMPLATE
def test_chat_outline_agrees_with_search_and_marks(lab_of: Callable[[str], Lab], name: str) -> None:
    lab = lab_of(name)
    outlined: list[bool] = []

    @settings(max_examples=150, deadline=None)
    @given(chat=chats(name))
    def run(chat: Chat) -> None:
        outlined.append(check(lab, chat))

    run()
    assert all(outlined) if name in PLAIN else any(outlined)


def test_chat_outline_depends_on_the_roles_alone(lab_of: Callable[[str], Lab], monkeypatch: pytest.MonkeyPatch) -> None:
    template, seen = ChatTemplate(lab_of("chatml").tokenizer), []
    monkeypatch.setattr(template, "_outline", lambda roles: seen.append(roles))
    for roles in ("user assistant", "user user", "user assistant"):
        template._outlined(conversation([{"role": role, "content": "one"} for role in roles.split()]), "")
    assert seen == [("user", "assistant"), ("user", "user")]


@pytest.mark.parametrize(
    "message",
    [{"role": "user", "content": "one", "name": "I"}, {"role": "user", "content": [{"type": "text", "text": "one"}]}],
)
def test_chat_outline_is_none_for_messages_with_more_than_text(
    lab_of: Callable[[str], Lab], message: dict[str, Any]
) -> None:
    lab = lab_of("chatml")
    assert lab.template._outlined(conversation([message]), lab.write([message])) is None


# Outline and search differ if the prompt for an answer depends on words of the question, here so that it is not what the
# text has at that place. The outline has the answer. The search takes what follows the prompt as the answer, so it refuses.
MOODY = FAMILIES["chatml"].template.removesuffix("{% endif %}") + (
    "{% if messages[-1].content.endswith('!') %}<think></think>{% endif %}{% endif %}"
)
# An empty answer without an end gives no part in the outline, and the search refuses it.
ENDLESS = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\n' if m.role == 'user' else '' }}{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "question", "answer", "parts"),
    [
        (MOODY, "go!", "one", [Part(17, 20, "user"), Part(53, 67, "assistant", trained=True)]),
        (ENDLESS, "go", "", [Part(6, 8, "user")]),
    ],
)
def test_chat_outline_accepts_what_only_the_search_refuses(
    tokenizer_of: Callable[[str], Any], template: str, question: str, answer: str, parts: list[Part]
) -> None:
    tokenizer = tokenizer_of("tiny:llama")
    tokenizer.chat_template = template
    chat = conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    wrapped = ChatTemplate(tokenizer)
    (rendered,) = wrapped.render([chat], ["here"])
    assert rendered.parts == parts
    with pytest.raises(DataError, match="another header before an answer"):
        wrapped._searched(chat, rendered.text, "here")


# Like Mistral: no generation prompt, and a special token before a call. Like gpt-oss: special tokens after the prompt.
CALLING = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.tool_calls is defined %}"
    "[TOOL_CALLS] {{ m.tool_calls | tojson }}</s>{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' else '' }}<|message|>"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
HEADED = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
SAYING = {"role": "assistant", "content": "one"}


@pytest.mark.parametrize(
    ("template", "answer", "flaw"),
    [
        (CALLING, SAYING, ""),
        (CALLING, CALL, ""),
        (CALLING, {"role": "assistant", "content": "<think>[TOOL_CALLS]</think>one"}, ""),
        (CHANNELS, SAYING, ""),
        (HEADED, SAYING, "header"),
    ],
)
def test_chat_outline_tells_special_tokens_from_a_header(
    tokenizer_of: Callable[[str], Any], template: str, answer: dict[str, Any], flaw: str
) -> None:
    tokenizer = tokenizer_of("tiny:llama")
    codes = ["[INST]", "[/INST]", "[TOOL_CALLS]", "</s>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": codes})
    tokenizer.chat_template = template
    chat, wrapped = conversation([{"role": "user", "content": "time?"}, answer]), ChatTemplate(tokenizer)
    (rendered,) = wrapped.render([chat], ["here"])
    assert rendered.parts[-1].flaw == wrapped._searched(chat, rendered.text, "here").parts[-1].flaw == flaw


def _with(change: Callable[[list[Any]], list[Any]]) -> Callable[[pytest.MonkeyPatch], None]:
    right = ChatTemplate._outline

    def outline(self: ChatTemplate, roles: tuple[str, ...]) -> list[Any] | None:
        turns = right(self, roles)
        return turns and change(turns)

    return lambda patch: patch.setattr(ChatTemplate, "_outline", outline)


def _endings_passed_on(turns: list[Any]) -> list[Any]:
    endings = ["", *(turn.ending for turn in turns[:-1])]
    moved = [replace(t, opening=e + t.opening, ending="") for e, t in zip(endings, turns, strict=True)]
    return [*moved[:-1], replace(moved[-1], ending=turns[-1].ending)]


def _laid_out_by(change: Callable[..., Rendered | None]) -> Callable[[pytest.MonkeyPatch], None]:
    right = ChatTemplate._laid_out
    return lambda patch: patch.setattr(
        ChatTemplate, "_laid_out", lambda self, *args: change(partial(right, self), *args)
    )


def _shifted(right: Callable[..., Rendered | None], *args: Any) -> Rendered | None:
    rendered = right(*args)
    return rendered and replace(rendered, parts=[replace(p, start=p.start + 1, end=p.end + 1) for p in rendered.parts])


def _any_text(
    right: Callable[..., Rendered | None], text: str, outline: Any, contents: Any, trained: Any
) -> Rendered | None:
    pieces = [s for t, c in zip(outline, contents, strict=True) for s in (t.opening, t.lead, c, t.ending)]
    rendered = right("".join(pieces), outline, contents, trained)
    return rendered and replace(rendered, text=text)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "endings dropped": _with(lambda turns: [replace(t, ending="") for t in turns]),
    "endings with the next turn": _with(_endings_passed_on),
    "headers in the answer": _with(lambda turns: [replace(t, opening="", lead=t.opening + t.lead) for t in turns]),
    "lead not in the answer": _with(lambda turns: [replace(t, opening=t.opening + t.lead, lead="") for t in turns]),
    "shifted": _laid_out_by(_shifted),
    "text not compared": _laid_out_by(_any_text),
    "words never stripped": _laid_out_by(
        lambda right, *args: None if args[2] == [c.strip() for c in args[2]] else right(*args)
    ),
}


def check_all(lab_of: Callable[[str], Lab]) -> None:
    contents = {"system": "one", "user": " one\n", "assistant": "one", "tool": "one "}
    for name in ("chatml", "llama 3", "mistral", "qwen 3"):
        lab = lab_of(name)
        fresh = replace(lab, template=ChatTemplate(lab.tokenizer))
        for roles in ("user assistant", "user assistant assistant", "system user assistant tool assistant"):
            chat = [{"role": r, "content": contents[r]} for r in roles.split() if r not in lab.family.refused]
            assert check(fresh, chat), roles


@pytest.mark.parametrize("fault", FAULTS)
def test_chat_outline_comparison_catches_faults(
    lab_of: Callable[[str], Lab], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    check_all(lab_of)
    FAULTS[fault](monkeypatch)
    with pytest.raises(AssertionError):
        check_all(lab_of)
