"""Every table of figures in README.md and bench/README.md is what its script makes of the JSON in bench/results."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import report
from bench.peers import __main__ as main_of_peers
from bench.peers import distillation as peers_distillation
from bench.studies import call_overhead, cpu_path, distillation, linear_losses, loss_curves

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAMS = {
    "peers": main_of_peers,
    "peers.distillation": peers_distillation,
    **{
        f"studies.{m.__name__.rpartition('.')[2]}": m
        for m in (call_overhead, cpu_path, distillation, linear_losses, loss_curves)
    },
}


def section(text: str, name: str) -> str:
    return text.partition(f"<!-- {name} -->\n")[2].partition(f"\n<!-- /{name} -->")[0]


def remade(program: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str, str]]:
    """(file, marker, table) of ``python -m bench.PROGRAM --table``; nothing is written."""
    found: list[tuple[Path, str, str]] = []
    monkeypatch.setattr(report, "replace_section", lambda *arguments: found.append(arguments))
    monkeypatch.setattr(sys, "argv", ["program", "--table"])
    assert not PROGRAMS[program].main()
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_tables_are_made_of_the_results(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = remade(program, monkeypatch)
    assert found
    for path, name, table in found:
        assert table == section(path.read_text(encoding="utf-8"), name), f"python -m bench.{program} --table"
        assert table.count("|") > 20


def test_no_table_is_without_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    remakes = {name for program in PROGRAMS for _, name, _ in remade(program, monkeypatch)}
    others = {"kd_conformance", "gpu_check"}  # written with the measurement; tests/bench/test_gpu_claims.py
    for path in (ROOT / "README.md", ROOT / "bench" / "README.md"):
        marks = {line[5:-4] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("<!-- /")}
        assert {mark.lstrip("/") for mark in marks} <= remakes | others


def test_a_changed_figure_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, name, table = next(t for t in remade("studies.distillation", monkeypatch))
    assert table != section(text.replace("0.820", "0.920"), name)
