"""Reads YAML as plain values with the line of every key, and writes it.

The scalars follow the YAML 1.2 core rules, not the 1.1 rules of PyYAML: ``1e-4`` is a number, only ``true`` and
``false`` are booleans (``no``, ``yes``, ``on`` stay text), nothing is a date. Mapping keys are always text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml

from peftlab.errors import RecipeError

Lines: TypeAlias = dict[str, int]

_TAG = "tag:yaml.org,2002:"
_CORE_SCALARS: list[tuple[str, str, list[str]]] = [
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
]


@dataclass(frozen=True)
class Problem:
    """One line of the report: the dotted key (may be empty) and what is wrong with it."""

    key: str
    message: str
    line: int | None = None


@dataclass
class Parsed:
    """Plain values, the line of each dotted key (list items too: ``eval.choices.0``), and the problems."""

    data: Any = None
    lines: Lines = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - replaces the YAML 1.1 rules of the parent


class _Dumper(yaml.SafeDumper):
    """Applies the YAML 1.1 rules as well as the 1.2 rules, so that text which is special under either is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Double quotes escape; PyYAML's other styles write NEL and U+2028 raw, which read back as a space.
        return self.represent_scalar(_TAG + "str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)
for _kind, _pattern, _first in _CORE_SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _kind, re.compile(_pattern), _first)


def parse_yaml(text: str, label: str) -> Parsed:
    """Values of one YAML document; ``label`` names the file in messages.

    Raises: RecipeError with line and column if the text is not YAML. Duplicate keys, aliases and unknown tags are
    collected in ``problems``, to be reported together with the errors of the schema.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(_syntax_message(error, text, label)) from None
    except RecursionError:
        raise RecipeError(f"{label}: nested too deeply") from None
    parsed = Parsed()
    if root is not None:
        parsed.data = _Reader(parsed).value(root, "")
    return parsed


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML text that ``parse_yaml`` reads back as the same values, keys in the given order."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _syntax_message(error: yaml.YAMLError, text: str, label: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and (error.problem_mark or error.context_mark):
        mark = error.problem_mark or error.context_mark
        assert mark is not None
        line, column, reason = mark.line, mark.column, error.problem or error.context
    else:
        before = text[: getattr(error, "position", 0)]
        line, column = before.count("\n"), len(before) - before.rfind("\n") - 1
        reason = getattr(error, "reason", str(error))
    source = (text.splitlines() or [""])[min(line, len(text.splitlines()) - 1)]
    hint = "; indent with spaces, not tabs" if re.match(r"\s*\t", source) else ""
    return f"{label}, line {line + 1}, column {column + 1}: not valid YAML: {reason}{hint}\n    {source.strip()}"


class _Reader:
    """Builds values from composed nodes and fills in the lines and problems of one ``Parsed``."""

    def __init__(self, parsed: Parsed) -> None:
        self.parsed = parsed
        self.seen: set[int] = set()

    def value(self, node: yaml.Node, key: str) -> Any:
        # Rejecting aliases excludes recursion, exponential expansion, and keys with a line elsewhere.
        if id(node) in self.seen:
            return self.problem(node, key, "YAML aliases (*name) are not supported; write the value out")
        self.seen.add(id(node))
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self.mapping(node, key)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.item(child, f"{key}.{index}") for index, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, key)
        return self.problem(node, key, f"the YAML tag {_short(node.tag)} is not supported; write a plain value")

    def item(self, node: yaml.Node, key: str) -> Any:
        self.parsed.lines[key] = node.start_mark.line + 1
        return self.value(node, key)

    def mapping(self, node: yaml.MappingNode, prefix: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                self.problem(name_node, prefix, "a key must be a plain word; text with braces needs quotes")
                continue
            name, line = str(name_node.value), name_node.start_mark.line + 1
            key = f"{prefix}.{name}" if prefix else name
            if name in values:
                self.problem(name_node, key, f"duplicate key, on line {self.parsed.lines[key]} and on line {line}")
                continue
            self.parsed.lines[key] = line
            values[name] = self.value(value_node, key)
        return values

    def scalar(self, node: yaml.ScalarNode, key: str) -> Any:
        text: str = node.value
        kind = node.tag.removeprefix(_TAG)
        try:
            if kind == "str":
                return text
            if kind == "null":
                return None
            if kind == "bool" and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if kind == "int":
                base = {"0o": 8, "0x": 16}.get(text[:2], 10)
                return int(text, base)
            if kind == "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            return self.problem(node, key, f"{text[:40]!r} is not a number")
        return self.problem(node, key, f"the YAML tag {_short(node.tag)} is not supported; write a plain value")

    def problem(self, node: yaml.Node, key: str, message: str) -> None:
        self.parsed.problems.append(Problem(key, message, node.start_mark.line + 1))


def _short(tag: str) -> str:
    return tag.replace(_TAG, "!!")
