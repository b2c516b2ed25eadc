"""What a chat template reads of a message, found by trying it, and messages in the form that it reads."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peftlab.data.messages import Conversation, Message

_PROBE = "peftlab probe"
_REASONING = ("reasoning_content", "reasoning", "thinking")
_PLAIN = {"role", "content"}
# Read by the normal form itself: pairs a result with its call.
_PAIRS = {"tool_call_id"}


class TemplateReading:
    """What a chat template reads.

    Args: source: the template. write: the text of messages; None if the template rejects them.
    """

    def __init__(self, source: str, write: Callable[[Sequence[Message]], str | None]) -> None:
        self._write = write
        self._names = frozenset(re.findall(r"[A-Za-z_]\w*", source))
        # Constants: a template that treats a role in its own way names it.
        self.roles = frozenset(re.findall(r"""["']([A-Za-z_]\w*)["']""", source)) - _PLAIN
        self._keys: dict[tuple[str, str], bool] = {}

    @functools.cached_property
    def text(self) -> bool:
        """Whether it writes a content that is text."""
        written = self._write([{"role": "user", "content": _PROBE}])
        return written is None or _PROBE in written

    @functools.cached_property
    def parts(self) -> bool:
        """Whether it writes the text of a content that is a list of parts, and not the list itself."""
        written = self._write([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}])
        return written is not None and _PROBE in written and not re.search(r"""["']type["']""", written)

    @functools.cached_property
    def reasoning(self) -> str | None:
        """The key in which it reads what the model thought; None if it writes none."""
        for key in _REASONING:
            if key in self._names:
                chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "?", key: _PROBE}]
                if _PROBE in (self._try(chat) or ""):
                    return key
        return None

    @functools.cached_property
    def arguments_as_text(self) -> bool:
        """Whether the arguments of a tool call must be JSON text: the template fails on an object or writes Python's text of
        it."""
        arguments = {"probe": _PROBE}
        as_object = self._try(_call(arguments))
        if as_object is not None and _PROBE in as_object and repr(arguments) not in as_object:
            return False
        return _PROBE in (self._try(_call(json.dumps(arguments))) or "")

    @property
    def parts_only(self) -> bool:
        """Whether it writes a content only if that is a list of parts."""
        return not self.text and self.parts

    def _try(self, messages: Sequence[Message]) -> str | None:
        return self._write(in_parts(messages) if self.parts_only else messages)

    def reads(self, role: str, key: str, value: Any) -> bool:
        """Whether it reads ``key`` of a message of this role."""
        if key not in self._names:
            return False
        if (role, key) not in self._keys:
            probe = _PROBE if isinstance(value, str) else value
            before = [] if role in ("user", "system", "developer") else [{"role": "user", "content": "?"}]
            before += _call({})[1:] if role == "tool" else []
            message = {"role": role, "content": "?"}
            with_key, without = (self._try([*before, m]) for m in ({**message, key: probe}, message))
            self._keys[role, key] = with_key is None or with_key != without
        return self._keys[role, key]

    def fit(self, chat: Conversation) -> Conversation:
        """``chat`` with its messages in the form that the template reads, without the keys that it does not."""
        if all(message.keys() <= _PLAIN and isinstance(message["content"], str) for message in chat.messages) and all(
            message["role"] != "developer" for message in chat.messages
        ):
            return chat
        notes = list(chat.notes)
        messages = [self._fit(m, t, notes) for m, t in zip(chat.messages, chat.trained, strict=True)]
        return Conversation(messages, chat.trained, chat.places, chat.tools, tuple(dict.fromkeys(notes)))

    def _fit(self, message: Message, trained: bool, notes: list[str]) -> Message:
        role = message["role"]
        if role == "developer" and role not in self._names:
            role = "system"
        fitted: Message = {"role": role, "content": message["content"]}
        if isinstance(message["content"], list) and not self.parts:
            fitted["content"] = "".join(part["text"] for part in message["content"])
        for key, value in message.items():
            if key in _PLAIN:
                continue
            if key == "tool_calls":
                fitted[key] = [self._fit_call(call) for call in value]
            elif key == "reasoning_content":
                # Kept if the template does not read it: the proof tells that it is not in the text.
                fitted[self.reasoning or key] = value
                if self.reasoning is None and not trained:
                    notes.append(f"unread_key {key}")
            elif self.reads(role, key, value):
                fitted[key] = value
            elif key not in _PAIRS:
                notes.append(f"unread_key {key}")
        return fitted

    def _fit_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        if not self.arguments_as_text:
            return dict(call)
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}


def in_parts(messages: Sequence[Message]) -> list[Message]:
    """Messages with every content as a list of parts, for a template that reads nothing else."""
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
        for m in messages
    ]


def reasoning_of(message: Message) -> str:
    """What the model thought before an answer; empty if nothing."""
    return next((str(message[key]) for key in _REASONING if message.get(key)), "")


def _call(arguments: Any) -> list[Message]:
    call = {"id": "probe0000", "type": "function", "function": {"name": "probe", "arguments": arguments}}
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
