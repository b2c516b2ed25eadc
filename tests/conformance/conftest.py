"""Options of ``make conformance``: ARGS='--write-results --peft-checkout ../peft'."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--write-results", action="store_true", help="write the results into bench/results/")
    group.addoption("--peft-checkout", type=Path, metavar="DIR", help="sources of huggingface/peft, with their tests")
    group.addoption("--peft-tests", nargs="+", metavar="FILE", help="files of its tests (default: those of LoRA)")
    group.addoption("--peft-seeds", type=int, nargs="+", default=[0], metavar="SEED", help="run its tests from each")


@pytest.fixture(scope="session")
def write_results(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--write-results", default=False))
