"""A tokenizer's chat template: renders conversations as text and locates each message in it."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from peftlab.data.answer_proof import has_calls, has_reasoning, required_words, texts
from peftlab.data.messages import Conversation, Message
from peftlab.data.template_reading import TemplateReading, in_parts
from peftlab.errors import DataError, RecipeError

# Flaws of a part: it lacks the words, the tool calls or the reasoning of its message, or it has the header of an answer.
Flaw = Literal["", "words", "calls", "reasoning", "header"]

# A placeholder answer, to see what a template writes around it.
_PROBE = "peftlab probe"
# Characters of a header that distinguish it from the words of a message.
_OPENING = 16
_ROWS_PROBED = 50


@dataclass(frozen=True, slots=True)
class Part:
    """Characters ``start:end`` of a row's text, written by one role; for an answer including the end of its turn.

    Attributes: trained: whether the model learns to write it. masked: whether it is an answer that the data says not to
    train.
    """

    start: int
    end: int
    role: str
    trained: bool = False
    flaw: Flaw = ""
    masked: bool = False


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of one row and its parts in order; the template wrote everything else.

    Attributes: plain: characters [start, end) of each control token in the data that is encoded as text. notes: what was
    noticed about the row, as ``kind`` or ``kind detail``.
    """

    text: str
    parts: list[Part]
    plain: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Turn:
    """What a template writes before a message's part, within the part before its words, and after them."""

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

    @functools.cached_property
    def reading(self) -> TemplateReading:
        """What the template reads of a message."""
        source = self._tokenizer.chat_template
        source = "\n".join(map(str, source.values())) if isinstance(source, dict) else str(source or "")
        return TemplateReading(source, self._tried)

    def _tried(self, messages: Sequence[Message]) -> str | None:
        """The text of messages; None if the template rejects them."""
        try:
            return self._write(messages)
        except RecipeError:
            raise
        except Exception:  # Jinja templates raise any exception, through raise_exception() too
            return None

    def _write(self, messages: Sequence[Message], **options: Any) -> str:
        from jinja2 import TemplateSyntaxError

        try:
            return str(self._tokenizer.apply_chat_template([list(messages)], tokenize=False, **options)[0])
        except TemplateSyntaxError as error:
            raise RecipeError(
                f"line {error.lineno} of the chat template: {error.message}", key="model.chat_template"
            ) from None

    def text(self, chat: Conversation, where: str, *, add_generation_prompt: bool = False) -> str:
        """One conversation, as ``reading.fit`` gives it, as text. Raises: DataError if the template rejects it, RecipeError if
        the template is invalid."""
        options = {"tools": chat.tools, "add_generation_prompt": add_generation_prompt}
        try:
            return self._write(in_parts(chat.messages) if self.reading.parts_only else chat.messages, **options)
        except RecipeError:
            raise
        except Exception as error:  # Jinja templates raise any exception, through raise_exception() too
            raise self._rejected(chat, where, error) from error

    def _rejected(self, chat: Conversation, where: str, error: Exception) -> DataError:
        """The error of a conversation, with the first turn at which the template gives the same one."""
        from jinja2 import TemplateError

        place = ""
        for end in range(1, len(chat.messages) + 1):
            try:
                self._write(chat.messages[:end], tools=chat.tools)
            except Exception as earlier:
                if str(earlier) == str(error):
                    place = f", {chat.places[end - 1]}"
                    break
        reason = f"rejects it: {error}" if type(error) is TemplateError else f"cannot write it ({error})"
        return DataError(f"{where}{place}: the chat template {reason}", key="model.chat_template")

    def render(self, chats: Sequence[Conversation], wheres: Sequence[str]) -> list[Rendered]:
        """The text and parts of conversations, as ``reading.fit`` gives them. The outline of their roles gives the parts if it
        reproduces the text; otherwise they are searched for.

        Raises: DataError if an answer cannot be separated from the text around it.
        """
        rendered = []
        for chat, text, where in zip(chats, self._texts(chats, wheres), wheres, strict=True):
            written = self._outlined(chat, text) or self._searched(chat, text, where)
            unused = [
                f"unused_tools {t['function']['name']}" for t in chat.tools or () if t["function"]["name"] not in text
            ]
            rendered.append(Rendered(text, written.parts, notes=(*chat.notes, *written.notes, *unused[:1])))
        return rendered

    def _texts(self, chats: Sequence[Conversation], wheres: Sequence[str]) -> list[str]:
        """The text of each conversation; those with the same tools are written together."""
        texts = [""] * len(chats)
        groups: dict[str, list[int]] = {}
        for i, chat in enumerate(chats):
            groups.setdefault(json.dumps(chat.tools) if chat.tools else "", []).append(i)
        for group in groups.values():
            written = self._texts_of_group([chats[i] for i in group], [wheres[i] for i in group])
            for i, text in zip(group, written, strict=True):
                texts[i] = text
        return texts

    def _texts_of_group(self, chats: Sequence[Conversation], wheres: Sequence[str]) -> list[str]:
        messages = [in_parts(chat.messages) if self.reading.parts_only else chat.messages for chat in chats]
        try:
            return list(self._tokenizer.apply_chat_template(messages, tokenize=False, tools=chats[0].tools))
        except Exception:  # one by one, to name the row
            return [self.text(chat, where) for chat, where in zip(chats, wheres, strict=True)]

    def probe(self, chats: Iterable[Conversation]) -> str | None:
        """The start of one of ``chats`` up to its first answer, with ``_PROBE`` as the answer and ``?`` as the other
        messages; None if the template rejects that."""
        if self._probed is None:
            for _, chat in zip(range(_ROWS_PROBED), chats, strict=False):
                roles = [m["role"] for m in chat.messages]
                if "assistant" in roles:
                    before = chat.cut(roles.index("assistant"))
                    asked = [{"role": m["role"], "content": "?"} for m in before.messages]
                    text = self._plain_text([*asked, {"role": "assistant", "content": _PROBE}])
                    if text is None:
                        continue
                    self._probed = text if _PROBE in text else None
                    break
        return self._probed

    def _plain_text(self, messages: Sequence[Message], **options: Any) -> str | None:
        """The text of messages with text as content; None if the template rejects them."""
        try:
            return self.text(_plain(messages), "", **options)
        except DataError:
            return None

    def turn_end(self, chats: Iterable[Conversation]) -> str | None:
        """What the template writes after an answer; None if unknown."""
        probed = self.probe(chats)
        return None if probed is None else probed[probed.rindex(_PROBE) + len(_PROBE) :]

    def end_id(self) -> int | None:
        """The special or added token with which the template ends the turn of an answer; None if it writes none."""
        t = self._tokenizer
        known = ({*t.all_special_ids, *t.added_tokens_decoder}) - {t.bos_token_id, t.unk_token_id, t.pad_token_id}
        for roles in (["user"], ["system", "user"]):
            asked = [{"role": role, "content": "?"} for role in roles]
            text = self._plain_text([*asked, {"role": "assistant", "content": _PROBE}])
            if text is None:
                continue
            ids = t(text.rpartition(_PROBE)[2], add_special_tokens=False)["input_ids"] if _PROBE in text else []
            return next((i for i in ids if i in known | {t.eos_token_id}), None)
        return None

    def _outlined(self, chat: Conversation, text: str) -> Rendered | None:
        """The parts of ``text`` by the outline; None if the outline with the words of ``chat``, as they are or stripped,
        does not reproduce ``text``."""
        contents = [m["content"] for m in chat.messages if len(m) == 2 and isinstance(m["content"], str)]
        if len(contents) < len(chat.messages) or chat.tools:
            return None
        roles = tuple(str(m["role"]) for m in chat.messages)
        if roles not in self._outlines:
            self._outlines[roles] = self._outline(roles)
        outline = self._outlines[roles]
        if outline is None:
            return None
        return self._laid_out(text, outline, contents, chat.trained) or self._laid_out(
            text, outline, [c.strip() for c in contents], chat.trained
        )

    def _outline(self, roles: tuple[str, ...]) -> list[_Turn] | None:
        """What the template writes around the words of each message; None if that depends on the messages after it."""
        messages = [{"role": role, "content": f"{_PROBE} {i};"} for i, role in enumerate(roles)]
        chat, turns, at = _plain(messages), [], 0
        try:
            text = self.text(chat, "")
            for i, message in enumerate(messages):
                start = text.index(message["content"], at)
                end = start + len(message["content"])
                if message["role"] == "assistant":
                    before = self.text(chat.cut(i), "", add_generation_prompt=True)
                    through = self.text(chat.cut(i + 1), "")
                    if not (text.startswith(before) and text.startswith(through) and at <= len(before) <= start):
                        return None
                    turns.append(
                        _Turn(
                            message["role"], text[at : len(before)], text[len(before) : start], text[end : len(through)]
                        )
                    )
                    at = len(through)
                else:
                    ending = text[end:] if i == len(messages) - 1 else ""
                    turns.append(_Turn(message["role"], text[at:start], "", ending))
                    at = end
        except (DataError, ValueError):  # rejected, or rewritten
            return None
        return turns

    def _searched(self, chat: Conversation, text: str, where: str) -> Rendered:
        """The parts, located by search. An answer is what the template adds after the generation prompt of its turn."""
        parts: list[Part] = []
        notes: list[str] = []
        cursor = 0
        last_question = max((i for i, m in enumerate(chat.messages) if m["role"] == "user"), default=-1)
        for i, message in enumerate(chat.messages):
            if message["role"] != "assistant":
                part = self._other_message(chat.messages, i, text, cursor)
            elif chat.trained[i]:
                part = self._answer(chat, i, text, cursor, where)
                written = text[part.start : part.end]
                if not has_calls(message, written):
                    part = replace(part, flaw=part.flaw or "calls")
                if not has_reasoning(message, written):
                    # Templates of thinking models leave out the thoughts before the last question.
                    if self.reading.reasoning is None or i > last_question:
                        part = replace(part, flaw=part.flaw or "reasoning")
                    else:
                        notes.append("dropped_reasoning")
            else:
                part = self._masked_answer(chat, i, text, cursor, where)
            if part.end > part.start or part.flaw:
                parts.append(part)
            cursor = part.end
        return Rendered(text, parts, notes=tuple(dict.fromkeys(notes)))

    def _masked_answer(self, chat: Conversation, i: int, text: str, cursor: int, where: str) -> Part:
        """An answer that is not trained; only its words if its turn cannot be separated."""
        try:
            part = self._answer(chat, i, text, cursor, where)
        except DataError:
            part = self._other_message(chat.messages, i, text, cursor)
        return replace(part, trained=False, masked=True, flaw="")

    def _other_message(self, chat: Sequence[Message], i: int, text: str, cursor: int) -> Part:
        """The words of ``chat[i]``, which is not an answer, after ``cursor``; an empty part if they are missing."""
        role, (content, *more) = str(chat[i]["role"]), texts(chat[i].get("content"))
        before = str(chat[i - 1]["role"]) if i else None
        opening = self._opening(role, before)  # without it "user" would be found in a header
        stripped = content.strip()
        # As they are, stripped, and as JSON: the form that the template did not write may still start a later message.
        forms = (content, stripped)
        # The end of an answer's turn belongs to its part, and to the opening after it.
        start = max(0, cursor - len(opening)) if before == "assistant" else cursor
        matches = [(at, words) for words in forms if (at := text.find(opening + words, start)) >= 0]
        at, words = min(matches, key=lambda match: match[0], default=(-1, stripped))
        at = at + len(opening) if at >= 0 else text.find(words, cursor)
        if at < 0:
            words = json.dumps(content, ensure_ascii=False)[1:-1]
            at = text.find(words, cursor)
        end = at + len(words)
        for other in more:
            found = text.find(other.strip(), end)
            at, end = (at, found + len(other.strip())) if found >= 0 else (-1, end)
        return Part(at, end, role) if at >= 0 else Part(cursor, cursor, role, flaw="words")

    def _opening(self, role: str, before: str | None) -> str:
        """The end of what the chat template writes before a message of this role, after the words of the previous message
        if there is one; empty if the template rejects that order."""
        if (role, before) not in self._openings:
            opening = ""
            for roles in [[]] if before is None else [[before], ["user", before], ["user", "assistant", before]]:
                text = self._plain_text([{"role": r, "content": _PROBE} for r in (*roles, role)])
                if text is not None and _PROBE in text:
                    opening = text.split(_PROBE)[-2][-_OPENING:]
                    break
            self._openings[role, before] = opening
        return self._openings[role, before]

    def _answer(self, chat: Conversation, i: int, text: str, cursor: int, where: str) -> Part:
        """The answer ``chat.messages[i]`` and the end of its turn in ``text``."""
        message = chat.messages[i]
        before = self._prompt(chat.cut(i), where)
        through = text if i == len(chat.messages) - 1 else self.text(chat.cut(i + 1), where)
        required = required_words(message)
        if text.startswith(before) and text.startswith(through) and len(through) > len(before):
            part = text[len(before) : len(through)]
            if not all(words in part for words in required):
                return Part(len(before), len(through), "assistant", trained=True, flaw="words")
            lead = part[: part.find(required[0])] if required[0] else part.removesuffix(self.turn_end([chat]) or part)
            if self._flaw(lead):
                # Thoughts and calls may contain special tokens too. A header is what precedes an answer without them.
                plain = self.text(chat.cut(i).with_turn("assistant", _PROBE), where)
                lead = plain.removeprefix(before).partition(_PROBE)[0]
            return Part(len(before), len(through), "assistant", trained=True, flaw=self._flaw(lead))
        # Templates of thinking models drop the thoughts of earlier turns, so no shorter conversation is a prefix.
        # The text around an answer stays the same.
        opening = before.removeprefix(self.text(chat.cut(i), where)) if i else ""
        ending = self.turn_end([chat]) or ""
        start = text.find(opening, cursor) + len(opening) if opening in text[cursor:] else -1
        at = text.find(required[0], max(0, start))
        # The words may contain the end of a turn. If one precedes them, they belong to a later turn.
        end = text.find(ending, at + len(required[0])) + len(ending) if ending.strip() else -1
        within = at >= 0 and ending not in text[start:at] and all(words in text[start:end] for words in required)
        if not opening or start < 0 or end <= start or not within:
            raise DataError(
                f"{where}, {chat.places[i]}: cannot locate the assistant's part: the chat template "
                f"{_why(text, required, chat, i)}; set model.chat_template to a template for training",
                key="model.chat_template",
            )
        return Part(start, end, "assistant", trained=True)

    def _prompt(self, chat: Conversation, where: str) -> str:
        """The conversation up to where the model answers."""
        try:
            return self.text(chat, where, add_generation_prompt=True)
        except DataError:
            if chat.messages:
                raise
            raise DataError(
                f"{where}: the first message is an answer, but the chat template needs a message before it to write the "
                "header; begin with a user message",
                key="data.columns",
            ) from None

    def _flaw(self, lead: str) -> Flaw:
        """``header`` if ``lead``, the start of every answer, is a header: it has special tokens, and the template writes no
        generation prompt. After a generation prompt the model writes them itself, such as the channel of an answer."""
        return "header" if any(token in lead for token in self._special) and not self._prompts() else ""

    def _prompts(self) -> bool:
        """Whether the template writes a generation prompt."""
        if self._has_prompt is None:
            asked = [{"role": "user", "content": "?"}]
            prompt, text = self._plain_text(asked, add_generation_prompt=True), self._plain_text(asked)
            self._has_prompt = prompt is not None and text is not None and prompt != text
        return self._has_prompt

    def _laid_out(
        self, text: str, outline: list[_Turn], contents: Sequence[str], trained: Sequence[bool]
    ) -> Rendered | None:
        """``text`` in parts; None unless it is ``contents`` in this outline."""
        pieces = [
            piece for t, words in zip(outline, contents, strict=True) for piece in (t.opening, t.lead, words, t.ending)
        ]
        if "".join(pieces) != text:
            return None
        parts: list[Part] = []
        at = 0
        for turn, words, learnt in zip(outline, contents, trained, strict=True):
            answer = turn.role == "assistant"
            start = at + len(turn.opening)
            at = start + len(turn.lead) + len(words) + len(turn.ending)
            end = at if answer else start + len(words)
            if end > start:
                flaw = self._flaw(turn.lead) if turn.lead and learnt else ""
                parts.append(Part(start, end, turn.role, trained=learnt, flaw=flaw, masked=answer and not learnt))
        return Rendered(text, parts)


def _plain(messages: Sequence[Message]) -> Conversation:
    """A conversation to try a template with."""
    trained = [m["role"] == "assistant" for m in messages]
    return Conversation(list(messages), trained, [str(m["role"]) for m in messages])


def _why(text: str, required: list[str], chat: Conversation, i: int) -> str:
    if not all(words in text for words in required):
        return "does not write its content"
    if i == len(chat.messages) - 1:
        return "writes another header before an answer than for a generation prompt"
    return "writes it differently when more turns follow"
