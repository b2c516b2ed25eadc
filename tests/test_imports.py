"""Who may import whom (DESIGN section 4), read from the syntax trees without importing anything."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The left unit may import the right ones. "<root>" is peftlab/__init__.py; "recipe.shipped" allows only that module.
_GROUND = {"errors", "specs", "paths", "ops", "formatting", "ranks"}
_COMPONENTS = {"data", "models", "tasks", "evaluation", "adapters", "distillation", "measuring", "training"}
_ASSEMBLED = {*_GROUND, *_COMPONENTS, "recipe", "runs", "assembly"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "specs": {"errors"},
    "paths": {"errors"},
    "ops": {"errors"},
    "formatting": {"specs"},
    "ranks": {"errors"},
    "recipe": {"errors", "specs"},
    "data": {"errors", "specs", "paths", "formatting"},
    "models": {"errors", "specs", "paths"},
    "adapters": {"errors", "specs", "ops"},
    "distillation": {"errors", "specs", "ops"},
    "measuring": {"errors", "specs", "paths", "ops", "models"},
    "tasks": {"errors", "specs", "data"},
    "evaluation": {"errors", "specs", "data", "measuring", "ranks"},
    "training": {*_GROUND, *_COMPONENTS} - {"training"},
    "runs": {"errors", "recipe", "training"},
    "assembly": _ASSEMBLED - {"assembly"},
    "teaching": _ASSEMBLED,
    "bench": _ASSEMBLED,
    "experiments": {*_ASSEMBLED, "teaching"},
    "reworking": _ASSEMBLED,
    "planning": _ASSEMBLED,
    "diagnosing": _GROUND | {"models", "measuring"},
    "api": {*_ASSEMBLED, "teaching", "bench", "experiments", "reworking", "diagnosing", "planning"},
    "cli": {
        "errors",
        "specs",
        "formatting",
        "ranks",
        "recipe.shipped",
        "recipe.load",
        "api",
        "data.ledger_text",
        "bench.captions",
        "runs",
    },
    "__main__": {"cli"},
    "<root>": {"api", "errors", "recipe", "runs"},
}
# Only the version may be imported from the package itself. Its other names lead to api and would form a cycle.
FROM_ROOT_FOR_ALL = "peftlab.__version__"
FROM_ROOT = {"cli", "__main__"}
# doctor only checks whether triton imports.
MAY_TRY_TRITON = {"diagnosing"}
HEAVY_FOR_CLI = {"torch", "transformers"}
HEAVY = HEAVY_FOR_CLI | {"numpy", "pydantic", "peft", "datasets", "evaluate"}


_MODULE = re.compile(r"peftlab(\.\w+)+(:\w+)?")


@dataclass(frozen=True)
class Import:
    name: str  # absolute dotted name; the imported name is the last part of `from module import name`
    line: int
    at_module_level: bool


def imports_of(path: Path, package: str) -> Iterator[Import]:
    """Every import statement of a file, also inside functions and under TYPE_CHECKING, and importlib with a literal."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        level = id(node) not in inside
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, level) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (Import(f"{module}.{alias.name}", node.lineno, level) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _MODULE.fullmatch(node.value):
            # A string that names one of our modules is a hidden import.
            if node.value.split(".")[1] in ALLOWED:
                yield Import(node.value.partition(":")[0], node.lineno, level)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in {"importlib.import_module", "import_module", "__import__"}
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            name = node.args[0].value
            yield Import(f"{package}{name}" if name.startswith(".") else name, node.lineno, level)


def _module_part(name: str, root: Path) -> str:
    """``name`` without its last part if that part is an object of a module, not a module."""
    path = root / Path(*name.split("."))
    is_module = path.with_suffix(".py").exists() or path.is_dir()
    return name if is_module or "." not in name else name.rpartition(".")[0]


def _peftlab_violation(unit: str, name: str, root: Path) -> str | None:
    if name == FROM_ROOT_FOR_ALL:
        return None
    module = _module_part(name, root)
    if module == "peftlab":
        return None if unit in FROM_ROOT else f"{unit} takes {name} from the package itself: import where it is defined"
    target = module.removeprefix("peftlab.")
    if target.split(".")[0] == unit:
        return None
    if any(target == ok or target.startswith(f"{ok}.") for ok in ALLOWED[unit]):
        return None
    return f"{unit} must not import {module}"


def violations(root: Path) -> list[str]:
    """One line, ``file:line: what is wrong``, for each import under ``root`` that breaks the rules."""
    lines: list[str] = []
    for path in sorted(
        p for folder in ("peftlab", "kernels", "recipes", "tests", "bench") for p in root.glob(f"{folder}/**/*.py")
    ):
        relative = path.relative_to(root)
        owner = relative.parts[0]
        package = ".".join(relative.parent.parts).removeprefix("kernels.")
        unit = relative.parts[1].removesuffix(".py") if owner == "peftlab" else ""
        unit = "<root>" if unit == "__init__" else unit
        if owner == "peftlab" and unit not in ALLOWED:
            lines.append(
                f"{relative.as_posix()}:1: {unit} is not in ALLOWED of tests/test_imports.py; say what it may import"
            )
            continue
        for item in imports_of(path, package):
            top = item.name.split(".")[0]
            problem: str | None = None
            if top == "kernels":
                problem = "nobody imports the top-level name kernels"
            elif top == "triton" and owner in {"peftlab", "recipes"} and unit not in MAY_TRY_TRITON:
                problem = "triton is imported only under kernels/"
            elif top in {"tests", "bench"} and owner != top and (owner, top) != ("tests", "bench"):
                problem = f"nobody imports {top}"
            elif top == "peftlab_kernels" and owner == "peftlab" and unit != "ops":
                problem = "only peftlab/ops.py imports peftlab_kernels"
            elif top == "peftlab" and owner == "kernels":
                problem = "peftlab_kernels never imports peftlab"
            elif top in HEAVY and unit == "specs":
                problem = f"specs import {top}: they are read before anything heavy is"
            elif top in HEAVY_FOR_CLI and unit == "cli" and item.at_module_level:
                problem = f"cli imports {top} at module level: --help would take seconds"
            elif top == "peftlab" and owner == "peftlab":
                problem = _peftlab_violation(unit, item.name, root)
            if problem:
                lines.append(f"{relative.as_posix()}:{item.line}: {problem}")
    return lines


def test_imports_keep_the_rules() -> None:
    broken = violations(ROOT)
    assert not broken, "\n" + "\n".join(broken)


def questions_which_task_it_is(root: Path) -> list[str]:
    """``file:line`` of each comparison of a task with a name outside of specs and tasks."""
    asked = []
    for path in sorted((root / "peftlab").rglob("*.py")):
        if path.relative_to(root).parts[1] in ("specs", "tasks"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                is_task = any(
                    (isinstance(side, ast.Attribute) and side.attr == "task")
                    or (isinstance(side, ast.Subscript | ast.Call) and "'task'" in ast.unparse(side))
                    for side in sides
                )
                names = [side for side in sides if isinstance(side, ast.Constant | ast.Tuple | ast.Set | ast.List)]
                if is_task and names and not (isinstance(names[0], ast.Constant) and names[0].value is None):
                    asked.append(f"{path.relative_to(root).as_posix()}:{node.lineno}")
    return asked


def test_task_names_are_compared_only_in_specs_and_tasks(tmp_path: Path) -> None:
    assert not questions_which_task_it_is(ROOT)
    lines = ["if recipe.task == 'seq_cls': pass", "x = summary.get('task') != 'embedding'", "y = r.task in ('a', 'b')"]
    _plant(tmp_path, {"peftlab/api/a.py": "\n".join(lines) + "\n", "peftlab/tasks/b.py": lines[0] + "\n"})
    assert questions_which_task_it_is(tmp_path) == [f"peftlab/api/a.py:{i}" for i in (1, 2, 3)]


def test_allowed_map_has_no_circle() -> None:
    reached: set[str] = set()
    remaining = {unit: {ok.split(".")[0] for ok in allowed} for unit, allowed in ALLOWED.items()}
    while ready := {unit for unit, needs in remaining.items() if needs <= reached}:
        reached |= ready
        remaining = {unit: needs for unit, needs in remaining.items() if unit not in ready}
    assert not remaining


def _plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_violations_finds_planted_imports(tmp_path: Path) -> None:
    planted = {
        "peftlab/data/a.py": "from peftlab.models import load\n",
        "peftlab/data/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import peftlab.training.loop\n",
        "peftlab/data/c.py": "def f():\n    from ..recipe.schema import Recipe\n    return Recipe\n",
        "peftlab/data/d.py": "import importlib\nx = importlib.import_module('peftlab.tasks')\n",
        "peftlab/training/e.py": "from peftlab import recipe\n",
        "peftlab/training/f.py": "from peftlab import Recipe\n",
        "peftlab/training/ff.py": "import peftlab\n",
        "peftlab/adapters/g.py": "from peftlab.distillation import losses\n",
        "peftlab/distillation/h.py": "from peftlab.adapters import lora\n",
        "peftlab/adapters/i.py": "import peftlab_kernels\n",
        "peftlab/adapters/j.py": "import triton.language as tl\n",
        "peftlab/errors.py": "from peftlab.paths import cache_root\n",
        "peftlab/cli/k.py": "import torch\n",
        "peftlab/cli/l.py": "from peftlab.recipe.schema import Recipe\n",
        "peftlab/cli/m.py": "from peftlab.training import loop\n",
        "peftlab/tasks/n.py": "from tests.helpers import x\n",
        "peftlab/tasks/o.py": "import kernels\n",
        "peftlab/tasks/oo.py": "WORKER = 'peftlab.api.train'\n",
        "peftlab/surprise/p.py": "",
        "peftlab/specs/pp.py": "def f():\n    import torch\n",
        "kernels/peftlab_kernels/q.py": "from peftlab.errors import DataError\n",
        "bench/r.py": "from tests import helpers\n",
        "peftlab/tasks/t.py": "from bench.tables import spread\n",
        "recipes/u.py": "import bench\n",
        "kernels/peftlab_kernels/v.py": "from bench.gpu_check.base import Task\n",
        "tests/s.py": "import kernels.peftlab_kernels\n",
    }
    _plant(tmp_path, {**planted, "peftlab/recipe/__init__.py": ""})
    assert {line.split(":")[0] for line in violations(tmp_path)} == set(planted)


def test_violations_accepts_allowed_imports(tmp_path: Path) -> None:
    allowed = {
        "peftlab/__init__.py": "def __getattr__(name):\n    from peftlab import api\n    return getattr(api, name)\n",
        "peftlab/__main__.py": "from peftlab.cli import main\n",
        "peftlab/api/build.py": "from peftlab import __version__\nfrom peftlab.recipe import load\n",
        "peftlab/cli/__init__.py": "from peftlab import Recipe\nfrom peftlab.recipe.shipped import names\n"
        "def main():\n    import torch\n    from .. import api\n    return torch, api, Recipe, names\n",
        "peftlab/ops.py": "import peftlab_kernels\nfrom .errors import RecipeError\n",
        "peftlab/recipe/shipped.py": "from peftlab.recipe.schema import Recipe\n",
        "peftlab/tasks/base.py": "from peftlab.data import sources\nfrom . import other\n",
        "peftlab/training/loop.py": "import torch\nfrom peftlab.tasks.base import Task\n",
        "kernels/peftlab_kernels/op.py": "import triton\nfrom peftlab_kernels.launch import a\nfrom .launch import b\n",
        "tests/test_x.py": "import peftlab_kernels\nfrom tests.helpers import y\nimport triton\nfrom bench import tables\n",
    }
    _plant(tmp_path, allowed)
    assert violations(tmp_path) == []
