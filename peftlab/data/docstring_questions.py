"""Questions about docstrings in numpy's format, made by rules: defaults and types of parameters, and exceptions."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from peftlab.data.numpydoc import sections

_RAISES = "Which exception is raised?"
# Characters of a docstring: longer ones are mostly examples and notes.
_LONGEST = 600
# Questions of a kind per docstring, so that functions with many parameters do not outweigh the others.
_MOST_DEFAULTS, _MOST_TYPES = 2, 1
_LONGEST_TYPE = 60
_PARAMETER = re.compile(r"^(\*{0,2}\w+)[ \t]?:[ \t]*(\S.*)$", re.MULTILINE)
_ENTRY_END = re.compile(r"^\S", re.MULTILINE)
_EXCEPTION = re.compile(r"^(\w*(?:Error|Exception|Warning))(?=s?:?[ \t]*$)", re.MULTILINE)
_DEFAULT = re.compile(
    r"\bdefault(?:s|ed)?(?: values?)?(?: is| are| to|:|=)+ ?(?:to )?"
    r"(?:``(?P<a>[^`\n]+)``|`(?P<b>[^`\n]+)`|(?P<c>'[^'\n]*'|\"[^\"\n]*\"|[-+]?\w[\w.]*(?:\([^()\n]*\))?))",
    re.IGNORECASE,
)
_TYPE_END = re.compile(r",? *\(?(?:optional|default|shape|keyword)\b|[.;](?: |$)|$", re.IGNORECASE)


class Asked(NamedTuple):
    """A question with the places of its answers in the text; without one it has no answer."""

    question: str
    places: tuple[tuple[int, int], ...] = ()


class Parameter(NamedTuple):
    """A documented parameter with the places of its type and of its default, if it has them."""

    name: str
    type: tuple[int, int] | None
    default: tuple[int, int] | None
    mentions_default: bool


def rows_of(text: str, others: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a docstring, in the layout of SQuAD 2; a question without an answer for every two with one.

    Args: others: names of parameters of other docstrings, to ask for what the text does not say.
    """
    context = inspect.cleandoc(text)
    parts = sections(context)
    if len(context) > _LONGEST or "Parameters" not in parts:
        return
    parameters = list(_parameters(context, *parts["Parameters"]))
    raised = tuple(m.span(1) for m in _EXCEPTION.finditer(context, *parts["Raises"])) if "Raises" in parts else ()
    digest = hashlib.sha256(context.encode()).digest()
    rng = np.random.default_rng(list(digest))
    defaults = [Asked(f"What is the default of {p.name}?", (p.default,)) for p in parameters if p.default]
    types = [Asked(f"What is the type of {p.name}?", (p.type,)) for p in parameters if p.type]
    chosen = [*_chosen(defaults, _MOST_DEFAULTS, rng), *_chosen(types, _MOST_TYPES, rng)]
    chosen += [Asked(_RAISES, raised)] if raised else []
    absent = [name for name in others if name not in context]
    chosen += _chosen(list(_unanswered(parameters, absent, context)), (len(chosen) + 1) // 2, rng)
    for number, asked in enumerate(chosen):
        yield {
            "id": f"{digest.hex()[:10]}-{number}",
            "question": asked.question,
            "context": context,
            "answers": {
                "text": [context[a:b] for a, b in asked.places],
                "answer_start": [a for a, _ in asked.places],
            },
        }


def parameter_names(text: str) -> list[str]:
    """The names of the parameters that a docstring documents."""
    context = inspect.cleandoc(text)
    parts = sections(context)
    return [p.name for p in _parameters(context, *parts["Parameters"])] if "Parameters" in parts else []


def _unanswered(parameters: Sequence[Parameter], absent: Sequence[str], context: str) -> Iterator[Asked]:
    """What the text does not say: the default of a parameter without one, a parameter of another function, an exception."""
    yield from (Asked(f"What is the default of {p.name}?") for p in parameters if not p.mentions_default)
    for name in absent[:2]:
        yield Asked(f"What is the default of {name}?")
        yield Asked(f"What is the type of {name}?")
    if not re.search(r"rais|error|exception|warn", context, re.IGNORECASE):
        yield Asked(_RAISES)


def _chosen(asked: list[Asked], most: int, rng: np.random.Generator) -> list[Asked]:
    """At most so many of them, drawn, in their order."""
    return [asked[i] for i in sorted(rng.permutation(len(asked))[:most].tolist())]


def _parameters(context: str, start: int, end: int) -> Iterator[Parameter]:
    for match in _PARAMETER.finditer(context, start, end):
        after = _ENTRY_END.search(context, match.end() + 1, end) if match.end() < end else None
        stop = after.start() if after else end
        kind = _TYPE_END.search(context, match.start(2), match.end(2))
        of_type = (match.start(2), kind.start() if kind else match.end(2))
        defaults = list(_DEFAULT.finditer(context, match.start(2), stop))
        default = _trimmed(context, defaults[0]) if len(defaults) == 1 else None
        yield Parameter(
            match[1].strip("*"),
            of_type if 0 < of_type[1] - of_type[0] <= _LONGEST_TYPE else None,
            default,
            "default" in context[match.start() : stop].lower() or "optional" in match[2],
        )


def _trimmed(context: str, match: re.Match[str]) -> tuple[int, int] | None:
    """The place of a default, without the full stop after it."""
    group = next(name for name in "abc" if match[name] is not None)
    start, end = match.span(group)
    while end > start and context[end - 1] in ".,;: ":
        end -= 1
    return (start, end) if end > start else None
