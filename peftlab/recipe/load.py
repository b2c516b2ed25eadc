"""Loads a checked ``Recipe`` with line numbers from a YAML file, a shipped recipe's name or a dict, plus overrides."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from peftlab.errors import PeftlabError, RecipeError
from peftlab.recipe.alternatives import replace_alternatives
from peftlab.recipe.distillation import expand_names
from peftlab.recipe.keys import did_you_mean, is_free_mapping, is_section, spec_at
from peftlab.recipe.method_options import settings_for
from peftlab.recipe.problems import COMMAND_LINE, misread_numbers, report, translate
from peftlab.recipe.schema import Recipe
from peftlab.recipe.shipped import nearest_recipes, recipe_file, recipe_names
from peftlab.recipe.start import fill_from_start
from peftlab.recipe.yaml_lines import Lines, Parsed, Problem, parse_yaml
from peftlab.specs.methods import METHODS

# A recipe has a few kilobytes; a larger file is a data or weight file given by mistake.
_MAX_BYTES = 1 << 20

Error = TypeVar("Error", bound=PeftlabError)


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe and where each of its settings came from.

    Attributes:
        name: file stem, shipped name, or the name stored in a lock file.
        path: the file; None for a dict.
        origins: dotted key -> ``recipe.yaml:12`` or ``command line``; a default has none.
        notes: one line per setting of the file that an override replaced; see ``alternatives``.
    """

    recipe: Recipe
    name: str
    path: Path | None = None
    origins: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def derive(self, changes: Mapping[str, Any], *, name: str | None = None) -> LoadedRecipe:
        """The recipe with changed values, checked like any other.

        Args: changes: dotted key -> value. name: name of the new recipe; default: the same.
        Raises: RecipeError that lists every problem with them.
        """
        data = self.recipe.model_dump()
        for key, value in changes.items():
            *sections, last = key.split(".")
            node = data
            for section in sections:
                node = node[section]
            node[last] = value
        try:
            recipe = Recipe.model_validate(data)
        except ValidationError as error:
            raise report(translate(error, data), {}, "the recipe") from error
        return replace(self, recipe=recipe, name=self.name if name is None else name)

    def where(self, key: str) -> str | None:
        """Origin of the key or of its nearest parent; None if neither was given."""
        while key:
            if key in self.origins:
                return self.origins[key]
            key = key.rpartition(".")[0]
        return None

    def locate(self, error: Error) -> Error:
        """The same kind of error with the key and its origin in front of the message; unchanged without a key."""
        if error.key is None or str(error).startswith(f"`{error.key}`"):
            return error
        origin = self.where(error.key)
        place = f" ({origin})" if origin else ""
        return type(error)(f"`{error.key}`{place}: {error}", key=error.key)


@dataclass
class _Source:
    name: str
    label: str
    path: Path | None
    parsed: Parsed


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The checked recipe.

    Args:
        source: path of a YAML file, name of a shipped recipe, or the settings themselves.
        overrides: ``section.key=value``, the value in YAML; applied in order, over the source. One that excludes settings of
            the source, such as data.eval and data.eval_rows, replaces them.

    Raises: RecipeError that lists every problem with its line and the nearest valid key, if any.
    """
    origin = _read(source)
    data, lines = origin.parsed.data, origin.parsed.lines
    expand_names(data, lines)
    problems = list(origin.parsed.problems)
    of_file = dict(section) if isinstance(section := data.get("adapter"), dict) else {}
    for override in overrides:
        problems += _override(data, lines, override)
        expand_names(data, lines)  # an override may set a name again, and the next one a key next to it
    given = {key for key, line in lines.items() if line == COMMAND_LINE}
    replaced = replace_alternatives(data, given) | _of_another_method(data, of_file, given)
    notes = [
        f"{key} on the command line replaces {', '.join(names)} ({_places(names, lines, origin.label)})"
        for key, names in replaced.items()
    ]
    for name in (name for names in replaced.values() for name in names):
        for old in [k for k in lines if k == name or k.startswith(f"{name}.")]:
            del lines[old]
    problems += misread_numbers(data)
    fill_from_start(data)
    recipe = None
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        known = {problem.key for problem in problems}
        problems += [problem for problem in translate(error, data) if problem.key not in known]
    if problems or recipe is None:
        raise report(problems, lines, origin.label)
    stored = (recipe.lock or {}).get("name")
    return LoadedRecipe(
        recipe=recipe,
        name=stored if isinstance(stored, str) else origin.name,
        path=origin.path,
        origins={k: "command line" if n == COMMAND_LINE else f"{origin.label}:{n}" for k, n in lines.items()},
        notes=tuple(notes),
    )


def _of_another_method(data: dict[str, Any], of_file: dict[str, Any], given: Collection[str]) -> dict[str, list[str]]:
    """Removes the file's settings of an adapter method that the command line replaces by another; returns them by its key."""
    section: Any = data.get("adapter")
    method = section.get("method") if isinstance(section, dict) else None
    if "adapter.method" not in given or method not in METHODS or method == of_file.get("method", "lora"):
        return {}
    kept = settings_for(of_file, str(method))
    names = [name for name in of_file if name not in kept and name != "method" and f"adapter.{name}" not in given]
    for name in names:
        section.pop(name, None)
    return {"adapter.method": [f"adapter.{name}" for name in names]} if names else {}


