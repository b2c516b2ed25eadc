"""The normal form of a conversation: messages and tools as OpenAI writes them, from that format or from ShareGPT's."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftlab.data.values import NUMBERS, is_null, plain_text
from peftlab.errors import DataError, listed

Message = dict[str, Any]

_KEY = "data.columns.messages"
# A role in the data -> the role in the normal form. ``call`` is an answer that only calls tools.
_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}
_NORMAL_ROLES = {"system", "user", "assistant", "tool"}
_WEIGHTS = ("weight", "loss", "train", "training")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_READ = {"role", "from", "content", "value", "tool_calls", "function_call", "refusal", "audio", *_WEIGHTS, *_REASONING}
_TEXT_PARTS = ("text", "input_text", "output_text")
_YES_OR_NO = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_FUNCTION_KEYS, _SCHEMA_KEYS = ("name", "description", "parameters"), ("type", "properties", "required")
_SHOWN = 80


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of chat data in the normal form.

    Attributes:
        messages: ``role`` (system, developer, user, assistant or tool, or another role of the chat template); ``content``,
            text or a list of ``{"type": "text", "text": ...}``; for an answer also ``reasoning_content`` and ``tool_calls``
            with ``function.arguments`` as an object; ``tool_call_id`` and ``name``; and the data's other keys.
        trained: whether each message is an answer to learn.
        places: what an error calls each message, such as ``turn 2 (user)``.
        tools: as OpenAI writes them; None without tools.
        notes: what reading changed or did not use, as ``kind`` or ``kind detail``.
    """

    messages: list[Message]
    trained: list[bool]
    places: list[str]
    tools: list[dict[str, Any]] | None = None
    notes: tuple[str, ...] = ()

    def cut(self, end: int) -> Conversation:
        """The first ``end`` messages."""
        return Conversation(self.messages[:end], self.trained[:end], self.places[:end], self.tools, self.notes)

    def prompt(self) -> Conversation:
        """The conversation without its last message if that is an answer."""
        return self.cut(-1) if self.messages[-1]["role"] == "assistant" else self

    def with_turn(self, role: str, content: str) -> Conversation:
        """The conversation followed by one more message."""
        return Conversation(
            [*self.messages, {"role": role, "content": content}],
            [*self.trained, role == "assistant"],
            [*self.places, role],
            self.tools,
            self.notes,
        )


def read_messages(
    value: Any, where: str, *, roles: Collection[str] = (), part: str = "", key: str = _KEY
) -> Conversation:
    """The normal form of a list of messages, or of the same list as JSON text.

    Args: roles: further roles that the chat template knows. part: the column's part if not ``messages``, for errors.
    Raises: DataError with place and turn.
    """
    value = from_json(value, where, "a list of messages", key)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list) or not value:
        found = "an empty list" if isinstance(value, list) else _shown(value)
        raise DataError(f"{where}: expected a list of messages with role and content, found {found}", key=key)
    if all(map(_is_normal, value)):  # most data: ten times faster
        names = tuple(message["role"] for message in value)
        return Conversation(value, [name == "assistant" for name in names], _places(names, part))
    reader = _Reader(where, roles, part, key)
    for i, raw in enumerate(value, 1):
        reader.read(raw, i)
    return Conversation(reader.messages, reader.trained, reader.places, None, tuple(dict.fromkeys(reader.notes)))


def _is_normal(message: Any) -> bool:
    return (
        type(message) is dict
        and len(message) == 2
        and message.get("role") in _NORMAL_ROLES
        and type(message.get("content")) is str
    )


@functools.lru_cache(maxsize=1024)
def _places(roles: tuple[str, ...], part: str) -> list[str]:
    return [f"{part} turn {i} ({role})".lstrip() for i, role in enumerate(roles, 1)]


