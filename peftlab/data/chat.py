"""Rows to text for language models, and which characters of it are trained."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from peftlab.errors import DataError, RecipeError

Style = Literal["text", "completion", "chat"]


# Stands for an answer where only what a template writes around it is of interest.
_PROBE = "peftlab probe"


@dataclass(frozen=True)
class Rendered:
    """Text of one row and the ``[start, end)`` character spans that are trained; an answer's includes the end of its turn."""

    text: str
    spans: list[tuple[int, int]]


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
    def prompt_column(self) -> str | None:
        """The one column that the prompt is made from, when there is exactly one."""
        if self._template:
            asked = self._template.get("prompt") or self._template.get("user") or ""
            names = sorted({n for part in (asked, self._template.get("system") or "") for n in _fields(part)})
            return names[0] if len(names) == 1 else None
        return self._columns.get("prompt")

    def render(self, row: Mapping[str, Any], where: str) -> Rendered:
        """Text and trained spans of a training row. Raises: DataError naming ``where``."""
        if self.style == "text":
            text = self._text(row, "text", where)
            return Rendered(text, [(0, len(text))])
        if self.style == "completion":
            prompt = self._text(row, "prompt", where)
            completion = self._text(row, "completion", where)
            return _completed(prompt, completion)
        return self._render_chat(self._messages(row, where), where)

    def render_answer(self, row: Mapping[str, Any], where: str, answer: str) -> Rendered:
        """The prompt of ``row`` answered with ``answer``, whatever its own completion is."""
        if self.style == "chat":
            asked = self._prompt_messages(row, where)
            return self._render_chat([*asked, {"role": "assistant", "content": answer}], where)
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
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # Jinja templates raise what they like, raise_exception() included
            raise DataError(
                f"{where}: the chat template refused these messages: {error}", key="model.chat_template"
            ) from error

    def _render_chat(self, messages: list[dict[str, Any]], where: str) -> Rendered:
        """The assistant's spans: what the template adds to the text up to the generation prompt of each turn."""
        text = self._apply(messages, where)
        spans: list[tuple[int, int]] = []
        cursor = 0
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                spans.append(self._answer_span(messages, i, text, cursor, where))
                cursor = spans[-1][1]
            else:
                cursor = _content_end(message["content"], text, cursor)
        return Rendered(text, spans)

    def _answer_span(
        self, messages: list[dict[str, Any]], i: int, text: str, cursor: int, where: str
    ) -> tuple[int, int]:
        """Where the answer ``messages[i]`` and the end of its turn stand in ``text``."""
        before = self._apply(messages[:i], where, add_generation_prompt=True)
        through = text if i == len(messages) - 1 else self._apply(messages[: i + 1], where)
        if text.startswith(before) and text.startswith(through) and len(through) > len(before):
            return len(before), len(through)
        # Templates of thinking models drop the thoughts of earlier turns, so that no shorter conversation is a prefix.
        # What stands around an answer stays the same.
        opening = before.removeprefix(self._apply(messages[:i], where))
        ending = self._turn_end(where)
        start = text.find(opening, cursor) + len(opening) if opening in text[cursor:] else -1
        end = text.find(ending, max(0, start)) + len(ending) if ending.strip() else -1
        said = _words(messages[i]["content"]).split("</think>")[-1].strip()
        if not opening or start < 0 or end <= start or said not in text[start:end]:
            raise DataError(
                f"{where}: the chat template writes turn {i + 1} differently when more turns follow, so the "
                "assistant's part cannot be told apart; give a template for training with model.chat_template",
                key="model.chat_template",
            )
        return start, end

    def _turn_end(self, where: str) -> str:
        """What the template writes after an answer."""
        if self._ending is None:
            probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
            text = self._apply(probe, where)
            self._ending = text[text.rindex(_PROBE) + len(_PROBE) :] if _PROBE in text else ""
        return self._ending


def _words(content: Any) -> str:
    return content.strip() if isinstance(content, str) else ""


def _content_end(content: Any, text: str, cursor: int) -> int:
    """Where a message's own words end (templates strip them); ``cursor`` where they are empty or rewritten."""
    words = _words(content)
    at = text.find(words, cursor)
    return at + len(words) if at >= 0 else cursor


def _completed(prompt: str, completion: str) -> Rendered:
    return Rendered(prompt + completion, [(len(prompt), len(prompt) + len(completion))])


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


def trained_tokens(
    rendered: Rendered, offsets: Sequence[tuple[int, int]], ids: npt.NDArray[np.int32], stop_ids: set[int]
) -> npt.NDArray[np.bool_]:
    """[T] bool: tokens whose characters lie in a span; white space after the stop token that ends a span does not.

    A template often writes a newline after the end-of-turn token; the model never has to produce that, so it is not
    trained. A token that straddles the start of a span belongs to it.
    """
    starts = np.array([o[0] for o in offsets], dtype=np.int64)
    ends = np.array([o[1] for o in offsets], dtype=np.int64)
    trained = np.zeros(len(ids), dtype=bool)
    stops = np.isin(ids, list(stop_ids))
    for start, end in rendered.spans:
        inside = (ends > start) & (starts < end) & (ends > starts)
        at = np.flatnonzero(inside & stops)
        if len(at) and not rendered.text[ends[at[-1]] : end].strip():
            inside[at[-1] + 1 :] = False
        trained |= inside
    return trained
