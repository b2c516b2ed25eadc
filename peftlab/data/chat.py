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


@dataclass(frozen=True)
class Rendered:
    """Text of one row and the ``[start, end)`` character spans that are trained."""

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
            return Rendered(prompt + completion, [(len(prompt), len(prompt) + len(completion))])
        return self._render_chat(self._messages(row, where), where)

    def render_answer(self, row: Mapping[str, Any], where: str, answer: str) -> Rendered:
        """The prompt of ``row`` answered with ``answer``, whatever its own completion is."""
        if self.style == "chat":
            asked = self._prompt_messages(row, where)
            return self._render_chat([*asked, {"role": "assistant", "content": answer}], where)
        prompt = self.render_prompt(row, where)
        return Rendered(prompt + answer, [(len(prompt), len(prompt) + len(answer))])

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
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._apply(messages[:i], where, add_generation_prompt=True)
            through = self._apply(messages[: i + 1], where)
            if not (text.startswith(before) and text.startswith(through) and len(through) > len(before)):
                raise DataError(
                    f"{where}: the chat template writes turn {i + 1} differently when more turns follow, so the "
                    "assistant's part cannot be told apart; give a template for training with model.chat_template",
                    key="model.chat_template",
                )
            spans.append((len(before), len(through)))
        return Rendered(text, spans)


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
