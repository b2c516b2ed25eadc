"""The adapter methods and options of the installed PEFT, read from its source: importing PEFT would import torch."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_REGISTERS = re.compile(r"register_peft_method\(([^)]*)\)")
_NAME, _CONFIG = re.compile(r"\bname=\"(\w+)\""), re.compile(r"\bconfig_cls=(\w+)")
# Fields of PEFT's base configuration say what a file is, not how a method works.
_BASE = "PeftConfig"
_PROMPTS = "PromptLearningConfig"


class Computed:
    """The default of an option that PEFT computes."""

    def __repr__(self) -> str:
        return "computed"


COMPUTED = Computed()


@dataclass(frozen=True)
class PeftOption:
    """A field of a configuration class. Attributes: kind: its annotation, as in PEFT's source. help: PEFT's description."""

    name: str
    kind: str
    default: Any
    help: str


@dataclass(frozen=True)
class PeftMethod:
    """A method that PEFT registers.

    Attributes:
        config: name of its configuration class, in ``peft``. options: its fields by name, without those of all methods.
        summary: the first sentence of its description. prompts: whether it adds virtual tokens to the input.
    """

    name: str
    config: str
    options: Mapping[str, PeftOption]
    summary: str
    prompts: bool


@functools.cache
def peft_version() -> str:
    try:
        return importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


@functools.cache
def peft_method_names() -> tuple[str, ...]:
    """Names of the methods that the installed PEFT registers, sorted; empty without PEFT."""
    return tuple(sorted(_registered()))


@functools.cache
def peft_method(name: str) -> PeftMethod:
    """The method ``name``. Raises: KeyError if PEFT does not register it."""
    file, config = _registered()[name]
    classes = [(file, config), *_ancestors(file, config)]
    options: dict[str, PeftOption] = {}
    for path, class_name in reversed(classes):
        options |= {option.name: option for option in _fields(_class_in(path, class_name))}
    text = ast.get_docstring(_class_in(*classes[0])) or ""
    return PeftMethod(name, config, options, _first_sentence(text), any(c == _PROMPTS for _, c in classes))


@functools.cache
def _registered() -> dict[str, tuple[Path, str]]:
    """Name -> the package that registers it, and its configuration class."""
    spec = importlib.util.find_spec("peft")
    if spec is None or spec.origin is None:
        return {}
    found = {}
    for file in sorted(Path(spec.origin).parent.glob("tuners/*/__init__.py")):
        for call in _REGISTERS.findall(file.read_text(encoding="utf-8")):
            name, config = _NAME.search(call), _CONFIG.search(call)
            if name and config:
                found[name[1]] = (file, config[1])
    return found


def _ancestors(file: Path, name: str) -> Iterator[tuple[Path, str]]:
    """File and name of the classes that a configuration class inherits from, the nearest first."""
    home = _home(file, name)
    for base in _class_in(file, name).bases:
        if isinstance(base, ast.Name) and base.id != _BASE and (above := _home(home, base.id)).name != "":
            yield above, base.id
            yield from _ancestors(above, base.id)


@functools.cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _class_in(file: Path, name: str) -> ast.ClassDef:
    tree = _parsed(_home(file, name))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _home(file: Path, name: str) -> Path:
    """The file that defines a class which ``file`` defines or imports; an empty path for a class of another package."""
    for node in _parsed(file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return file
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            module = _module_file(file, node)
            return Path() if module is None else _home(module, name)
    return Path()


def _module_file(file: Path, node: ast.ImportFrom) -> Path | None:
    """The file of the module that ``node`` in ``file`` imports from; None outside PEFT."""
    parts = (node.module or "").split(".")
    if node.level:
        folder = file.parents[node.level - 1]
    elif parts[0] == "peft":
        folder, parts = next(p for p in file.parents if p.name == "peft"), parts[1:]
    else:
        return None
    path = folder.joinpath(*filter(None, parts))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _fields(node: ast.ClassDef) -> Iterator[PeftOption]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            default, text = _default(line.value)
            yield PeftOption(line.target.id, ast.unparse(line.annotation), default, text)


def _default(value: ast.expr | None) -> tuple[Any, str]:
    """The default in the source of a dataclass field, and its help."""
    if not (isinstance(value, ast.Call) and getattr(value.func, "id", "") == "field"):
        return _literal(value), ""
    words = {word.arg: word.value for word in value.keywords}
    metadata = _literal(words.get("metadata"))
    text = " ".join(str(metadata.get("help", "")).split()) if isinstance(metadata, dict) else ""
    return _literal(words.get("default")), text


def _literal(value: ast.expr | None) -> Any:
    if value is None:
        return COMPUTED
    try:
        return ast.literal_eval(value)
    except ValueError:
        return COMPUTED


def _first_sentence(text: str) -> str:
    start = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[a-z)])\. ", start)[0].rstrip(".")
