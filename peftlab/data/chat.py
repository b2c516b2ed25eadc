"""Renders rows as text for language models, and marks which characters are trained."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from peftlab.data.chat_template import ChatTemplate, Part, Rendered
from peftlab.data.control_tokens import ControlTokens
from peftlab.data.layouts import Layout, Style, column_value, find_layout
from peftlab.data.messages import Conversation, read_messages
from peftlab.data.rows import Rows
from peftlab.data.values import NUMBERS, EmptyValueError, is_null, plain_text
from peftlab.errors import DataError, RecipeError

ControlRule = Literal["auto", "text", "keep"]
_TURNS = ("system", "user", "assistant")
_ANSWERS = ("assistant", "completion")
# Notes about control tokens in the values of a row.
_AS_TEXT, _KEPT = "control_as_text", "control_kept"


class Formatter:
    """Turns a row into text: plain text, prompt + completion, or chat messages through the tokenizer's template.

    Args:
        columns: part -> column name; the parts are those of ``Layout``.
        template: the non-empty fields of the recipe's ``data.template``.
        available: the columns of the data; with ``sample``, a value of each, they determine the layout if the recipe does
            not. Without data the rows do.
        style: that of the rows that the model was trained on, where no data is at hand.
        control_tokens: ``text``: control tokens in the values of rows are encoded as text; ``keep``: as the tokens;
            ``auto``: as text, except in the columns text, prompt and completion, which may hold a formatted conversation.
    Raises: DataError (columns), RecipeError (template), DataError (no chat template).
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        columns: Mapping[str, str],
        template: Mapping[str, str] | None,
        available: Sequence[str] = (),
        sample: Mapping[str, Any] | None = None,
        style: Style | None = None,
        control_tokens: ControlRule = "auto",
    ) -> None:
        self._tokenizer = tokenizer
        self._columns = dict(columns)
        self._template = dict(template or {})
        self._control_rule = control_tokens
        self.control = ControlTokens(tokenizer)
        self.chat_template = ChatTemplate(tokenizer)
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self.layout: Layout | None = None
        fields = [name for text in self._template.values() for name in _fields(text)]
        self._style: Style | None
        if self._template:
            self._style = "completion" if "prompt" in self._template else "chat"
            for name in fields if available else ():
                if name not in available:
                    raise DataError(
                        f"the template uses {{{name}}}, but the columns are {', '.join(available)}", key="data.template"
                    )
        elif available:
            self.layout = find_layout(self._columns, available, sample or {})
            self._style = self.layout.style
        else:
            self._style = style or _style_of(self._columns)
        if self._style == "chat":
            self._check_chat_template()

    def _check_chat_template(self) -> None:
        if not self._tokenizer.chat_template:
            raise DataError(
                "these rows are chat messages, but the tokenizer has no chat template; set model.chat_template=FILE.jinja, "
                "or use a prompt / completion template",
                key=self.key,
            )

    @property
    def style(self) -> Style:
        """How rows become text. Without rows to recognise it is chat if the tokenizer has a chat template."""
        if self._style is None:
            self._style = "chat" if self._tokenizer.chat_template else "text"
        return self._style

    @property
    def key(self) -> str:
        """The recipe key that the texts come from."""
        return "data.template" if self._template else "data.columns"

    @property
    def title(self) -> str:
        """What ``check`` says about how rows hold their text."""
        if self._template:
            return f"data.template ({' and '.join(self._template)})"
        return self.layout.title if self.layout else self.style

    @property
    def read_columns(self) -> set[str]:
        """The columns that become text."""
        if self._template:
            return {name for text in self._template.values() for name in _fields(text)}
        return set(self.layout.columns.values()) if self.layout else set(self._columns.values())

    @property
    def prompt_column(self) -> str | None:
        """The column of the prompt, if it is made from exactly one."""
        if self._template:
            asked = self._template.get("prompt") or self._template.get("user") or ""
            names = sorted({n for part in (asked, self._template.get("system") or "") for n in _fields(part)})
            return names[0] if len(names) == 1 else None
        return (self.layout.columns if self.layout else self._columns).get("prompt")

    def recognise(self, rows: Rows, *, answer: bool = True) -> None:
        """Finds the layout of the data from ``rows`` if neither recipe nor training data determine it. Raises: DataError.

        Args: answer: False for rows that may lack the answer.
        """
        if self._template or self.layout is not None:
            return
        layout = find_layout(self._columns, list(rows.columns), rows.sample(), answer=answer)
        if self._style is None:
            self._style = layout.style
            if layout.style == "chat":
                self._check_chat_template()
        if layout.style == self._style:
            self.layout = layout

    def _layout_for(self, row: Mapping[str, Any], where: str, *, answer: bool = True) -> Layout:
        """The layout of a row: that of its own file if the recipe names no columns. Raises: DataError.

        Args: answer: False for a row that may lack the answer.
        """
        names = tuple(row)
        if names not in self._layouts:
            if self.layout is not None and set(self.layout.columns.values()) <= set(names):
                layout = self.layout
            else:
                try:
                    layout = find_layout(self._columns, names, row, answer=answer)
                except DataError as error:
                    raise DataError(f"{where}: {error}", key=error.key) from None
            if self.style == "chat" and layout.kind == "completion":  # a plain prompt is a question
                layout = replace(layout, kind="turns")
            if layout.style != self.style:
                raise DataError(f"{where}: expected {self.title}, found {layout.title}", key="data.columns")
            self._layouts[names] = layout
        return self._layouts[names]

    def render(self, row: Mapping[str, Any], where: str) -> Rendered:
        """Text and parts of a training row. Raises: DataError naming ``where``."""
        return self.render_all([row], [where])[0]

    def render_all(self, rows: Sequence[Mapping[str, Any]], wheres: Sequence[str]) -> list[Rendered]:
        """Like ``render`` for many rows at once, so that the template engine starts once instead of once per row."""
        if self.style != "chat":
            return [self._raw(row, where, answer=True) for row, where in zip(rows, wheres, strict=True)]
        return self._render_chats([self._chat(row, where) for row, where in zip(rows, wheres, strict=True)], wheres)

    def render_answer(self, row: Mapping[str, Any], where: str, answer: str) -> Rendered:
        """The prompt of ``row`` with ``answer`` in place of its completion."""
        if self.style == "chat":
            chat = self._chat(row, where, answer=False).prompt().with_turn("assistant", answer)
            return self._render_chats([chat], [where])[0]
        prompt = self.render_prompt(row, where)
        return replace(_completed(prompt.text, answer), plain=prompt.plain, notes=prompt.notes)

    def render_prompt(self, row: Mapping[str, Any], where: str) -> Rendered:
        """The text up to where the model answers. A ``messages`` row is cut before its last assistant turn."""
        if self.style != "chat":
            return self._raw(row, where, answer=False)
        return self._render_prompt(self._chat(row, where, answer=False).prompt(), where)

    def render_conversation(self, messages: Sequence[Mapping[str, str]], where: str) -> Rendered:
        """The text of a conversation in memory up to where the model answers."""
        return self._render_prompt(self._fitted(read_messages(list(messages), where), where), where)

    def _render_prompt(self, chat: Conversation, where: str) -> Rendered:
        text = self.chat_template.text(chat, where, add_generation_prompt=True)
        return self._restored(Rendered(text, [], notes=chat.notes))

    def _render_chats(self, chats: Sequence[Conversation], wheres: Sequence[str]) -> list[Rendered]:
        return [self._restored(rendered) for rendered in self.chat_template.render(chats, wheres)]

    def chats(self, rows: Rows) -> Iterator[Conversation]:
        """The conversations of ``rows``, one by one."""
        return (self._chat(rows.row(i), rows.where(i)) for i in range(len(rows)))

    def _chat(self, row: Mapping[str, Any], where: str, *, answer: bool = True) -> Conversation:
        """The conversation of a row as the chat template reads it, with marks in place of control tokens.

        Args: answer: False leaves out an answer that has a column of its own.
        """
        if not self._template:
            layout = self._layout_for(row, where, answer=answer)
            chat = layout.conversation(row, where, roles=self.chat_template.reading.roles, answer=answer)
            return self._fitted(chat, where)
        texts = {role: self._filled(role, row, where) for role in (_TURNS if answer else _TURNS[:-1])}
        turns = {role: text for role, (text, _) in texts.items() if text is not None}
        return Conversation(
            [{"role": role, "content": text} for role, text in turns.items()],
            [role == "assistant" for role in turns],
            [f"data.template.{role}" for role in turns],
            notes=tuple(dict.fromkeys(note for _, notes in texts.values() for note in notes)),
        )

    def _fitted(self, chat: Conversation, where: str) -> Conversation:
        """``chat`` as the chat template reads it, with marks in place of control tokens."""
        if chat.tools is None and all(map(self._is_plain, chat.messages)):
            return chat
        values = {"messages": [{k: v for k, v in m.items() if k != "role"} for m in chat.messages], "tools": chat.tools}
        marked = self.control.protect(values, where)
        if marked is not values and self._control_rule == "keep":
            chat = replace(chat, notes=(*chat.notes, _KEPT))
        elif marked is not values:
            messages = [{"role": m["role"], **new} for m, new in zip(chat.messages, marked["messages"], strict=True)]
            chat = replace(chat, messages=messages, tools=marked["tools"], notes=(*chat.notes, _AS_TEXT))
        return self.chat_template.reading.fit(chat)

    def _is_plain(self, message: Mapping[str, Any]) -> bool:
        """Whether a message is what every template reads, without control tokens."""
        content = message["content"]
        plain = len(message) == 2 and message["role"] != "developer" and isinstance(content, str)
        return plain and not self.control.within(content)

    def _restored(self, rendered: Rendered) -> Rendered:
        if _AS_TEXT not in rendered.notes:
            return rendered
        text, plain = self.control.restore(rendered.text)
        return replace(rendered, text=text, plain=plain)

    def _raw(self, row: Mapping[str, Any], where: str, *, answer: bool) -> Rendered:
        """A row of plain text, or of prompt and completion."""
        if self.style == "text":
            text, notes = self._text(row, "text", where)
            return self._restored(Rendered(text, [Part(0, len(text), "text", trained=True)], notes=notes))
        prompt, notes = self._text(row, "prompt", where)
        if not answer:
            return self._restored(Rendered(prompt, [Part(0, len(prompt), "prompt")], notes=notes))
        completion, more = self._text(row, "completion", where)
        notes = tuple(dict.fromkeys(notes + more))
        return self._restored(replace(_completed(prompt, completion), notes=notes))

    def _text(self, row: Mapping[str, Any], part: str, where: str) -> tuple[str, tuple[str, ...]]:
        """A text of the row, with marks in place of control tokens that are encoded as text, and notes."""
        if self._template:
            text, notes = self._filled(part, row, where)
            assert text is not None
            return text, notes
        column = self._layout_for(row, where, answer=part == "completion").columns.get(part, part)
        value = column_value(row, column, where, key=f"data.columns.{part}")
        text = plain_text(value)
        if text is None:
            message, key = f"{where}: expected text in the column {column!r}, found ", f"data.columns.{part}"
            if is_null(value):
                raise EmptyValueError(f"{message}null", column=column, key=key)
            raise DataError(f"{message}{value!r}", key=key)
        if not self.control.within(text):
            return text, () if text is value else (NUMBERS,)
        if self._control_rule == "text":
            return self.control.protect(text, where), (_AS_TEXT,)
        return text, (_KEPT,)

    def _filled(self, part: str, row: Mapping[str, Any], where: str) -> tuple[str | None, tuple[str, ...]]:
        """A part of ``data.template`` with the values of the row, with marks in place of their control tokens, and notes.
        None if the template has no such part, or if it is the system message and all its fields are null."""
        template = self._template.get(part)
        if template is None:
            return None, ()
        values = {name: _field_value(row, name, where) for name in _fields(template)}
        null = [name for name, value in values.items() if value is None]
        if null and part == "system" and len(null) == len(values):
            return None, ()
        if null and (part in _ANSWERS or len(null) == len(values)):
            raise EmptyValueError(
                f"{where}: column {null[0]!r} is empty in this row", column=null[0], key="data.template"
            )
        notes: tuple[str, ...] = ()
        if (marked := self.control.protect(values, where)) is not values:
            keep = self._control_rule == "keep"
            values, notes = (values, (_KEPT,)) if keep else (marked, (_AS_TEXT,))
        optional = part not in _ANSWERS and any(value not in (None, "") for value in values.values())
        return _fill(template, values, where, optional=optional), notes

    def prompt_row(self, prompt: str) -> dict[str, Any]:
        """A row with ``prompt`` as its prompt. Raises: RecipeError if the prompt needs several columns."""
        if self._template:
            if (column := self.prompt_column) is None:
                raise RecipeError(
                    "the prompt is made from several columns, so a single text is not enough; give a file with those columns",
                    key="data.template",
                )
            return {column: prompt}
        columns = self._columns or (self.layout.columns if self.layout and self.style != "chat" else {})
        if self.style == "text":
            return {columns.get("text", "text"): prompt}
        if self.style == "completion":
            return {columns.get("prompt", "prompt"): prompt}
        if "prompt" in self._columns:
            return {self._columns["prompt"]: [{"role": "user", "content": prompt}]}
        return {self._columns.get("messages", "messages"): [{"role": "user", "content": prompt}]}


