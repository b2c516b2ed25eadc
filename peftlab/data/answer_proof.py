"""Whether the text of an answer has everything that its message says: words, tool calls and reasoning."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from peftlab.data.messages import Message
from peftlab.data.template_reading import reasoning_of


def texts(content: Any) -> list[str]:
    """The texts of a content; one empty text if there are none."""
    if isinstance(content, list):
        return [str(part["text"]) for part in content] or [""]
    return [content] if isinstance(content, str) else [""]


def required_words(message: Message) -> list[str]:
    """What an answer must contain literally: its words without thoughts."""
    first, *more = texts(message.get("content"))
    return [first.split("</think>")[-1].strip(), *(text.strip() for text in more)]


def has_calls(message: Message, text: str) -> bool:
    """Whether ``text`` has the names, and the keys and values of all arguments, of the message's tool calls."""
    for call in message.get("tool_calls") or ():
        if str(call["function"]["name"]) not in text:
            return False
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not all(any(form in text for form in forms) for forms in _leaves(arguments)):
            return False
    return True


def has_reasoning(message: Message, text: str) -> bool:
    """Whether ``text`` has what the model thought before the answer."""
    return reasoning_of(message).strip() in text


def _leaves(value: Any) -> Iterator[tuple[str, ...]]:
    """The ways to write each key and each value of arguments: in JSON, or as templates that write XML do."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield _forms(str(key))
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield _forms(value)
    else:
        yield (json.dumps(value), str(value))


def _forms(text: str) -> tuple[str, ...]:
    return (text, text.strip(), json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])
