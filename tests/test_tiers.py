"""The rule that derives the tier of a test: planted examples of each tier, and what a guard finds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import peftlab
from peftlab.cli.app import run
from tests import tiers


def _helper() -> None:
    subprocess.run([sys.executable, "--version"], check=True)


class _Base:
    def step(self) -> None:
        peftlab.train("smoke")


class _Lab(_Base):
    pass


def _starts_by_a_helper() -> None:
    _helper()


def _forks() -> None:
    os.fork()


def _trains_by_a_class() -> None:
    _Lab().step()


def _trains_by_an_import_inside() -> None:
    from peftlab.api import distill as distilling

    distilling.distill("smoke")


def _trains_by_the_command_line() -> None:
    assert run(["train", "smoke"]) == 0


def _runs_a_kernel() -> None:
    from peftlab_kernels import nf4_dequant

    nf4_dequant.nf4_dequant(backend="triton")  # type: ignore[call-arg]


def _loads_a_recipe() -> None:
    from peftlab.recipe import load_recipe

    load_recipe("smoke")
    assert run(["recipes"]) == 0
    assert os.getcwd() and sys.executable


@pytest.mark.parametrize(
    ("function", "tier"),
    [
        (_starts_by_a_helper, "process"),
        (_forks, "process"),
        (_trains_by_a_class, "engine"),
        (_trains_by_an_import_inside, "engine"),
        (_trains_by_the_command_line, "engine"),
        (_runs_a_kernel, "engine"),
        (_loads_a_recipe, "unit"),
    ],
)
def test_tier_follows_the_code_that_a_test_reaches(function: Callable[[], None], tier: str) -> None:
    assert tiers._reached(function).tier() == tier


def test_tier_of_every_test_is_one(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        assert sum(item.get_closest_marker(name) is not None for name in tiers.TIERS) == 1, item.nodeid


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tier_depends_on_the_parameters(request: pytest.FixtureRequest, backend: str) -> None:
    assert tiers.tier_of(request.node) == {"torch": "unit", "triton": "engine"}[backend]


def test_tier_of_a_fixture_counts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiers.tier_of(request.node) == "unit"
    monkeypatch.setattr(request.node, "fixturenames", [*request.node.fixturenames, "process"])
    assert tiers.tier_of(request.node) == "process"


def test_long_files_first_orders_files_by_tier() -> None:
    def item(file: str, tier: str) -> Any:
        return SimpleNamespace(
            path=Path(file), iter_markers=lambda: [pytest.mark.slow.mark, getattr(pytest.mark, tier).mark]
        )

    made = [
        item("a", "unit"),
        item("b", "engine"),
        item("c", "unit"),
        item("c", "process"),
        item("b", "unit"),
        item("d", "engine"),
    ]
    assert [str(i.path) for i in tiers.long_files_first(made)] == ["c", "c", "b", "b", "d", "a"]


def test_guard_names_what_a_test_of_a_lower_tier_does() -> None:
    guard = tiers.Guard()
    guard.begin()
    assert not guard.wrong("unit")
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    assert guard.wrong("unit") == ["engine: an optimizer made a step"] and not guard.wrong("engine")
    sys.audit("subprocess.Popen", "/sbin/ldconfig", ["ldconfig", "-p"], None, None)
    assert not guard.wrong("engine")
    subprocess.run([sys.executable, "-c", ""], check=True)
    assert guard.wrong("engine") == ["process: subprocess.Popen"] and not guard.wrong("process")
