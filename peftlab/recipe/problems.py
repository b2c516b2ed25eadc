"""Pydantic's errors in plain English: all of a recipe's problems in one ``RecipeError``, each with its line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from peftlab.errors import RecipeError
from peftlab.recipe.keys import Spec, did_you_mean, is_section, known_keys, names_in, spec_at
from peftlab.recipe.rules import BrokenRules
from peftlab.recipe.yaml_lines import Lines, Problem

# Line number of a command-line override: larger than any, so that these problems are listed last.
COMMAND_LINE = 1 << 30

KeyPath = tuple[str | int, ...]
_SINGULAR = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
_PLURAL = {str: "texts", int: "whole numbers", float: "numbers"}


def report(problems: Sequence[Problem], lines: Lines, label: str) -> RecipeError:
    """One error that lists every problem, in the order of the file."""
    placed = [(p.line if p.line is not None else _line_of(p.key, lines), p) for p in problems]
    placed.sort(key=lambda pair: (pair[0] or 0, pair[1].key))
    places = [_place(line) for line, _ in placed]
    width = max(map(len, places))
    rows = [
        f"  {f'{place:<{width}}  ' if width else ''}{f'{p.key}: ' if p.key else ''}{p.message}"
        for place, (_, p) in zip(places, placed, strict=True)
    ]
    count = "1 problem" if len(rows) == 1 else f"{len(rows)} problems"
    return RecipeError("\n".join([f"{count} in {label}:", *rows]))


def translate(error: ValidationError, data: dict[str, Any]) -> list[Problem]:
    """One problem per key, however many union branches pydantic tried."""
    problems: dict[str, Problem] = {}
    mistyped: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        path = _path(detail, data)
        key = ".".join(map(str, path))
        if detail["type"] == "extra_forbidden" or detail["loc"][-1:] == ("[key]",):
            problems[key] = Problem(key, _unknown(path))
        elif detail["type"] == "missing" and isinstance(detail["loc"][-1], str):
            problems[key] = Problem(key, _missing(path))
        elif isinstance(broken := detail.get("ctx", {}).get("error"), BrokenRules):
            for problem in _from_rules(broken, data):
                problems.setdefault(problem.key or problem.message, problem)
        elif detail["type"] == "value_error":
            problems.update({p.key: p for p in _from_validator(key, detail["msg"], data)})
        else:
            mistyped[key] = Problem(key, _mistyped(path, _value_at(path, data)))
    return [*problems.values(), *_deepest(mistyped, problems)]


def misread_numbers(data: Any, path: KeyPath = ()) -> list[Problem]:
    """Values that pydantic would accept as a number by mistake: ``save_every: true``, ``lr: .inf``."""
    if isinstance(data, dict):
        return [problem for name, value in data.items() for problem in misread_numbers(value, (*path, name))]
    if isinstance(data, list):
        return [problem for index, value in enumerate(data) for problem in misread_numbers(value, (*path, index))]
    spec = spec_at(path)
    kinds = _members(spec.kind) if spec else []
    wrong = bool not in kinds if isinstance(data, bool) else isinstance(data, float) and not math.isfinite(data)
    if wrong and not {int, float}.isdisjoint(kinds):
        return [Problem(".".join(map(str, path)), _mistyped(path, data))]
    return []


def _deepest(mistyped: dict[str, Problem], problems: dict[str, Problem]) -> list[Problem]:
    """Skips problems that a more precise one explains: a union also reports the key that holds the wrong item."""
    known = [*mistyped, *problems]
    return [p for key, p in mistyped.items() if key not in problems and not any(k.startswith(f"{key}.") for k in known)]


def _path(detail: ErrorDetails, data: Any) -> KeyPath:
    """The location without the names of union branches, which pydantic adds to it."""
    path: list[str | int] = []
    loc = detail["loc"]
    for index, part in enumerate(loc):
        if part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data)):
            data = data[part]
        elif not (detail["type"] == "missing" and isinstance(part, str) and index == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)


def _value_at(path: KeyPath, data: Any) -> Any:
    for part in path:
        data = data[part]
    return data


def _unknown(path: KeyPath) -> str:
    section, name = ".".join(map(str, path[:-1])), str(path[-1])
    spec = spec_at(path[:-1])
    names = ", ".join(names_in(spec.kind) if spec else ())
    listed = f"keys of {section}: {names}" if section else f"top-level keys: {names}"
    return f"unknown key{did_you_mean(section, name)} ({listed})"


def _missing(path: KeyPath) -> str:
    spec = spec_at(path)
    assert spec is not None
    expected = " section" if is_section(spec.kind) else f"; expected {_describe(spec)}"
    return f"missing{expected} ({spec.description})"


def _from_rules(error: BrokenRules, data: dict[str, Any]) -> Iterator[Problem]:
    """A problem at each key that the recipe sets, else one without a place."""
    for keys, message in error.problems:
        if all(_is_given(key, data) for key in keys):
            yield from (Problem(key, message) for key in keys)
        else:
            yield Problem("", f"{', '.join(keys)}: {message}")


def _is_given(key: str, data: Any) -> bool:
    for part in key.split("."):
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True


def _from_validator(section: str, message: str, data: dict[str, Any]) -> list[Problem]:
    """Problems of a model validator, placed at the keys that its message starts with, if any."""
    message = message.removeprefix("Value error, ")
    named, colon, rest = message.partition(": ")
    if not colon or not re.fullmatch(r"[\w.]+(?:, [\w.]+)*", named):
        return [Problem(section, message)]
    keys = [_given_key(section, name, data) for name in named.split(", ")]
    return [Problem(key, rest) for key in keys if key] if all(keys) else [Problem(section, message)]


def _given_key(section: str, name: str, data: dict[str, Any]) -> str | None:
    """Dotted key of a name in a message of ``section``'s validator, if exactly one such key is in the recipe."""
    inner, _, last = name.rpartition(".")
    sections = {section, inner} if inner else {s for s in known_keys() if s == section or s.startswith(section)}
    given = []
    for candidate in sorted(sections):
        values = data
        for part in candidate.split(".") if candidate else []:
            values = values.get(part) or {} if isinstance(values, dict) else {}
        if isinstance(values, dict) and last in values:
            given.append(f"{candidate}.{last}" if candidate else last)
    return given[0] if len(given) == 1 else None


