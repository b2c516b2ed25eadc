"""A tokenizer's chat template: renders conversations as text and locates each message in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peftlab.errors import DataError, RecipeError

Message = dict[str, Any]
# Flaws of a part: it lacks the words of its message, or it includes the header of an answer.
Flaw = Literal["", "words", "header"]

# A placeholder answer, to see what a template writes around it.
_PROBE = "peftlab probe"
# Characters of a header that distinguish it from the words of a message.
_OPENING = 16
_ROWS_PROBED = 50


@dataclass(frozen=True, slots=True)
class Part:
    """Characters ``start:end`` of a row's text, written by one role; for an answer including the end of its turn.

    Attributes: trained: whether the model learns to write it.
    """

    start: int
    end: int
    role: str
    trained: bool = False
    flaw: Flaw = ""


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of one row and its parts in order; the template wrote everything else."""

    text: str
    parts: list[Part]


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

    def text(self, messages: list[Message], where: str, **options: Any) -> str:
        """One conversation as text. Raises: DataError if the template rejects it, RecipeError if the template is invalid."""
        from jinja2 import TemplateSyntaxError

        try:
            (text,) = self._tokenizer.apply_chat_template([messages], tokenize=False, **options)
        except TemplateSyntaxError as error:
            raise RecipeError(
                f"line {error.lineno} of the chat template: {error.message}", key="model.chat_template"
            ) from None
        except Exception as error:  # Jinja templates raise any exception, through raise_exception() too
            raise DataError(
                f"{where}: the chat template rejects these messages: {error}", key="model.chat_template"
            ) from error
        return str(text)

    def render(self, chats: list[list[Message]], wheres: Sequence[str]) -> list[Rendered]:
        """The text and parts of conversations. The outline of their roles gives the parts if it reproduces the text;
        otherwise they are searched for.

        Raises: DataError if an answer cannot be separated from the text around it.
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
        """The start of one of ``chats`` up to its first answer, with ``_PROBE`` as the answer and ``?`` as the other
        messages; None if the template rejects that."""
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
        """What the template writes after an answer; None if unknown."""
        probed = self.probe(chats)
        return None if probed is None else probed[probed.rindex(_PROBE) + len(_PROBE) :]

    def end_id(self) -> int | None:
        """The special or added token with which the template ends the turn of an answer; None if it writes none."""
        t = self._tokenizer
        known = ({*t.all_special_ids, *t.added_tokens_decoder}) - {t.bos_token_id, t.unk_token_id, t.pad_token_id}
        for roles in (["user"], ["system", "user"]):
            chat = [{"role": role, "content": "?"} for role in roles]
            try:
                text = self.text([*chat, {"role": "assistant", "content": _PROBE}], "")
            except DataError:
                continue
            ids = t(text.rpartition(_PROBE)[2], add_special_tokens=False)["input_ids"] if _PROBE in text else []
            return next((i for i in ids if i in known | {t.eos_token_id}), None)
        return None

    def _outlined(self, chat: list[Message], text: str) -> Rendered | None:
        """The parts of ``text`` by the outline; None if the outline with the words of ``chat``, as they are or stripped,
        does not reproduce ``text``."""
        roles = tuple(str(m["role"]) for m in chat)
        if roles not in self._outlines:
            self._outlines[roles] = self._outline(roles)
        outline = self._outlines[roles]
        contents = [c for m in chat if isinstance(c := m.get("content"), str)]
        if outline is None or any(len(m) > 2 for m in chat) or len(contents) < len(chat):
            return None
        return self._laid_out(text, outline, contents) or self._laid_out(text, outline, [c.strip() for c in contents])

    def _outline(self, roles: tuple[str, ...]) -> list[_Turn] | None:
        """What the template writes around the words of each message; None if that depends on the messages after it."""
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
        except (DataError, ValueError):  # rejected, or rewritten
            return None
        return turns

    def _searched(self, chat: list[Message], text: str, where: str) -> Rendered:
        """The parts, located by search. An answer is what the template adds after the generation prompt of its turn."""
        parts: list[Part] = []
        cursor = 0
        for i, message in enumerate(chat):
            answer = self._answer(chat, i, text, cursor, where) if message["role"] == "assistant" else None
            part = answer or self._other_message(chat, i, text, cursor)
            if part.end > part.start or part.flaw:
                parts.append(part)
            cursor = part.end
        return Rendered(text, parts)

    def _other_message(self, chat: list[Message], i: int, text: str, cursor: int) -> Part:
        """The words of ``chat[i]``, which is not an answer, after ``cursor``; an empty part if they are missing."""
        role, content = str(chat[i]["role"]), chat[i].get("content")
        before = str(chat[i - 1]["role"]) if i else None
        opening = self._opening(role, before)  # without it "user" would be found in a header
        stripped = _words(content)
        # As they are and stripped: the form that the template did not write may still start a later message.
        forms = (content, stripped) if isinstance(content, str) else (stripped,)
        # The end of an answer's turn belongs to its part, and to the opening after it.
        start = max(0, cursor - len(opening)) if before == "assistant" else cursor
        matches = [(at, words) for words in forms if (at := text.find(opening + words, start)) >= 0]
        at, words = min(matches, key=lambda match: match[0], default=(-1, stripped))
        at = at + len(opening) if at >= 0 else text.find(words, cursor)
        return Part(at, at + len(words), role) if at >= 0 else Part(cursor, cursor, role, flaw="words")

    def _opening(self, role: str, before: str | None) -> str:
        """The end of what the chat template writes before a message of this role, after the words of the previous message
        if there is one; empty if the template rejects that order."""
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
        """The answer ``messages[i]`` and the end of its turn in ``text``."""
        before = self._prompt(messages[:i], where)
        through = text if i == len(messages) - 1 else self.text(messages[: i + 1], where)
        required = _required_words(messages[i])
        if text.startswith(before) and text.startswith(through) and len(through) > len(before):
            part = text[len(before) : len(through)]
            if not all(words in part for words in required):
                return Part(len(before), len(through), "assistant", trained=True, flaw="words")
            lead = (
                part[: part.find(required[0])] if required[0] else part.removesuffix(self.turn_end([messages]) or part)
            )
            if self._flaw(lead):
                # Thoughts and calls may contain special tokens too. A header is what precedes an answer without them.
                plain = [*messages[:i], {"role": "assistant", "content": _PROBE}]
                lead = self.text(plain, where).removeprefix(before).partition(_PROBE)[0]
            return Part(len(before), len(through), "assistant", trained=True, flaw=self._flaw(lead))
        # Templates of thinking models drop the thoughts of earlier turns, so no shorter conversation is a prefix.
        # The text around an answer stays the same.
        opening = before.removeprefix(self.text(messages[:i], where)) if i else ""
        ending = self.turn_end([messages]) or ""
        start = text.find(opening, cursor) + len(opening) if opening in text[cursor:] else -1
        at = text.find(required[0], max(0, start))
        # The words may contain the end of a turn. If one precedes them, they belong to a later turn.
        end = text.find(ending, at + len(required[0])) + len(ending) if ending.strip() else -1
        within = at >= 0 and ending not in text[start:at] and all(words in text[start:end] for words in required)
        if not opening or start < 0 or end <= start or not within:
            raise DataError(
                f"{where}: cannot locate the assistant's part: the chat template {_why(text, required, messages, i)}; "
                "set model.chat_template to a template for training",
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
            chat = [{"role": "user", "content": "?"}]
            try:
                self._has_prompt = self.text(chat, "", add_generation_prompt=True) != self.text(chat, "")
            except DataError:
                self._has_prompt = False
        return self._has_prompt

    def _laid_out(self, text: str, outline: list[_Turn], contents: Sequence[str]) -> Rendered | None:
        """``text`` in parts; None unless it is ``contents`` in this outline."""
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


def _required_words(message: Message) -> list[str]:
    """What an answer must contain: its words without thoughts, and the names of the tools it calls."""
    calls = message.get("tool_calls") or []
    functions = [call.get("function", call) for call in calls if isinstance(call, Mapping)]
    names = [str(f["name"]) for f in functions if isinstance(f, Mapping) and f.get("name")]
    return [_words(message.get("content")).split("</think>")[-1].strip(), *names]


def _why(text: str, required: list[str], messages: list[Message], i: int) -> str:
    if not all(words in text for words in required):
        return f"does not write the content of turn {i + 1}"
    if i == len(messages) - 1:
        return "writes another header before an answer than for a generation prompt"
    return f"writes turn {i + 1} differently when more turns follow"