class _Reader:
    """Reads the messages of one list, in order."""

    def __init__(self, where: str, roles: Collection[str], part: str, key: str) -> None:
        self._where, self._roles, self._part, self._key = where, roles, f"{part} " if part else "", key
        self.messages: list[Message] = []
        self.trained: list[bool] = []
        self.places: list[str] = []
        self.notes: list[str] = []
        self._call_ids: set[str] = set()

    def read(self, raw: Any, number: int) -> None:
        self._place = f"{self._part}turn {number}"
        if isinstance(raw, str) and raw.lstrip().startswith("{"):
            raw = from_json(raw, f"{self._where}, {self._place}", "a message", self._key)
        if not isinstance(raw, Mapping):
            raise self._error(f"expected a message with role and content, found {_shown(raw)}")
        # Columnar files fill absent keys with null, and absent lists sometimes with empty ones.
        raw = {name: value for name, value in raw.items() if not _absent(value)}
        role = self._role(raw)
        self._place += f" ({role if role != 'call' else 'assistant'})"
        message: Message = {"role": "assistant" if role == "call" else role}
        if role == "call":
            message["content"] = ""
            calls = from_json(_first(raw, "content", "value"), self._at, "a tool call", self._key)
            message["tool_calls"] = self._calls(calls if isinstance(calls, list) else [calls])
        else:
            self._add_calls(raw, message)
            self._add_reasoning(raw, message)
            content = self._content(raw, message)
            message = {"role": role, "content": content, **message}
        self._add_others(raw, message)
        self.messages.append(message)
        self.trained.append(self._is_trained(raw, message["role"]))
        self.places.append(self._place)

    @property
    def _at(self) -> str:
        return f"{self._where}, {self._place}"

    def _error(self, text: str) -> DataError:
        return DataError(f"{self._at}: {text}", key=self._key)

    def _role(self, raw: Mapping[str, Any]) -> str:
        name = _first(raw, "role", "from")
        if not isinstance(name, str):
            raise self._error(
                f"expected a message with role and content, found {_shown(raw) if raw else 'a message without values'}"
            )
        role = _ROLES.get(name.strip().lower(), name if name in self._roles else None)
        if role is None:
            near = difflib.get_close_matches(name.strip().lower(), _ROLES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise self._error(
                f"unknown role {name[:_SHOWN]!r}; expected system, developer, user, assistant or tool (ShareGPT: human, gpt, "
                f"function_call, observation), or a role that the chat template names{hint}"
            )
        return role

    def _content(self, raw: Mapping[str, Any], message: Message) -> Any:
        content = _first(raw, "content", "value")
        if content is None and isinstance(raw.get("refusal"), str):
            content = raw["refusal"]
        if "audio" in raw:
            raise self._error("this message has audio; causal_lm reads text only")
        if content is None:
            if message.get("tool_calls") or message.get("reasoning_content"):
                return ""
            expected = "content or tool_calls" if message["role"] == "assistant" else "content"
            others = [name for name in raw if name not in _READ]
            found = f"; its other keys are {listed(others)}" if others else ""
            raise self._error(f"the message has no {expected}; complete or remove it{found}")
        if (text := plain_text(content)) is not None:
            self.notes += [] if text is content else [NUMBERS]
            return text
        if hasattr(content, "tolist"):
            content = content.tolist()
        parts = [content] if isinstance(content, Mapping) else content
        if isinstance(parts, list) and all(_is_part(part, any_type=message["role"] != "tool") for part in parts):
            return self._parts(parts, message)
        if message["role"] == "tool" and isinstance(content, Mapping | list):
            return json.dumps(self._without_nulls(content), ensure_ascii=False)
        raise self._error(f"expected text or a list of text parts as content, found {_shown(content)}")

    def _parts(self, parts: Sequence[Any], message: Message) -> Any:
        texts = []
        for i, part in enumerate(parts, 1):
            if isinstance(part, str):
                texts.append(part)
                continue
            kind = part.get("type")
            text = part.get(kind) if kind in ("thinking", "reasoning", "refusal") else part.get("text")
            if kind in ("thinking", "reasoning") and message["role"] == "assistant":
                text = part.get("text") if text is None else text
                if isinstance(text, list):
                    text = "".join(str(p.get("text", "")) if isinstance(p, Mapping) else str(p) for p in text)
                message["reasoning_content"] = message.get("reasoning_content", "") + str(text or "")
            elif kind in _TEXT_PARTS or kind == "refusal":
                if not isinstance(text, str):
                    raise self._error(f"part {i} of the content has no text")
                texts.append(text)
            else:
                raise self._error(
                    f"part {i} of the content is of type {str(kind)!r}; causal_lm reads text parts only. Remove it, or write "
                    "calls as tool_calls and results as tool messages"
                )
        return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts] if texts else ""

    def _add_calls(self, raw: Mapping[str, Any], message: Message) -> None:
        calls = from_json(raw.get("tool_calls"), self._at, "tool_calls", self._key)
        if hasattr(calls, "tolist"):
            calls = calls.tolist()
        if calls is not None and not isinstance(calls, list):
            raise self._error(f"expected a list as tool_calls, found {_shown(calls)}")
        calls = [call for call in calls or [] if not _absent(call)]
        if "function_call" in raw and not _absent(one := _pruned(raw["function_call"])):
            if calls:
                raise self._error("it has both tool_calls and function_call; keep one of them")
            calls = [one]
        if calls:
            if message["role"] != "assistant":
                raise self._error("only an assistant can call tools")
            message["tool_calls"] = self._calls(calls)

    def _calls(self, calls: Sequence[Any]) -> list[dict[str, Any]]:
        written = []
        for call in calls:
            call = from_json(call, self._at, "a tool call", self._key)
            function = call.get("function", call) if isinstance(call, Mapping) else None
            if isinstance(function, str) and isinstance(call, Mapping):
                function = {**call, "name": function}
            if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not function.get("name"):
                raise self._error(
                    f'expected a tool call such as {{"name": "f", "arguments": {{}}}}, found {_shown(call)}'
                )
            arguments = function.get("arguments", function.get("parameters"))
            entry = {
                "type": "function",
                "function": {"name": str(function["name"]), "arguments": self._object(arguments)},
            }
            if not _absent(call.get("id")):
                entry = {"id": str(call["id"]), **entry}
                self._call_ids.add(str(call["id"]))
            for name, value in {**call, **(function if function is not call else {})}.items():
                if name not in ("id", "type", "function", "name", "arguments", "parameters", "index") and not _absent(
                    value
                ):
                    self.notes.append(f"unread_key tool_calls.{name}")
            written.append(entry)
        return written

    def _object(self, arguments: Any) -> dict[str, Any]:
        """Arguments as an object. A null in JSON text is a value; in an object it may be the filler of a columnar file."""
        if isinstance(arguments, str):
            text = arguments
            for _ in range(2):  # some exports encode them twice
                if isinstance(text, str):
                    text = from_json(text.strip() or "{}", self._at, "the arguments of a tool call", self._key)
            if not isinstance(text, dict):
                raise self._error(f"expected an object as the arguments of a tool call, found {_shown(arguments)}")
            return text
        if arguments is None:
            return {}
        if not isinstance(arguments, Mapping):
            raise self._error(f"expected an object as the arguments of a tool call, found {_shown(arguments)}")
        pruned = self._without_nulls(arguments)
        assert isinstance(pruned, dict)
        return pruned

    def _without_nulls(self, value: Any) -> Any:
        pruned = _pruned(value)
        if pruned != value:
            self.notes.append("nulls")
        return pruned

    def _add_reasoning(self, raw: Mapping[str, Any], message: Message) -> None:
        texts = {raw[name] if isinstance(raw[name], str) else _shown(raw[name]) for name in _REASONING if name in raw}
        if not texts:
            return
        if not all(isinstance(raw.get(name, ""), str) for name in _REASONING):
            raise self._error(f"expected text as reasoning, found {next(iter(texts))}")
        if message.get("role") != "assistant":
            self.notes += [f"unread_key {name}" for name in _REASONING if name in raw]
        elif len(texts) > 1:
            raise self._error(f"{' and '.join(name for name in _REASONING if name in raw)} differ; keep one of them")
        else:
            message["reasoning_content"] = texts.pop()

    def _add_others(self, raw: Mapping[str, Any], message: Message) -> None:
        if "refusal" in raw and message.get("content") != raw["refusal"]:
            self.notes.append("unread_key refusal")
        both = {"role", "from"} <= raw.keys(), {"content", "value"} <= raw.keys()
        self.notes += [f"unread_key {name}" for name, twice in zip(("from", "value"), both, strict=True) if twice]
        if (call_id := raw.get("tool_call_id")) is not None and str(call_id) not in self._call_ids:
            self.notes.append("unmatched_call")
        for name, value in raw.items():
            if name not in _READ:
                message[name] = str(value) if name == "tool_call_id" else _pruned(value)

    def _is_trained(self, raw: Mapping[str, Any], role: str) -> bool:
        wanted = {name: self._yes_or_no(name, raw[name]) for name in _WEIGHTS if name in raw}
        if len(set(wanted.values())) > 1:
            raise self._error(f"{' and '.join(wanted)} contradict each other")
        if role != "assistant":
            if any(value for value in wanted.values()) and "weight" not in wanted:
                self.notes.append("untrained_role")
            return False
        return all(wanted.values())

    def _yes_or_no(self, name: str, value: Any) -> bool:
        if isinstance(value, bool) or value in (0, 1):
            return bool(value)
        if isinstance(value, str) and value.strip().lower() in _YES_OR_NO:
            return _YES_OR_NO[value.strip().lower()]
        expected = "0 or 1" if name == "weight" else "true or false"
        raise self._error(f"expected {expected} as {name}, found {_shown(value)}")


