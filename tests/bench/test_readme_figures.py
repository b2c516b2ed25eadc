"""Every table of figures in README.md, docs/ and bench/README.md is what its script makes of the JSON in bench/results."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ("peers", "distillation", "cpu_path", "cpu_kd", "linear_losses", "loss_curves", "call_overhead")


def section(text: str, name: str) -> str:
    return text.partition(f"<!-- {name} -->\n")[2].partition(f"\n<!-- /{name} -->")[0]


def remade(script: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str, str]]:
    """(file, marker, table) of ``python bench/SCRIPT.py --table``; nothing is written."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    found: list[tuple[Path, str, str]] = []
    report, module = importlib.import_module("_report"), importlib.import_module(script)
    monkeypatch.setattr(report, "replace_section", lambda *arguments: found.append(arguments))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--table"])
    assert not module.main()
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_tables_are_made_of_the_results(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = remade(script, monkeypatch)
    assert found
    for path, name, table in found:
        assert table == section(path.read_text(encoding="utf-8"), name), f"python bench/{script}.py --table"
        assert table.count("|") > 20


def test_no_table_is_without_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    remakes = {name for script in SCRIPTS for _, name, _ in remade(script, monkeypatch)}
    others = {"kd_conformance", "gpu_check"}  # written with the measurement; tests/bench/test_gpu_claims.py
    for path in (ROOT / "README.md", ROOT / "bench" / "README.md", *(ROOT / "docs").glob("*.md")):
        marks = {line[5:-4] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("<!-- /")}
        assert {mark.lstrip("/") for mark in marks} <= remakes | others


def test_a_changed_figure_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = remade("distillation", monkeypatch)
    assert {path.name for path, _, _ in tables} == {"README.md", "distillation.md"}
    for path, name, table in tables:
        text = path.read_text(encoding="utf-8")
        assert table != section(text.replace("0.820", "0.920"), name)
