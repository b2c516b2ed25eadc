"""Every table of figures in README.md, docs/ and bench/RESULTS.md equals the output of its program for the JSON in
bench/results."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import ROOT
from bench.tables import replace_section, section
from bench.write_results import PAGE, README, TABLES

HINT = "python -m bench.write_results writes it"


@pytest.mark.parametrize(("path", "name"), TABLES, ids=lambda value: value.stem if isinstance(value, Path) else value)
def test_tables_equal_the_results(path: Path, name: str) -> None:
    assert TABLES[path, name]() == section(path.read_text(encoding="utf-8"), name), HINT


def test_tables_all_have_a_program() -> None:
    by_hand = {(PAGE, "kd_conformance"), (PAGE, "peft_suite")}  # of make conformance, and compared in tests/conformance
    for path in (
        README,
        PAGE,
        ROOT / "bench" / "README.md",
        ROOT / "bench" / "FINDINGS.md",
        *(ROOT / "docs").glob("*.md"),
    ):
        lines = path.read_text(encoding="utf-8").splitlines()
        marks = {(path, line[6:-4]) for line in lines if line.startswith("<!-- /")}
        assert marks == {key for key in TABLES.keys() | by_hand if key[0] == path}


def test_tables_check_notices_a_changed_figure() -> None:
    text, table = README.read_text(encoding="utf-8"), TABLES[README, "distillation"]()
    assert "0.820" in table
    assert table != section(text.replace("0.820", "0.920"), "distillation")


def test_replace_section_writes_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- /one -->\nold\n<!-- two -->\nold\n<!-- /two -->\n")
    replace_section(page, "two", "| new |")
    assert page.read_text() == "a\n<!-- one -->\nold\n<!-- /one -->\nold\n<!-- two -->\n| new |\n<!-- /two -->\n"
    with pytest.raises(SystemExit, match="expected <!-- three --> and <!-- /three --> once each"):
        replace_section(page, "three", "")