def read_tools(value: Any, where: str, *, key: str = "data.columns.tools") -> list[dict[str, Any]] | None:
    """Tools as OpenAI writes them, from a list of tools or functions or the same as JSON text; None if there are none.

    Raises: DataError.
    """
    value = from_json(value, where, "a list of tools", key)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if _absent(value):
        return None
    tools = []
    for i, tool in enumerate(
        [value] if isinstance(value, Mapping) else value if isinstance(value, list) else [None], 1
    ):
        tool = _pruned(from_json(tool, where, "a tool", key))
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            shown = value if not isinstance(value, list | Mapping) else tool
            raise DataError(f"{where}: expected a function with a name as tool {i}, found {_shown(shown)}", key=key)
        function = dict(function)
        if function is not tool and tool.get("function") is None:
            function.pop("type", None)
        if isinstance(function.get("parameters"), str):
            function["parameters"] = from_json(function["parameters"], where, "the parameters of a tool", key)
        # A columnar file has one order of keys, whichever row came first.
        for keys, values in ((_FUNCTION_KEYS, function), (_SCHEMA_KEYS, function.get("parameters"))):
            if isinstance(values, dict):
                ordered = {k: values[k] for k in (*keys, *values) if k in values}
                values.clear()
                values.update(ordered)
        tools.append({"type": "function", "function": function})
    return tools or None


