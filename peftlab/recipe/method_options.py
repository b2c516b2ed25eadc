"""The options of an adapter method that a recipe gives by PEFT's own names: which exist, and of which type they are."""

from __future__ import annotations

import ast
import json
import typing
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import TypeAdapter, ValidationError

from peftlab.specs.method_spec import MethodSpec
from peftlab.specs.methods import METHODS
from peftlab.specs.peft_methods import peft_version


class _AnyText:
    """Stands for ``Literal``: PEFT's annotations leave out values that it takes, such as ``lora_ga``, and PEFT checks them."""

    def __getitem__(self, values: Any) -> Any:
        return str


# PEFT's names for the keys that choose modules -> ours.
_NAMES_OF_PLACES = {"layers_to_transform": "layers", "exclude_modules": "freeze"}
_OF_PLACES = {theirs: f"adapter.{ours}" for theirs, ours in _NAMES_OF_PLACES.items()}
_TYPES = {name: getattr(typing, name) for name in ("Any", "Optional", "Union")} | {"Literal": _AnyText()}


def option_problems(method: str, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and message for each of the ``given`` options that ``method`` does not have, of another type, or without effect."""
    spec = METHODS[method]
    for name, value in given.items():
        needed, wanted = spec.needed.get(name, (None, None))
        if name not in spec.options:
            yield name, _unknown(spec, name)
        elif name in spec.refused_options:
            yield name, f"cannot be set: {spec.refused_options[name]}; remove it"
        elif (expected := _type_problem(spec.options[name].kind, value)) is not None:
            yield name, expected
        elif value is not None and needed is not None and given.get(needed) != wanted:
            yield name, f"has no effect without adapter.{needed}: {wanted}; set that, or remove it"


def settings_for(section: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The settings of a section ``adapter`` that mean the same for another method: where, what is trained in full, dropout. A
    rank or an alpha of one method says nothing about another, and patterns have those too; ``lora_only`` is no bias of OFT."""
    spec = METHODS[method]
    former = section.get("method", "lora")
    if former == method:
        return {k: v for k, v in section.items() if k in ("method", *spec.keys, *spec.places, *spec.options)}
    kept = {*spec.keys, *spec.places} - {"rank", "alpha", "patterns"}
    if str(section.get("bias")).endswith("_only"):
        kept -= {"bias"}
    if former in METHODS and METHODS[former].targets != spec.targets:
        kept -= {"targets"}  # norms are no linear layers
    return {k: v for k, v in section.items() if k in kept}


def add_method_options(schema: dict[str, Any]) -> None:
    """Adds the options of all methods to the JSON Schema of the section, so that an editor completes them."""
    for spec in METHODS.values():
        for name, option in spec.options.items():
            text = f"{spec.name}: {option.help}" if option.help else f"an option of {spec.name}"
            known = schema["properties"].setdefault(name, {"title": name, "description": text})
            if not known["description"].startswith(text):
                known["description"] += f" | {text}"
    schema["additionalProperties"] = False


def _unknown(spec: MethodSpec, name: str) -> str:
    usable = ["method", *spec.keys, *spec.places, *(("start", "beside") if spec.adapts else ())]
    renamed = {theirs: ours for ours, theirs in spec.keys.items()}
    renamed |= {theirs: ours for theirs, ours in _NAMES_OF_PLACES.items() if ours in usable}
    if name in renamed:
        return f"unknown key; did you mean `{renamed[name]}`?"
    if spec.adapts and name in METHODS and name != spec.name:
        return f"unknown key; did you mean `method: {name}`?"
    if name == "total_step":
        return "is the number of steps of the run; remove it"
    others = [m.name for m in METHODS.values() if name in m.options and name not in m.refused_options]
    if others:
        more = f" and {len(others) - 4} others" if len(others) > 4 else ""
        return f"is an option of {', '.join(others[:4])}{more}, not of {spec.name}; remove it"
    if (elsewhere := _elsewhere(name)) is not None:
        key = elsewhere.removeprefix("adapter.")
        if key != elsewhere and key not in usable:
            return f"unknown key; {spec.name} has no {key}; remove it"
        return f"unknown key; did you mean `{key}`?"
    near = get_close_matches(name, [*usable, *spec.options], n=1)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    return (
        f"unknown key{hint} (keys for {spec.name}: {', '.join(usable[1:])}; "
        f"options{f' of PEFT {peft_version()}' if spec.peft else ''}: {', '.join(spec.options) or 'none'})"
    )


def _elsewhere(name: str) -> str | None:
    """The dotted key that is called ``name`` in another section, in another project, or in PEFT; None if there is none."""
    from peftlab.recipe.keys import foreign_key, join, known_keys  # it reads the schema, which imports this module

    sections = (section for section, names in known_keys().items() if name in names)
    return foreign_key(name) or next((join(section, name) for section in sections), None) or _OF_PLACES.get(name)


def _type_problem(kind: str, value: Any) -> str | None:
    """What was expected, if ``value`` does not fit an annotation of PEFT; its own classes take mappings."""
    from peftlab.recipe.problems import shown  # it reads the schema, which imports this module

    try:
        annotation = eval(kind, {"__builtins__": {}}, _Names())
        # As JSON, because YAML's lists also stand for tuples; strict, because PEFT would get the text "7" and not a number.
        TypeAdapter(annotation).validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return f"expected {_words(kind)}, found {shown(value)}"
    except (SyntaxError, TypeError):
        return None
    return None


class _Names(dict[str, Any]):
    """Names in an annotation: those of ``typing``, plain types, and anything else for PEFT's classes."""

    def __missing__(self, name: str) -> Any:
        plain = {"int": int, "float": float, "bool": bool, "str": str, "list": list, "dict": dict, "tuple": tuple}
        return _TYPES.get(name) or plain.get(name, dict)


# How a message calls the types in PEFT's annotations: one, and several.
_WORDS = {
    "int": ("whole number", "whole numbers"),
    "float": ("number", "numbers"),
    "bool": ("true or false", "true or false"),
    "str": ("text", "texts"),
    "list": ("list", "lists"),
    "tuple": ("list", "lists"),
    "Any": ("value", "values"),
}


def _words(kind: str) -> str:
    """An annotation of PEFT in plain words."""
    return " or ".join(dict.fromkeys(_alternatives(ast.parse(kind, mode="eval").body, several=False)))


def _alternatives(node: ast.expr, *, several: bool) -> Iterator[str]:
    if isinstance(node, ast.BinOp):
        yield from (text for side in (node.left, node.right) for text in _alternatives(side, several=several))
    elif isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        kind = ast.unparse(node.value)
        if kind == "Literal":
            yield from (ast.unparse(value) for value in inner)
        elif kind in ("Optional", "Union"):
            yield from (text for part in inner for text in _alternatives(part, several=several))
        else:
            of = [" or ".join(_alternatives(part, several=True)) for part in inner]
            name = _WORDS.get(kind, ("mapping", "mappings"))[several]
            yield f"{name} of {' to '.join(of) if kind == 'dict' else ' or '.join(dict.fromkeys(of))}"
    elif not (isinstance(node, ast.Constant) and node.value is None):
        yield _WORDS.get(ast.unparse(node), ("mapping", "mappings"))[several]
