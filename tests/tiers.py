"""The tier of a test: ``process`` starts processes, ``engine`` trains or runs Triton's interpreter, ``unit`` does
neither.

It is derived from the code that a test reaches: its own, that of its fixtures, and that of the functions and classes
in tests/ and bench/ which these name. If this code does not show what a test does, the test fails (``Guard``).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parents[1]
FOLLOWED = ("tests", "bench")
TIERS = ("unit", "engine", "process")
OURS = ("peftlab", "peftlab_kernels")
# Modules that start processes, and the functions of `os` that do.
STARTERS = {"subprocess", "multiprocessing", "concurrent.futures", "torch.multiprocessing"}
FORKS = {"fork", "posix_spawn", "system"}
LAUNCHERS = {"launch"}
FORK_EVENTS = {"os.fork", "os.forkpty", "os.posix_spawn"}
# Functions and classes of ours that train, and the verbs of the command line that do.
TRAINERS = {"train", "distill", "teach", "TrainingLoop", "make_optimizer", "run_job"}
OPTIMIZES = {"optim", "step"}
VERBS = {"train", "distill", "teach", "bench"}
COMMAND_LINE = {("peftlab.cli.app", "run"), ("peftlab.cli", "main"), ("peftlab.cli.app", "main")}


class Guard:
    """Notes what a test and its fixtures start, train or interpret while they run."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self._counts_kernels = False
        sys.addaudithook(self._audit)
        register_optimizer_step_post_hook(lambda *_: self.seen.add("engine: an optimizer made a step"))

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        # Libraries start `ldconfig` and similar programs at their first use.
        if event in FORK_EVENTS or (event == "subprocess.Popen" and "python" in str(arguments[:2])):
            self.seen.add(f"process: {event}")

    def begin(self) -> None:
        self.seen.clear()
        interpreter = sys.modules.get("triton.runtime.interpreter")
        if interpreter is not None and not self._counts_kernels:
            self._counts_kernels = True
            launch = interpreter.GridExecutor.__call__

            @functools.wraps(launch)
            def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
                self.seen.add("engine: Triton's interpreter ran a kernel")
                return launch(executor, *args, **kwargs)

            interpreter.GridExecutor.__call__ = counted

    def wrong(self, tier: str) -> list[str]:
        """What the test did and its tier does not allow."""
        return sorted(what for what in self.seen if TIERS.index(what.split(":")[0]) > TIERS.index(tier))


@dataclass
class Uses:
    """What a piece of code names: modules and functions outside of the tests, and its strings."""

    modules: set[str] = field(default_factory=set)
    functions: set[tuple[str, str]] = field(default_factory=set)
    texts: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)

    def add(self, other: Uses) -> None:
        for mine, more in zip(vars(self).values(), vars(other).values(), strict=True):
            mine |= more

    def tier(self) -> str:
        ours = {name for module, name in self.functions if module.split(".")[0] == OURS[0]}
        if self.modules & STARTERS or ("os" in self.modules and self.names & FORKS) or ours & LAUNCHERS:
            return "process"
        if ours & TRAINERS or (self.functions & COMMAND_LINE and self.texts & VERBS) or self.names >= OPTIMIZES:
            return "engine"
        # Modules that are named at run time cannot be found here.
        if "import_module" in self.names:
            return "engine"
        kernels = any(module.split(".")[0] == OURS[1] for module in {m for m, _ in self.functions} | self.modules)
        return "engine" if kernels and "triton" in self.texts else "unit"


def tier_of(item: pytest.Function) -> str:
    if "process" in item.fixturenames:
        return "process"
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    texts = {value for value in parameters if isinstance(value, str)}
    uses, fixtures = Uses(texts=set(texts)), list(item.fixturenames)
    uses.add(_reached(_inner(item.function)))
    for name in fixtures:  # the list grows if a fixture asks for others by name
        for definition in item.session._fixturemanager.getfixturedefs(name, item) or ():
            reached = _reached(_inner(definition.func))
            uses.add(reached)
            fixtures += [n for n in definition.argnames if n not in fixtures]
            if "getfixturevalue" in reached.names:
                fixtures += [n for n in texts | reached.texts if n not in fixtures]
    tiers = {uses.tier(), "engine" if "triton" in texts or "trained" in fixtures else "unit"}
    return max(tiers, key=TIERS.index)


def long_files_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Files with processes come first, then files that train or interpret, then the others. The last file of a worker
    is then a short one."""
    ranks: dict[Path, int] = {}
    for item in items:
        rank = max((TIERS.index(mark.name) for mark in item.iter_markers() if mark.name in TIERS), default=0)
        ranks[item.path] = max(rank, ranks.get(item.path, 0))
    return sorted(items, key=lambda item: -ranks[item.path])


def _inner(function: Any) -> Any:
    """The function that hypothesis runs many times; pytest calls another one."""
    return inspect.unwrap(getattr(getattr(function, "hypothesis", None), "inner_test", function))


@functools.cache
def _reached(function: Any) -> Uses:
    """What ``function`` names, and what the tests' own functions and classes that it names name in turn."""
    uses, seen, left = Uses(), set(), [function]
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        for value in _named(one, uses):
            if isinstance(value, ModuleType):
                uses.modules.add(value.__name__)
            elif isinstance(value, FunctionType | type):
                if _is_followed(value):
                    left.append(value)
                else:
                    uses.functions.add((value.__module__, value.__name__))
    return uses


def _named(one: Any, uses: Uses) -> Iterator[Any]:
    functions = [one]
    if isinstance(one, type):
        classes = [c for c in one.__mro__ if _is_followed(c)]
        functions = [f for c in classes for f in vars(c).values() if isinstance(f, FunctionType)]
    for function in functions:
        names: set[str] = set()
        for code in _codes(function.__code__):
            names |= set(code.co_names)
            uses.texts |= {c for c in code.co_consts if isinstance(c, str) and len(c) < 40}
        uses.names |= names
        cells = [c.cell_contents for c in function.__closure__ or () if _is_set(c)]
        values = [function.__globals__[n] for n in names if n in function.__globals__] + cells
        # Imported inside the function: perhaps not loaded yet, so each name may belong to that module.
        inside = [n for n in names if n.split(".")[0] in (*OURS, *STARTERS) and n not in function.__globals__]
        uses.modules |= set(inside)
        uses.functions |= {(module, n) for module in inside for n in names}
        for value in values:
            yield value
            if isinstance(value, ModuleType) and value.__name__.split(".")[0] in (*OURS, *FOLLOWED):
                yield from (getattr(value, n) for n in names if hasattr(value, n))


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _is_followed(value: Any) -> bool:
    module = sys.modules.get(value.__module__)
    file = getattr(module, "__file__", None)
    return file is not None and any(Path(file).is_relative_to(ROOT / folder) for folder in FOLLOWED)
