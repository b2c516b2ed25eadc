"""Keys that exclude each other. An override on the command line replaces the alternatives that the recipe's file sets."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from peftlab.recipe.keys import default_at

# Per line the keys that exclude those of the other lines of the group; the schema refuses a file that sets two lines.
ALTERNATIVES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("data.eval",), ("data.eval_rows",), ("data.eval_fraction",)),
    (("data.bins",), ("data.label_names",)),
    (
        ("data.template.prompt", "data.template.completion"),
        ("data.template.system", "data.template.user", "data.template.assistant"),
    ),
    (("train.epochs",), ("train.max_steps",)),
    (("train.batch_size",), ("train.batch_tokens",)),
    (("distill.teacher",), ("distill.teachers",)),
    (("distill.student_init.layers",), ("distill.student_init.num_layers",)),
)


def replace_alternatives(data: dict[str, Any], given: Collection[str]) -> dict[str, list[str]]:
    """Removes from ``data`` the keys that exclude one of the ``given`` keys. Returns per given key the settings it replaced.

    Keys that are all given stay: the schema reports that they exclude each other. So does a key that is given as null or
    empty, which sets nothing.

    Args: data: the settings of a recipe. given: the dotted keys that the command line sets.
    """
    replaced: dict[str, list[str]] = {}
    for group in ALTERNATIVES:
        for keys in group:
            chosen = [key for key in keys if key in given and _value(data, key) not in (None, [], {})]
            if not chosen:
                continue
            others = [key for other in group if other != keys for key in other if key not in given]
            names = [key for key in others if _value(data, key) not in (None, [], {}, default_at(key))]
            for key in others:
                _remove(data, key)
            if names:
                replaced[chosen[0]] = names
    return replaced


def _value(data: dict[str, Any], key: str) -> Any:
    node: Any = data
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _remove(data: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    section = _value(data, ".".join(parents))
    if isinstance(section, dict):
        section.pop(last, None)
