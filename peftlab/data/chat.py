"""Renders rows as text for language models, and marks which characters are trained."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from peftlab.data.chat_template import ChatTemplate, Part, Rendered
from peftlab.data.rows import Rows
from peftlab.errors import DataError, RecipeError

Style = Literal["text", "completion", "chat"]


class Formatter:
    """Turns a row into text: plain text, prompt + completion, or chat messages through the tokenizer's template.

    Args:
        columns: part -> column name; the parts are ``text``, ``prompt``, ``completion`` and ``messages``.
        template: the non-empty fields of the recipe's ``data.template``.
        available: the columns of the data. They determine the style if ``columns`` and ``template`` are empty.
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
        self.chat_template = ChatTemplate(tokenizer)
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
                "these rows are chat messages, but the tokenizer has no chat template; set model.chat_template=FILE.jinja, "
                "or use a prompt / completion template",
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
        """The column of the prompt, if it is made from exactly one."""
        if self._template:
            asked = self._template.get("prompt") or self._template.get("user") or ""
            names = sorted({n for part in (asked, self._template.get("system") or "") for n in _fields(part)})
            return names[0] if len(names) == 1 else None
        return self._columns.get("prompt")

    def render(self, row: Mapping[str, Any], where: str) -> Rendered:
        """Text and parts of a training row. Raises: DataError naming ``where``."""
        return self.render_all([row], [where])[0]

    def render_all(self, rows: Sequence[Mapping[str, Any]], wheres: Sequence[str]) -> list[Rendered]:
        """Like ``render`` for many rows at once, so that the template engine starts once instead of once per row."""
        if self.style == "text":
            texts = [self._text(row, "text", where) for row, where in zip(rows, wheres, strict=True)]
            return [Rendered(text, [Part(0, len(text), "text", trained=True)]) for text in texts]
        if self.style == "completion":
            return [
                _completed(self._text(row, "prompt", where), self._text(row, "completion", where))
                for row, where in zip(rows, wheres, strict=True)
            ]
        return self.chat_template.render(
            [self._messages(row, where) for row, where in zip(rows, wheres, strict=True)], wheres
        )

    def render_answer(self, row: Mapping[str, Any], where: str, answer: str) -> Rendered:
        """The prompt of ``row`` with ``answer`` in place of its completion."""
        if self.style == "chat":
            prompt = self._prompt_messages(row, where)
            return self.chat_template.render([[*prompt, {"role": "assistant", "content": answer}]], [where])[0]
        return _completed(self.render_prompt(row, where), answer)

    def render_prompt(self, row: Mapping[str, Any], where: str) -> str:
        """The text up to where the model answers. A ``messages`` row is cut before its last assistant turn."""
        if self.style != "chat":
            return self._text(row, "text" if self.style == "text" else "prompt", where)
        return self.chat_template.text(self._prompt_messages(row, where), where, add_generation_prompt=True)

    def _prompt_messages(self, row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        if self._template:
            return self._turns(row, where, ("system", "user"))
        messages = self._messages(row, where)
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages

    def prompt_row(self, prompt: str) -> dict[str, Any]:
        """A row with ``prompt`` as its prompt. Raises: RecipeError if the prompt needs several columns."""
        if self.style == "text":
            return {self._columns["text"]: prompt}
        if self.style == "chat" and not self._template:
            return {self._columns["messages"]: [{"role": "user", "content": prompt}]}
        if (column := self.prompt_column) is None:
            raise RecipeError(
                "the prompt is made from several columns, so a single text is not enough; give a file with those columns",
                key="data.template",
            )
        return {column: prompt}

    def _text(self, row: Mapping[str, Any], part: str, where: str) -> str:
        if part in self._template:
            return _fill(self._template[part], row, where)
        value = _value(row, self._columns[part], where, key=f"data.columns.{part}")
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
        messages = _value(row, self._columns["messages"], where, key="data.columns.messages")
        if hasattr(messages, "tolist"):
            messages = messages.tolist()
        if isinstance(messages, list) and messages and all(map(_is_message, messages)):
            return list(messages)
        odd = next((m for m in messages if not _is_message(m)), messages) if isinstance(messages, list) else messages
        hint = ""
        if isinstance(odd, Mapping) and {"from", "value"} <= odd.keys():
            hint = (
                "; this is the ShareGPT format: rename from to role (human: user, gpt: assistant) and value to content"
            )
        raise DataError(
            f"{where}: expected a list of messages with role and content, found {str(odd)[:80]!r}{hint}",
            key="data.columns.messages",
        )

    def chats(self, rows: Rows) -> Iterator[list[dict[str, Any]]]:
        """The conversations of ``rows``, one by one."""
        return (self._messages(rows.row(i), rows.where(i)) for i in range(len(rows)))


def _is_message(message: Any) -> bool:
    """Whether it has a role and content; the content may be absent or null in tool calls."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    return message.get("content") is not None or bool(message.get("tool_calls"))


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


def _value(row: Mapping[str, Any], column: str, where: str, *, key: str) -> Any:
    """The value of a row. Raises: DataError if its file lacks the column, unlike the file that columns were chosen from."""
    if column not in row:
        columns = ", ".join(map(repr, row))
        raise DataError(f"{where}: no column {column!r}; found the columns {columns}", key=key)
    return row[column]


def _fill(template: str, row: Mapping[str, Any], where: str) -> str:
    names = _fields(template)
    for name in names:
        if _value(row, name, where, key="data.template") is None:
            raise DataError(f"{where}: column {name!r} is empty in this row", key="data.template")
    try:
        return template.format(**{name: row[name] for name in names})
    except (ValueError, TypeError) as error:  # a format specification that does not fit the value
        raise RecipeError(f"{where}: the template cannot be filled: {error}", key="data.template") from None