def _mistyped(path: KeyPath, value: Any) -> str:
    spec = spec_at(path) or Spec(Any)
    kinds = _members(spec.kind)
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    hint = ""
    if isinstance(value, str):
        near = get_close_matches(value.lower(), choices, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
    elif str in kinds and isinstance(value, int | float):
        hint = "; put it in quotes"
    elif str in kinds and isinstance(value, dict):
        hint = "; text with braces or a colon needs quotes"
    return f"expected {_describe(spec)}, found {shown(value)}{hint}"


def _members(kind: Any) -> list[Any]:
    if get_origin(kind) in (Union, UnionType):
        return [arg for arg in get_args(kind) if arg is not type(None)]
    return [kind]


def _describe(spec: Spec) -> str:
    kinds = _members(spec.kind)
    if len(kinds) > 1:
        return " or ".join(_describe(Spec(kind, spec.bounds)).removeprefix("one of ") for kind in kinds)
    kind, args = kinds[0], get_args(kinds[0])
    if is_section(kind):
        return f"a section with the keys {', '.join(names_in(kind))}"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, args))}" if len(args) > 1 else str(args[0])
    if get_origin(kind) is list:
        least = next((f", at least {m.min_length}" for m in spec.bounds if hasattr(m, "min_length")), "")
        return f"a list of {_plural(args[0])}{least}"
    if get_origin(kind) is tuple:
        return f"a list of {len(args)} {_plural(args[0])}"
    if get_origin(kind) is dict:
        names = f"with the keys {', '.join(names_in(kind))}" if names_in(kind) else f"of names to {_plural(args[1])}"
        return f"a mapping {names}"
    return _SINGULAR.get(kind, "a value") + _limits(spec.bounds)


def _plural(kind: Any) -> str:
    return ", ".join(map(str, get_args(kind))) if get_origin(kind) is Literal else _PLURAL.get(kind, "values")


def _limits(bounds: Sequence[Any]) -> str:
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    limits = [f"{word} {getattr(m, name)}" for m in bounds for name, word in words.items() if hasattr(m, name)]
    return f" {' and '.join(limits)}" if limits else ""


def shown(value: Any) -> str:
    """A value in the words of a message."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list) and not value:
        return "an empty list"
    text = repr(value)
    short = text if len(text) <= 60 else f"{text[:57]}..."
    return f"the list {short}" if isinstance(value, list) else short


def _line_of(key: str, lines: Lines) -> int | None:
    """Line of the key or of its nearest parent; line 1 means the whole recipe."""
    while key:
        if key in lines:
            return lines[key]
        key = key.rpartition(".")[0]
    return 1 if any(line != COMMAND_LINE for line in lines.values()) else None


def _place(line: int | None) -> str:
    if line is None:
        return ""
    return "command line" if line == COMMAND_LINE else f"line {line}"