def _places(keys: Sequence[str], lines: Lines, label: str) -> str:
    """``r.yaml:12, 13``; the label alone for keys without a line, as in a dict."""
    numbers = sorted({lines[key] for key in keys if key in lines})
    return f"{label}:{', '.join(map(str, numbers))}" if numbers else label


def _read(source: str | os.PathLike[str] | Mapping[str, Any]) -> _Source:
    if isinstance(source, Mapping):
        return _Source("recipe", "the recipe", None, Parsed(_plain(source)))
    given = os.fspath(source)
    path = Path(given)
    if not os.path.isfile(given) and given in recipe_names():
        file = recipe_file(given)
        path, content = Path(str(file)), file.read_bytes()
    else:
        content = _read_file(given)
    parsed = parse_yaml(_decode(content, path.name), path.name)
    if parsed.data is None and not parsed.problems:
        raise RecipeError(f"{given} is empty; expected sections such as `task:`, `model:` and `data:`")
    if not isinstance(parsed.data, dict):
        kind = "a list" if isinstance(parsed.data, list) else "a single value"
        raise RecipeError(f"{given}: expected sections such as `task:`, `model:` and `data:`, found {kind}")
    return _Source(path.stem, path.name, path, parsed)


def _read_file(given: str) -> bytes:
    if os.path.isdir(given):
        lock = os.path.join(given, "recipe.lock.yaml")
        hint = f"; did you mean {lock}?" if os.path.isfile(lock) else "; give a recipe file inside it"
        raise RecipeError(f"{given} is a folder, expected a recipe file{hint}")
    try:
        with open(given, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        near = nearest_recipes(Path(given).stem)
        raise RecipeError(f"`{given}` is neither a file nor the name of a shipped recipe{near}") from None
    except OSError as error:
        raise RecipeError(f"cannot read {given}: {error.strerror}") from None
    if len(content) > _MAX_BYTES:
        raise RecipeError(f"{given} is larger than 1 MiB: not a recipe; expected a YAML file with settings")
    return content


def _decode(content: bytes, label: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise RecipeError(
            f"{label}, line {line}: not UTF-8 text (byte 0x{content[error.start]:02x}); save the file as UTF-8"
        ) from None


def _plain(value: Any) -> Any:
    """A copy with YAML's types, so that every source is checked in the same way."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _override(data: dict[str, Any], lines: Lines, text: str) -> list[Problem]:
    """Applies one override in place. An unknown key is set too; the schema rejects it like one in the file."""
    key, sign, value = text.partition("=")
    key = key.strip()
    if not (sign and key):
        section, _, name = key.rpartition(".")
        guess = "" if spec_at(key.split(".")) else did_you_mean(section, name)
        return [Problem(text, f"expected section.key=value, such as train.lr=1e-3{guess}", COMMAND_LINE)]
    try:
        parsed = parse_yaml(value, key)
    except RecipeError:
        return [Problem(key, f"{value!r} is not valid YAML; check its brackets and quotes", COMMAND_LINE)]
    *parents, last = _split(key)
    node, path = data, ""
    for part in parents:
        path = f"{path}.{part}" if path else part
        child = node.get(part)
        if not isinstance(child, dict):
            spec = spec_at(path.split("."))
            if child is not None and spec is not None and is_section(spec.kind):
                return []  # the file has no section here, which the schema reports
            lines[path] = lines.get(path, COMMAND_LINE) if child is None else COMMAND_LINE
            child = node[part] = {}
        node = child
    for old in [k for k in lines if k == key or k.startswith(f"{key}.")]:
        del lines[old]
    node[last] = parsed.data
    lines.update({key: COMMAND_LINE} | {f"{key}.{inner}": COMMAND_LINE for inner in parsed.lines})
    return [Problem(f"{key}.{p.key}" if p.key else key, p.message, COMMAND_LINE) for p in parsed.problems]


def _split(key: str) -> list[str]:
    """The parts of a dotted key; inside a free mapping such as ``data.label_names`` the rest is one name."""
    parts = key.split(".")
    for depth in range(1, len(parts)):
        spec = spec_at(parts[:depth])
        if spec is not None and is_free_mapping(spec.kind):
            return [*parts[:depth], ".".join(parts[depth:])]
    return parts