def _style_of(columns: Mapping[str, str]) -> Style | None:
    """The style of the columns that a recipe names, without data to look at."""
    for part, style in (("messages", "chat"), ("prompt", "completion"), ("text", "text")):
        if part in columns:
            return style  # type: ignore[return-value]
    return None


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


def _field_value(row: Mapping[str, Any], name: str, where: str) -> Any:
    value = column_value(row, name, where, key="data.template")
    if isinstance(value, list | dict | bytes):
        kind = "bytes" if isinstance(value, bytes) else f"a {type(value).__name__}"
        raise DataError(
            f"{where}: column {name!r} has {kind}; a field of data.template needs text or a number",
            key="data.template",
        )
    return None if is_null(value) else value


def _fill(template: str, values: Mapping[str, Any], where: str, *, optional: bool) -> str:
    """``template`` with ``values``.

    Args: optional: an empty value is left out with the white space before it, or at the start of the text after it.
    """
    formatter, text, at_start = string.Formatter(), "", False
    try:
        for literal, name, spec, conversion in formatter.parse(template):
            literal = literal.lstrip() if at_start else literal
            at_start = False
            if name is None:
                text += literal
            elif optional and values[name] in (None, ""):
                text += literal.rstrip()
                at_start = not text
            else:
                text += literal + formatter.format_field(formatter.convert_field(values[name], conversion), spec or "")
    except (ValueError, TypeError) as error:  # a format specification that does not fit the value
        raise RecipeError(f"{where}: the template cannot be filled: {error}", key="data.template") from None
    return text
