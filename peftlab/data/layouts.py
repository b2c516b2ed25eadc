"""Recognises how rows hold text for a language model, and reads chat rows into the normal form."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peftlab.data.messages import Conversation, Message, from_json, read_messages, read_tools
from peftlab.data.values import NUMBERS, EmptyValueError, is_empty, is_null, plain_text
from peftlab.errors import DataError

Style = Literal["text", "completion", "chat"]
Kind = Literal["text", "completion", "messages", "turns", "alpaca"]

_MESSAGES = ("messages", "conversations", "conversation")
_ALPACA = ("instruction", "input", "output", "system", "history")
_ASKS = ("user", "human")
_MOST_NAMES = 12
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_EXPECTED = "expected a column text, or prompt and completion, or messages (ShareGPT: conversations), or instruction and output (Alpaca)"


@dataclass(frozen=True)
class Layout:
    """Where rows hold their text.

    Attributes:
        kind: ``messages`` (OpenAI or ShareGPT), ``turns`` (prompt and completion as lists of messages, as TRL writes them),
            ``alpaca``, or plain ``text`` or ``completion``.
        columns: part -> column. Parts of a chat besides those of the kind: ``system`` and ``tools``.
        title: what ``check`` says.
    """

    kind: Kind
    columns: Mapping[str, str]
    title: str

    @property
    def style(self) -> Style:
        return self.kind if self.kind in ("text", "completion") else "chat"

    def conversation(
        self, row: Mapping[str, Any], where: str, *, roles: Collection[str] = (), answer: bool = True
    ) -> Conversation:
        """A chat row in the normal form. Raises: DataError with place and turn.

        Args: roles: further roles that the chat template knows. answer: False leaves out the answer to learn where it has a
        column of its own, which the row may lack.
        """
        for column in _MEDIA:
            value = row.get(column)
            if not is_empty(value) and not (isinstance(value, str | dict) and value in ({}, "[]", "{}")):
                raise DataError(f"{where}: the column {column!r} has images, audio or video; causal_lm reads text only")
        if self.kind == "messages":
            value = self._value(row, "messages", where)
            self._require(value, "messages", where, empty=is_empty(value))
            read = read_messages(value, where, roles=roles)
        elif self.kind == "turns":
            read = self._prompt_and_completion(row, where, roles, answer)
        else:
            read = self._alpaca(row, where, answer)
        system = self._optional(row, "system")
        if not is_empty(system) and self.kind != "alpaca":
            read = self._with_system(read, system, where)
        if "tools" not in self.columns and "functions" not in self.columns:
            return read
        tools = read_tools(self._optional(row, "tools"), where)
        functions = read_tools(self._optional(row, "functions"), where)
        if tools and functions and tools != functions:
            raise DataError(
                f"{where}: the columns 'tools' and 'functions' differ; keep one of them", key="data.columns"
            )
        return Conversation(read.messages, read.trained, read.places, tools or functions, read.notes)

    def _prompt_and_completion(
        self, row: Mapping[str, Any], where: str, roles: Collection[str], answer: bool
    ) -> Conversation:
        """Only answers in the completion are trained."""
        parts = []
        for part, role in (("prompt", "user"), ("completion", "assistant")):
            if part == "completion" and not answer:
                continue
            value = self._value(row, part, where)
            key = f"data.columns.{part}"
            self._require(value, part, where, empty=not isinstance(value, str) and is_empty(value))
            if plain_text(value) is not None and not is_chat(value):
                value = [{"role": role, "content": value}]
            parts.append(read_messages(value, where, roles=roles, part=part, key=key))
        first, rest = parts[0], parts[1:]
        return Conversation(
            first.messages + [m for read in rest for m in read.messages],
            [False] * len(first.messages) + [t for read in rest for t in read.trained],
            first.places + [p for read in rest for p in read.places],
            None,
            tuple(dict.fromkeys(note for read in parts for note in read.notes)),
        )

    def _require(self, value: Any, part: str, where: str, *, empty: bool) -> None:
        """Raises EmptyValueError if the column of ``part`` is ``empty``."""
        if empty:
            found = "null" if is_null(value) else "an empty text" if isinstance(value, str) else "an empty list"
            raise EmptyValueError(
                f"{where}: expected a list of messages with role and content, found {found}",
                column=self.columns[part],
                key=f"data.columns.{part}",
            )

    def _alpaca(self, row: Mapping[str, Any], where: str, answer: bool) -> Conversation:
        messages: list[Message] = []
        places: list[str] = []
        notes: list[str] = []

        def add(role: str, content: str, place: str) -> None:
            messages.append({"role": role, "content": content})
            places.append(place)

        def text_of(part: str, value: Any) -> str:
            text, column = plain_text(value), self.columns[part]
            if text is None:
                message = f"{where}: expected text in the column {column!r}, found "
                if is_null(value) and part != "history":
                    raise EmptyValueError(f"{message}null", column=column, key="data.columns")
                raise DataError(f"{message}{'null' if is_null(value) else repr(value)}", key="data.columns")
            notes.extend([] if text is value else [NUMBERS])
            return text

        def optional(part: str) -> str:
            value = self._optional(row, part)
            return "" if is_null(value) else text_of(part, value)

        if system := optional("system"):
            add("system", system, "column 'system'")
        for i, (question, reply) in enumerate(self._history(row, where), 1):
            add("user", text_of("history", question), f"history {i}")
            add("assistant", text_of("history", reply), f"history {i}")
        asked = [text_of("instruction", self._value(row, "instruction", where)), optional("input")]
        add("user", "\n\n".join(text for text in asked if text), "column 'instruction'")
        if answer:
            add("assistant", text_of("output", self._value(row, "output", where)), "column 'output'")
        trained = [m["role"] == "assistant" for m in messages]
        return Conversation(messages, trained, places, notes=tuple(dict.fromkeys(notes)))

    def _history(self, row: Mapping[str, Any], where: str) -> list[list[Any]]:
        """Pairs of question and answer before the instruction."""
        what = "pairs of question and answer in the column 'history'"
        history = from_json(self._optional(row, "history"), where, what, "data.columns")
        if hasattr(history, "tolist"):
            history = history.tolist()
        history = [] if is_null(history) else history
        if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
            raise DataError(f"{where}: expected {what}", key="data.columns")
        return history

    def _value(self, row: Mapping[str, Any], part: str, where: str) -> Any:
        return column_value(row, self.columns[part], where, key=f"data.columns.{part}")

    def _optional(self, row: Mapping[str, Any], part: str) -> Any:
        return row.get(self.columns[part]) if part in self.columns else None

    def _with_system(self, read: Conversation, system: Any, where: str) -> Conversation:
        column = self.columns["system"]
        if not isinstance(system, str):
            raise DataError(
                f"{where}: expected text in the column {column!r}, found {system!r}", key="data.columns.system"
            )
        first = read.messages[0]
        if first["role"] in ("system", "developer"):
            if first["content"] == system:
                return read
            raise DataError(
                f"{where}: both the column {column!r} and {read.places[0]} have a system message, and they differ; remove one",
                key="data.columns.system",
            )
        return Conversation(
            [{"role": "system", "content": system}, *read.messages],
            [False, *read.trained],
            [f"column {column!r}", *read.places],
            read.tools,
            read.notes,
        )


def find_layout(
    columns: Mapping[str, str], available: Sequence[str], sample: Mapping[str, Any], *, answer: bool = True
) -> Layout:
    """The layout of rows with the columns ``available``.

    Args: columns: part -> column, as far as the recipe says. sample: column -> a value of it. answer: False for rows that
        may lack the answer, as for a prediction.
    Raises: DataError if no layout fits.
    """
    columns = dict(columns)
    extras = {part: columns.pop(part, part) for part in ("system", "tools") if part in columns or part in available}
    extras |= {"functions": "functions"} if "functions" in available else {}
    chosen = columns or _by_name(available, answer=answer)
    if "messages" in chosen:
        column = chosen["messages"]
        kind = "ShareGPT conversations" if _is_sharegpt(sample.get(column)) else "chat messages"
        return _chat("messages", kind, {"messages": column}, extras)
    if answer and not columns and "completion" in chosen and str(sample.get("label")).lower() in ("true", "false"):
        raise DataError(_judged(str(sample["label"])), key="data.columns")
    if "prompt" in chosen and ("completion" in chosen or not answer):
        pair = {part: column for part, column in chosen.items() if part in ("prompt", "completion")}
        if any(is_chat(sample.get(column)) for column in pair.values()):
            return _chat("turns", "prompt and completion as chat messages", pair, extras)
        return Layout("completion", pair, f"prompt and completion ({_named(pair.values())})")
    if "text" in chosen:
        return Layout("text", {"text": chosen["text"]}, f"plain text ({_named([chosen['text']])})")
    if "instruction" in chosen:
        return _chat("alpaca", "Alpaca instructions", chosen, extras)
    if {"chosen", "rejected"} <= set(available):
        raise DataError(_preferences(available, sample.get("chosen")), key="data.columns")
    raise DataError(
        f"{_EXPECTED}; found {_listed(available)}. Map them with data.columns or build the text with data.template",
        key="data.columns",
    )


def _judged(label: str) -> str:
    """The error about rows that say whether their completion is good. Args: label: one of them, spelt as in the file."""
    bad = "false" if label.islower() else "FALSE" if label.isupper() else "False"
    return (
        "the column 'label' says whether a completion is good, and causal_lm learns every completion; set "
        f"data.exclude={{label: ['{bad}']}} and data.columns={{prompt: prompt, completion: completion}} to train on the good ones"
    )


def _preferences(available: Sequence[str], chosen: Any) -> str:
    """The error about pairs of a better and a worse answer."""
    text = str(chosen)
    if is_chat(chosen) and ("prompt" not in available or any(f"{q}{r}{q}" in text for q in "'\"" for r in _ASKS)):
        columns = "{messages: chosen}"
    else:
        columns = "{prompt: prompt, completion: chosen}" if "prompt" in available else "{text: chosen}"
    return (
        "these rows are preferences (chosen and rejected), and causal_lm learns one answer per row; set "
        f"data.columns={columns} to train on the chosen answers"
    )


def _by_name(available: Sequence[str], *, answer: bool) -> dict[str, str]:
    """Part -> column by the names of the columns."""
    for name in _MESSAGES:
        if name in available:
            return {"messages": name}
    chosen = {name: name for name in ("prompt", "completion", "text") if name in available}
    if not chosen and "instruction" in available and ("output" in available or not answer):
        return {name: name for name in _ALPACA if name in available}
    return chosen


def _chat(kind: Kind, title: str, columns: Mapping[str, str], extras: Mapping[str, str]) -> Layout:
    columns = {**columns, **extras}
    return Layout(kind, columns, f"{title} ({_named(columns.values())})")


def _named(columns: Iterable[str]) -> str:
    names = list(dict.fromkeys(columns))
    return f"column{'' if len(names) == 1 else 's'} {_listed(names)}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(map(repr, names[:_MOST_NAMES])) + more


def column_value(row: Mapping[str, Any], column: str, where: str, *, key: str) -> Any:
    """The value of a row. Raises: DataError if its file lacks the column, unlike the file that columns were chosen from."""
    if column not in row:
        raise DataError(f"{where}: no column {column!r}; found the {_named(row)}", key=key)
    return row[column]


def is_chat(value: Any) -> bool:
    """Whether a value looks like a list of messages, or JSON text of one."""
    if isinstance(value, str):
        return value.lstrip().startswith("[{") and ('"role"' in value or '"from"' in value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) for m in value)


def _is_sharegpt(value: Any) -> bool:
    if isinstance(value, str):
        return '"from"' in value and '"role"' not in value
    return is_chat(value) and value[0].get("from") is not None and value[0].get("role") is None
