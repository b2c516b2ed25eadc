"""``peftlab adapters``: tables at 80 columns, one JSON document, exit codes and messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_examples import recipe, write_data

from peftlab.cli.app import run as cli


@pytest.fixture
def here(trained: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder: Path = trained(recipe("seq_cls"), write_data)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(folder / "run")
    return tmp_path


@pytest.mark.parametrize("verb", ["", "show", "shrink", "combine", "convert", "extract"])
def test_adapters_help_fits_80_columns(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["adapters", *verb.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "Example: peftlab adapters " in shown


def test_adapters_show_fits_80_columns_and_draws(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["adapters", "show", "run", "--picture", "a.png"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for text in ("attention.self.query x2", "layer 0", "effective", "trained in full: ", "picture: a.png"):
        assert text in shown
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    assert cli(["adapters", "show", "run", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["total"]["num_modules"] == len(figures["modules"])
    assert "classifier" in figures["in_full"]


def test_adapters_shrink_prints_before_and_after(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["adapters", "shrink", "run", "--to", "small", "--keep", "0.5", "--tolerance", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "verified against the trained model: mean KL" in shown
    assert "use it:   peftlab eval small" in shown
    assert cli(["adapters", "shrink", "run", "--to", "two", "--budget", "500", "--tolerance", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["after"] <= 500
    assert cli(["adapters", "shrink", "run", "--to", "three", "--keep", "0.1", "--tolerance", "1e-12"]) == 6
    assert "nothing was written" in capsys.readouterr().err
    assert not Path("three").exists()


def test_adapters_combine_prints_each_parent(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli(["adapters", "combine", "run", "run", "--to", "both", "--weights", "1,0.5", "eval.batch_tokens=999"]) == 0
    )
    shown = capsys.readouterr().out
    assert "A x1" in shown and "B x0.5" in shown and "result" in shown
    assert "verified against the sum of the updates" in shown


MISTAKES: dict[str, tuple[list[str], int, str]] = {
    "no run": (["show", "nope"], 2, "no such run or adapter folder: nope"),
    "two rules": (["shrink", "run", "--to", "x", "--keep", "0.5", "--budget", "9"], 2, "exclude each other"),
    "exists": (["shrink", "run", "--to", "run"], 2, "run exists; choose another --to"),
    "no folder": (["shrink", "run", "--to", "no/x"], 2, "is no folder; make it first"),
    "one adapter": (["combine", "run", "--to", "x"], 2, "at least two adapters"),
    "weights": (["combine", "run", "run", "--to", "x", "--weights", "1,b"], 2, "found '1,b'"),
    "method": (["combine", "run", "run", "--to", "x", "--method", "linaer"], 2, "did you mean 'linear'"),
    "rank 0": (["convert", "run", "--to", "x", "--rank", "0"], 2, "--rank of at least 1"),
    "no rank": (["convert", "run", "--to", "x", "--rank", "all"], 2, "a share such as 0.99"),
    "lora": (["convert", "run", "--to", "x", "--rank", "4"], 2, "is a LoRA adapter already"),
    "verb": (["shrnk", "run", "--to", "x"], 2, "did you mean 'shrink'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_adapters_mistake_gives_one_message(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    arguments, code, message = MISTAKES[name]
    assert cli(["adapters", *arguments]) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert not shown.out
    assert "Traceback" not in shown.err
    assert [p.name for p in here.iterdir()] == ["run"]
