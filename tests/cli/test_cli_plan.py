"""``peftlab plan``: the table at 80 columns, the JSON document, exit codes and sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from peftlab.cli.app import run
from peftlab.cli.plan import size_in_bytes


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "rows.csv").write_text("text\n" + "some text of a row\n" * 20)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"task: causal_lm\nmodel: {{name: 'tiny:llama'}}\ntrain: {{max_steps: 2}}\n"
        f"data: {{train: {tmp_path / 'rows.csv'}, eval_rows: 4, columns: {{text: text}}, max_length: 64}}\n"
    )
    return str(path)


def test_plan_prints_terms_peak_and_disk(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", recipe, "--gpu", "24GiB"]) == 0
    text = capsys.readouterr().out
    assert "activations" in text and "fits into 24.00 GiB" in text and "disk" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_plan_json_adds_up_and_says_what_does_not_fit(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", recipe, "--gpu", "100MiB", "--json"]) == 4
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] is False and report["peak"]["bytes"] > 100 * 2**20
    assert all(sum(phase["terms"].values()) == phase["bytes"] for phase in report["phases"])


def test_sizes() -> None:
    assert size_in_bytes("24GiB") == size_in_bytes("24G") == 24 * 2**30
    assert size_in_bytes("24GB") == 24 * 10**9 and size_in_bytes("1.5 mib") == 1.5 * 2**20
    for text in ("much", "24", "-1GiB"):
        with pytest.raises(typer.BadParameter, match="such as 24GiB"):
            size_in_bytes(text)