def _is_part(part: Any, *, any_type: bool) -> bool:
    """Whether it is a part of a content. Args: any_type: also one that is not text, which is refused later."""
    if isinstance(part, Mapping) and "type" in part:
        return any_type or (part["type"] in _TEXT_PARTS and isinstance(part.get("text"), str))
    return isinstance(part, str)


def _first(raw: Mapping[str, Any], *names: str) -> Any:
    return next((raw[name] for name in names if raw.get(name) is not None), None)


def _absent(value: Any) -> bool:
    """Whether a value says nothing: null, NaN (pandas' null), an empty list or an empty object."""
    return is_null(value) or (isinstance(value, list | dict) and not value)


def _pruned(value: Any) -> Any:
    """``value`` without the keys of objects that are null."""
    if isinstance(value, Mapping):
        return {k: _pruned(v) for k, v in value.items() if not is_null(v)}
    if hasattr(value, "tolist") and not isinstance(value, str):
        value = value.tolist()
    return [_pruned(v) for v in value] if isinstance(value, list) else value


def from_json(value: Any, where: str, what: str, key: str) -> Any:
    """The value of JSON text, None for blank text; any other value as it is. Raises: DataError."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        reason = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        hint = (
            "; write it with json.dumps, not as Python's text of a list"
            if value.lstrip("[ \n").startswith("{'")
            else ""
        )
        if value.lstrip()[:1] not in ("[", "{"):
            raise DataError(f"{where}: expected {what}, found {_shown(value)}", key=key) from None
        raise DataError(f"{where}: expected {what} as JSON, found {_shown(value)} ({reason}){hint}", key=key) from None


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
