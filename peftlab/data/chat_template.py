"""A tokenizer's chat template: conversations as text, and which characters of it each message wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peftlab.errors import DataError, RecipeError

Message = dict[str, Any]
# What can be wrong with a part: the words of its message are not in it, or the header of an answer is.
Flaw = Literal["", "words", "header"]

# Stands for an answer where only what a template writes around it is of interest.
_PROBE = "peftlab probe"
# Characters of a header that tell it from the words of a message.
_OPENING = 16
_ROWS_PROBED = 50


@dataclass(frozen=True, slots=True)
class Part:
    """Characters ``start:end`` of a row's text that one role wrote; an answer's include the end of its turn.

    Attributes: trained: whether the model learns to write it.
    """

    start: int
    end: int
    role: str
    trained: bool = False
    flaw: Flaw = ""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text of one row and its parts in order; what no part holds the template wrote."""

    text: str
    parts: list[Part]


@dataclass(frozen=True, slots=True)
class _Turn:
    """What a template writes before a message's part, in the part before its words, and after them."""

    role: str
    opening: str
    lead: str
    ending: str


class ChatTemplate:
    """The chat template of ``tokenizer``."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        self._special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        self._probed: str | None = None
        self._has_prompt: bool | None = None
        self._openings: dict[tuple[str, str | None], str] = {}
        self._outlines: dict[tuple[str, ...], list[_Turn] | None] = {}

    def text(self, messages: list[Message], where: str, **options: Any) -> str:
        """One conversation as text. Raises: DataError when the template refuses it, RecipeError when it is no template."""
        from jinja2 import TemplateSyntaxError

        try:
            (text,) = self._tokenizer.apply_chat_template([messages], tokenize=False, **options)
        except TemplateSyntaxError as error:
            raise RecipeError(
                f"line {error.lineno} of the chat template: {error.message}", key="model.chat_template"
            ) from None
        except Exception as error:  # Jinja templates raise what they like, raise_exception() included
            raise DataError(
                f"{where}: the chat template refused these messages: {error}", key="model.chat_template"
            ) from error
        return str(text)

    def render(self, chats: list[list[Message]], wheres: Sequence[str]) -> list[Rendered]:
        """Text and parts of conversations, the parts by the outline of their roles where that gives the same text.

        Raises: DataError where an answer cannot be told from what surrounds it.
        """
        try:
            texts = list(self._tokenizer.apply_chat_template(chats, tokenize=False))
        except Exception:  # one by one, to name the row
            texts = [self.text(messages, where) for messages, where in zip(chats, wheres, strict=True)]
        rendered = []
        for chat, text, where in zip(chats, texts, wheres, strict=True):
            rendered.append(self._outlined(chat, text) or self._searched(chat, text, where))
        return rendered

    def probe(self, chats: Iterable[list[Message]]) -> str | None:
        """The beginning of one of ``chats`` up to a first answer that says ``_PROBE``, other messages ``?``; None where the
        template refuses that."""
        if self._probed is None:
            for _, chat in zip(range(_ROWS_PROBED), chats, strict=False):
                roles = [m["role"] for m in chat]
                if "assistant" in roles:
                    i = roles.index("assistant")
                    answer = {"role": "assistant", "content": _PROBE}
                    try:
                        text = self.text([*({**m, "content": "?"} for m in chat[:i]), answer], "")
                    except DataError:
                        continue
                    self._probed = text if _PROBE in text else None
                    break
        return self._probed

    def turn_end(self, chats: Iterable[list[Message]]) -> str | None:
        """What the template writes after an answer; None where that cannot be found out."""
        probed = self.probe(chats)
        return None if probed is None else probed[probed.rindex(_PROBE) + len(_PROBE) :]

    def _outlined(self, chat: list[Message], text: str) -> Rendered | None:
        """None where ``text`` is not what the template writes around the words of ``chat``, as they are or stripped."""
        roles = tuple(str(m["role"]) for m in chat)
        if roles not in self._outlines:
            self._outlines[roles] = self._outline(roles)
        outline = self._outlines[roles]
        contents = [c for m in chat if isinstance(c := m.get("content"), str)]
        if outline is None or any(len(m) > 2 for m in chat) or len(contents) < len(chat):
            return None
        return self._laid_out(text, outline, contents) or self._laid_out(text, outline, [c.strip() for c in contents])

    def _outline(self, roles: tuple[str, ...]) -> list[_Turn] | None:
        """What the template writes around the words of each message; None where that changes with the messages after it."""
        chat = [{"role": role, "content": f"{_PROBE} {i};"} for i, role in enumerate(roles)]
        turns, at = [], 0
        try:
            text = self.text(chat, "")
            for i, message in enumerate(chat):
                start = text.index(message["content"], at)
                end = start + len(message["content"])
                if message["role"] == "assistant":
                    before = self.text(chat[:i], "", add_generation_prompt=True)
                    through = self.text(chat[: i + 1], "")
                    if not (text.startswith(before) and text.startswith(through) and at <= len(before) <= start):
                        return None
                    turns.append(
                        _Turn(
                            message["role"], text[at : len(before)], text[len(before) : start], text[end : len(through)]
                        )
                    )
                    at = len(through)
                else:
                    ending = text[end:] if i == len(chat) - 1 else ""
                    turns.append(_Turn(message["role"], text[at:start], "", ending))
                    at = end
        except (DataError, ValueError):  # refused, or rewritten
            return None
        return turns

    def _searched(self, chat: list[Message], text: str, where: str) -> Rendered:
        """An answer is what the template adds to the conversation up to the generation prompt of its turn."""
        parts: list[Part] = []
        cursor = 0
        for i, message in enumerate(chat):
            found = self._answer(chat, i, text, cursor, where) if message["role"] == "assistant" else None
            part = found or self._asked(chat, i, text, cursor)
            if part.end > part.start or part.flaw:
                parts.append(part)
            cursor = part.end
        return Rendered(text, parts)

    def _asked(self, chat: list[Message], i: int, text: str, cursor: int) -> Part:
        """Where the words of ``chat[i]``, which is no answer, stand after ``cursor``: an empty part if they do not."""
        role, content = str(chat[i]["role"]), chat[i].get("content")
        before = str(chat[i - 1]["role"]) if i else None
        opening = self._opening(role, before)  # without it "user" would be found in a header
        stripped = _words(content)
        # As they are and stripped: what the template did not write of the two may still open a later message.
        said = (content, stripped) if isinstance(content, str) else (stripped,)
        # The end of an answer's turn is in its part, and in the opening after it.
        start = max(0, cursor - len(opening)) if before == "assistant" else cursor
        found = [(at, words) for words in said if (at := text.find(opening + words, start)) >= 0]
        at, words = min(found, key=lambda place: place[0], default=(-1, stripped))
        at = at + len(opening) if at >= 0 else text.find(words, cursor)
        return Part(at, at + len(words), role) if at >= 0 else Part(cursor, cursor, role, flaw="words")

    def _opening(self, role: str, before: str | None) -> str:
        """The end of what the chat template writes before a message of this role, between its words and those of the message
        before it, if there is one; empty where it refuses the two."""
        if (role, before) not in self._openings:
            opening = ""
            for roles in [[]] if before is None else [[before], ["user", before], ["user", "assistant", before]]:
                try:
                    text = self.text([{"role": r, "content": _PROBE} for r in (*roles, role)], "")
                except DataError:
                    continue
                if _PROBE in text:
                    opening = text.split(_PROBE)[-2][-_OPENING:]
                    break
            self._openings[role, before] = opening
        return self._openings[role, before]

    def _answer(self, messages: list[Message], i: int, text: str, cursor: int, where: str) -> Part:
        """Where the answer ``messages[i]`` and the end of its turn stand in ``text``."""
        before = self._prompt(messages[:i], where)
        through = text if i == len(messages) - 1 else self.text(messages[: i + 1], where)
        said = _said(messages[i])
        if text.startswith(before) and text.startswith(through) and len(through) > len(before):
            part = text[len(before) : len(through)]
            if not all(words in part for words in said):
                return Part(len(before), len(through), "assistant", trained=True, flaw="words")
            lead = part[: part.find(said[0])] if said[0] else part.removesuffix(self.turn_end([messages]) or part)
            if self._flaw(lead):
                # Thoughts and calls may hold special tokens too: a header is what an answer without them has.
                plain = [*messages[:i], {"role": "assistant", "content": _PROBE}]
                lead = self.text(plain, where).removeprefix(before).partition(_PROBE)[0]
            return Part(len(before), len(through), "assistant", trained=True, flaw=self._flaw(lead))
        # Templates of thinking models drop the thoughts of earlier turns, so that no shorter conversation is a prefix.
        # What stands around an answer stays the same.
        opening = before.removeprefix(self.text(messages[:i], where)) if i else ""
        ending = self.turn_end([messages]) or ""
        start = text.find(opening, cursor) + len(opening) if opening in text[cursor:] else -1
        at = text.find(said[0], max(0, start))
        # The words may hold what ends a turn. With such an end before them they are those of a later turn.
        end = text.find(ending, at + len(said[0])) + len(ending) if ending.strip() else -1
        within = at >= 0 and ending not in text[start:at] and all(words in text[start:end] for words in said)
        if not opening or start < 0 or end <= start or not within:
            raise DataError(
                f"{where}: the assistant's part cannot be told apart: the chat template {_why(text, said, messages, i)}; "
                "give a template for training with model.chat_template",
                key="model.chat_template",
            )
        return Part(start, end, "assistant", trained=True)

    def _prompt(self, messages: list[Message], where: str) -> str:
        """The conversation up to where the model answers."""
        try:
            return self.text(messages, where, add_generation_prompt=True)
        except DataError:
            if messages:
                raise
            raise DataError(
                f"{where}: the first message is an answer, and the chat template needs one before it to write the header "
                "of an answer; begin with a user message",
                key="data.columns",
            ) from None

    def _flaw(self, lead: str) -> Flaw:
        """Whether ``lead``, what any answer begins with, is a header: it has special tokens, and no generation prompt is
        written. After one they are the model's to write, as the channel of an answer is."""
        return "header" if any(token in lead for token in self._special) and not self._prompts() else ""

    def _prompts(self) -> bool:
        """Whether the template writes a generation prompt."""
        if self._has_prompt is None:
            asked = [{"role": "user", "content": "?"}]
            try:
                self._has_prompt = self.text(asked, "", add_generation_prompt=True) != self.text(asked, "")
            except DataError:
                self._has_prompt = False
        return self._has_prompt

    def _laid_out(self, text: str, outline: list[_Turn], contents: Sequence[str]) -> Rendered | None:
        """``text`` in parts, if it is ``contents`` in this outline."""
        pieces = [
            piece for t, words in zip(outline, contents, strict=True) for piece in (t.opening, t.lead, words, t.ending)
        ]
        if "".join(pieces) != text:
            return None
        parts: list[Part] = []
        at = 0
        for turn, words in zip(outline, contents, strict=True):
            answer = turn.role == "assistant"
            start = at + len(turn.opening)
            at = start + len(turn.lead) + len(words) + len(turn.ending)
            end = at if answer else start + len(words)
            if end > start:
                parts.append(
                    Part(start, end, turn.role, trained=answer, flaw=self._flaw(turn.lead) if turn.lead else "")
                )
        return Rendered(text, parts)


def _words(content: Any) -> str:
    return content.strip() if isinstance(content, str) else ""


def _said(message: Message) -> list[str]:
    """What must be in an answer: its words, without thoughts, and the names of the tools it calls."""
    calls = message.get("tool_calls") or []
    functions = [call.get("function", call) for call in calls if isinstance(call, Mapping)]
    names = [str(f["name"]) for f in functions if isinstance(f, Mapping) and f.get("name")]
    return [_words(message.get("content")).split("</think>")[-1].strip(), *names]


def _why(text: str, said: list[str], messages: list[Message], i: int) -> str:
    if not all(words in text for words in said):
        return f"does not write what turn {i + 1} says"
    if i == len(messages) - 1:
        return "writes another header before an answer than for a generation prompt"
    return f"writes turn {i + 1} differently when more turns follow"
