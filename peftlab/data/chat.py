"""Rows to text for language models, and which characters of it are trained."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peftlab.errors import DataError, RecipeError

Style = Literal["text", "completion", "chat"]


# Stands for an answer where only what a template writes around it is of interest.
_PROBE = "peftlab probe"
# Characters of a header that tell it from the words of a message.
_OPENING = 16


@dataclass(frozen=True, slots=True)
class Part:
    """Characters ``start:end`` of a row's text that one role wrote; an answer's include the end of its turn.

    Attributes:
        trained: whether the model learns to write it.
        said: whether the words of its message are in it.
    """

    start: int
    end: int
    role: str
    trained: bool = False
    said: bool = True


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text of one row and its parts in order; what no part holds the template wrote."""

    text: str
    parts: list[Part]


class Formatter:
    """Turns a row into text: plain text, prompt + completion, or chat messages through the tokenizer's template.

    Args:
        columns: part -> column name, parts ``text``, ``prompt``, ``completion``, ``messages``.
        template: the non-empty fields of the recipe's ``data.template``.
        available: the columns the data has; without ``columns`` and ``template`` the style follows from them.
    Raises: DataError (columns), RecipeError (template), DataError (no chat template).
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        columns: Mapping[str, str],
        template: Mapping[str, str] | None,
        available: Sequence[str],
    ) -> None:
        self._tokenizer = tokenizer
        self._columns = dict(columns)
        self._template = dict(template or {})
        self._available = list(available)
        self._ending: str | None = None
        self._openings: dict[str, str] = {}
        self._outlines: dict[tuple[str, ...], list[_Turn] | None] = {}
        self.style: Style = self._find_style()
        for text in self._template.values():
            for name in _fields(text):
                if name not in self._available:
                    raise DataError(
                        f"the template uses {{{name}}}, but the columns are {', '.join(self._available)}",
                        key="data.template",
                    )
        if self.style == "chat" and not tokenizer.chat_template:
            raise DataError(
                "these rows are chat messages, but the tokenizer has no chat template; give one with "
                "model.chat_template=FILE.jinja, or use a prompt / completion template",
                key="data.template" if self._template else "data.columns",
            )

    def _find_style(self) -> Style:
        if self._template:
            return "completion" if "prompt" in self._template else "chat"
        have = self._columns or {
            name: name for name in ("messages", "prompt", "completion", "text") if name in self._available
        }
        self._columns = have
        if "messages" in have:
            return "chat"
        if "prompt" in have and "completion" in have:
            return "completion"
        if "text" in have:
            return "text"
        raise DataError(
            "expected a column text, or prompt and completion, or messages; found "
            f"{', '.join(repr(c) for c in self._available)}. Map them with data.columns or build the text with data.template",
            key="data.columns",
        )

    @property
    def key(self) -> str:
        """The recipe key that the texts come from."""
        return "data.template" if self._template else "data.columns"

    @property
    def prompt_column(self) -> str | None:
        """The one column that the prompt is made from, when there is exactly one."""
        if self._template:
            asked = self._template.get("prompt") or self._template.get("user") or ""
            names = sorted({n for part in (asked, self._template.get("system") or "") for n in _fields(part)})
            return names[0] if len(names) == 1 else None
        return self._columns.get("prompt")

    def render(self, row: Mapping[str, Any], where: str) -> Rendered:
        """Text and parts of a training row. Raises: DataError naming ``where``."""
        return self.render_all([row], [where])[0]

    def render_all(self, rows: Sequence[Mapping[str, Any]], wheres: Sequence[str]) -> list[Rendered]:
        """As ``render``, for many rows at once: the template engine then starts once, not once a row."""
        if self.style == "text":
            texts = [self._text(row, "text", where) for row, where in zip(rows, wheres, strict=True)]
            return [Rendered(text, [Part(0, len(text), "text", trained=True)]) for text in texts]
        if self.style == "completion":
            return [
                _completed(self._text(row, "prompt", where), self._text(row, "completion", where))
                for row, where in zip(rows, wheres, strict=True)
            ]
        return self._render_chats([self._messages(row, where) for row, where in zip(rows, wheres, strict=True)], wheres)

    def render_answer(self, row: Mapping[str, Any], where: str, answer: str) -> Rendered:
        """The prompt of ``row`` answered with ``answer``, whatever its own completion is."""
        if self.style == "chat":
            asked = self._prompt_messages(row, where)
            return self._render_chats([[*asked, {"role": "assistant", "content": answer}]], [where])[0]
        return _completed(self.render_prompt(row, where), answer)

    def render_prompt(self, row: Mapping[str, Any], where: str) -> str:
        """Text up to where the model answers. A ``messages`` row is cut before its last assistant turn."""
        if self.style != "chat":
            return self._text(row, "text" if self.style == "text" else "prompt", where)
        return self._apply(self._prompt_messages(row, where), where, add_generation_prompt=True)

    def _prompt_messages(self, row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        if self._template:
            return self._turns(row, where, ("system", "user"))
        messages = self._messages(row, where)
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages

    def prompt_row(self, prompt: str) -> dict[str, Any]:
        """The row that a plain text typed by a person stands for. Raises: RecipeError when that is not determined."""
        if self.style == "text":
            return {self._columns["text"]: prompt}
        if self.style == "chat" and not self._template:
            return {self._columns["messages"]: [{"role": "user", "content": prompt}]}
        if (column := self.prompt_column) is None:
            raise RecipeError(
                "the prompt is made from several columns, so a single text does not say enough; give a file with those columns",
                key="data.template",
            )
        return {column: prompt}

    def _text(self, row: Mapping[str, Any], part: str, where: str) -> str:
        if part in self._template:
            return _fill(self._template[part], row, where)
        value = row[self._columns[part]]
        if not isinstance(value, str):
            raise DataError(
                f"{where}: expected text in column {self._columns[part]!r}, found {value!r}", key=f"data.columns.{part}"
            )
        return value

    def _turns(self, row: Mapping[str, Any], where: str, roles: Sequence[str]) -> list[dict[str, str]]:
        return [{"role": r, "content": _fill(self._template[r], row, where)} for r in roles if r in self._template]

    def _messages(self, row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        if self._template:
            return self._turns(row, where, ("system", "user", "assistant"))
        messages = row[self._columns["messages"]]
        if hasattr(messages, "tolist"):
            messages = messages.tolist()
        ok = (
            isinstance(messages, list)
            and messages
            and all(isinstance(m, dict) and "role" in m and "content" in m for m in messages)
        )
        if not ok:
            raise DataError(
                f"{where}: expected a list of messages with role and content, found {str(messages)[:80]!r}",
                key="data.columns.messages",
            )
        return list(messages)

    def _apply(self, messages: list[dict[str, Any]], where: str, **options: Any) -> str:
        try:
            (text,) = self._tokenizer.apply_chat_template([messages], tokenize=False, **options)
        except Exception as error:  # Jinja templates raise what they like, raise_exception() included
            raise DataError(
                f"{where}: the chat template refused these messages: {error}", key="model.chat_template"
            ) from error
        return str(text)

    def _apply_all(self, chats: list[list[dict[str, Any]]], wheres: Sequence[str], **options: Any) -> list[str]:
        if not chats:
            return []
        try:
            return list(self._tokenizer.apply_chat_template(chats, tokenize=False, **options))
        except Exception:  # one by one, to name the row
            return [self._apply(messages, where, **options) for messages, where in zip(chats, wheres, strict=True)]

    def _render_chats(self, chats: list[list[dict[str, Any]]], wheres: Sequence[str]) -> list[Rendered]:
        """Text and parts of conversations, the parts by the outline of their roles where that gives the same text."""
        texts = self._apply_all(chats, wheres)
        rendered = [self._outlined(chat, text) for chat, text in zip(chats, texts, strict=True)]
        for row, found in enumerate(rendered):
            if found is None:
                rendered[row] = self._searched(chats[row], texts[row], wheres[row])
        return [row for row in rendered if row is not None]

    def _outlined(self, chat: list[dict[str, Any]], text: str) -> Rendered | None:
        """None where ``text`` is not what the template writes around the words of ``chat``, as they are or stripped."""
        roles = tuple(str(m["role"]) for m in chat)
        if roles not in self._outlines:
            self._outlines[roles] = self._outline(roles)
        outline = self._outlines[roles]
        contents = [m["content"] for m in chat]
        if outline is None or any(len(m) > 2 for m in chat) or not all(isinstance(c, str) for c in contents):
            return None
        return _laid_out(text, outline, contents) or _laid_out(text, outline, [c.strip() for c in contents])

    def _outline(self, roles: tuple[str, ...]) -> list[_Turn] | None:
        """What the template writes around the words of each message; None where that changes with the messages after it."""
        chat = [{"role": role, "content": f"{_PROBE} {i};"} for i, role in enumerate(roles)]
        turns, at = [], 0
        try:
            text = self._apply(chat, "")
            for i, message in enumerate(chat):
                start = text.index(message["content"], at)
                end = start + len(message["content"])
                if message["role"] == "assistant":
                    before = self._apply(chat[:i], "", add_generation_prompt=True)
                    through = self._apply(chat[: i + 1], "")
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

    def _searched(self, chat: list[dict[str, Any]], text: str, where: str) -> Rendered:
        """An answer is what the template adds to the conversation up to the generation prompt of its turn."""
        parts: list[Part] = []
        cursor = 0
        for i, message in enumerate(chat):
            found = self._answer(chat, i, text, cursor, where) if message["role"] == "assistant" else None
            part = found or self._asked(message, text, cursor)
            if part.end > part.start:
                parts.append(part)
            cursor = part.end
        return Rendered(text, parts)

    def _asked(self, message: Mapping[str, Any], text: str, cursor: int) -> Part:
        """Where the words of a message that is no answer stand after ``cursor``: an empty part if they do not."""
        role, words = str(message["role"]), _words(message["content"])
        opening = self._opening(role)
        at = text.find(opening + words, cursor)  # without the opening "user" would be found in a header
        at = at + len(opening) if at >= 0 else text.find(words, cursor)
        return Part(at, at + len(words), role) if at >= 0 else Part(cursor, cursor, role)

    def _opening(self, role: str) -> str:
        """The end of what the chat template writes before a message of this role; empty where it refuses one alone."""
        if role not in self._openings:
            try:
                text = self._apply([{"role": role, "content": _PROBE}], "")
            except DataError:
                text = ""
            self._openings[role] = text.partition(_PROBE)[0][-_OPENING:] if _PROBE in text else ""
        return self._openings[role]

    def _answer(self, messages: list[dict[str, Any]], i: int, text: str, cursor: int, where: str) -> Part:
        """Where the answer ``messages[i]`` and the end of its turn stand in ``text``."""
        before = self._apply(messages[:i], where, add_generation_prompt=True)
        through = text if i == len(messages) - 1 else self._apply(messages[: i + 1], where)
        said = _words(messages[i]["content"]).split("</think>")[-1].strip()
        if text.startswith(before) and text.startswith(through) and len(through) > len(before):
            start, end = len(before), len(through)
            return Part(start, end, "assistant", trained=True, said=said in text[start:end])
        # Templates of thinking models drop the thoughts of earlier turns, so that no shorter conversation is a prefix.
        # What stands around an answer stays the same.
        opening = before.removeprefix(self._apply(messages[:i], where))
        ending = self.turn_end(where)
        start = text.find(opening, cursor) + len(opening) if opening in text[cursor:] else -1
        end = text.find(ending, max(0, start)) + len(ending) if ending.strip() else -1
        if not opening or start < 0 or end <= start or said not in text[start:end]:
            raise DataError(
                f"{where}: the chat template writes turn {i + 1} differently when more turns follow, so the "
                "assistant's part cannot be told apart; give a template for training with model.chat_template",
                key="model.chat_template",
            )
        return Part(start, end, "assistant", trained=True)

    def turn_end(self, where: str) -> str:
        """What the chat template writes after an answer; empty where it rewrites answers."""
        if self._ending is None:
            text = self.probe_text(where)
            self._ending = text[text.rindex(_PROBE) + len(_PROBE) :] if _PROBE in text else ""
        return self._ending

    def probe_text(self, where: str) -> str:
        """A question and an answer as the chat template writes them."""
        return self._apply([{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}], where)


@dataclass(frozen=True, slots=True)
class _Turn:
    """What a template writes before a message, between the start of its part and its words, and after them."""

    role: str
    opening: str
    lead: str
    ending: str


def _laid_out(text: str, outline: list[_Turn], contents: Sequence[str]) -> Rendered | None:
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
            parts.append(Part(start, end, turn.role, trained=answer))
    return Rendered(text, parts)


def _words(content: Any) -> str:
    return content.strip() if isinstance(content, str) else ""


def _completed(prompt: str, completion: str) -> Rendered:
    end = len(prompt) + len(completion)
    return Rendered(
        prompt + completion, [Part(0, len(prompt), "prompt"), Part(len(prompt), end, "completion", trained=True)]
    )


def _fields(template: str) -> list[str]:
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise RecipeError(
            f"not a valid template: {error}; write literal braces as {{{{ and }}}}", key="data.template"
        ) from None


def _fill(template: str, row: Mapping[str, Any], where: str) -> str:
    names = _fields(template)
    for name in names:
        if row.get(name) is None:
            raise DataError(f"{where}: column {name!r} is empty in this row", key="data.template")
    return template.format(**{name: row[name] for name in names})
