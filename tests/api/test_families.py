"""Families of models against the table in docs/families.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.family_table import COLUMNS, PAGE, TITLES, families, measure

# One of each kind of attention, head, layer and padding; the others run with the slow tests.
QUICK = {
    ("GPT2Config", "causal_lm"),
    ("MixtralConfig", "causal_lm"),
    ("Qwen2MoeConfig", "causal_lm"),
    ("GPT2Config", "seq_cls"),
    ("RobertaConfig", "seq_cls"),
    ("DistilBertConfig", "seq_cls"),
    ("XLNetConfig", "seq_cls"),
    ("BartConfig", "seq_cls"),
    ("ResNetConfig", "image_cls"),
}
ROWS = [pytest.param(*row, marks=() if row in QUICK else pytest.mark.slow, id="-".join(row)) for row in families()]


def documented(task: str) -> dict[str, str]:
    """The rows of a task in the page, by family."""
    text = PAGE.read_text()
    section = text[text.index(f"## {TITLES[task]}") :].split("\n## ")[0]
    return {match.group(1): match.group(0) for match in re.finditer(r"^\| `([^`]+)` \|.*$", section, re.MULTILINE)}


@pytest.mark.parametrize(("name", "task"), ROWS)
def test_family_does_what_the_page_says(
    name: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: Any
) -> None:
    monkeypatch.chdir(tmp_path)

    def evaluate(run: str) -> float:
        done = process.run(["-m", "peftlab", "eval", run, "--json"], cwd=tmp_path, check=True)
        return float(json.loads(done.stdout)["metrics"]["loss"])

    row = measure(name, task, tmp_path, evaluate=evaluate)
    assert str(row) == documented(task)[row.family]


def test_page_has_a_row_for_every_family_and_no_failure() -> None:
    rows = [line for task in TITLES for line in documented(task).values()]
    assert len(rows) == len(list(families())) >= 45
    for line in rows:
        cells = [cell.strip() for cell in line.strip("|").split("|")][1 : len(COLUMNS) + 1]
        assert set(cells) == {"yes"} or (set(cells) == {"refused"} and not line.endswith("|  |")), line
