"""Families of models: train, evaluate again, plain PEFT, merge, batch against alone, resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.family_table import COLUMNS, families, measure

# One of each kind of layer, adapter and padding; the others run with the slow tests.
QUICK = {
    ("GPT2Config", "causal_lm"),
    ("MixtralConfig", "causal_lm"),
    ("XLNetConfig", "seq_cls"),
    ("ResNetConfig", "image_cls"),
}
# Reformer trains on rows of one length only.
REFUSED = {("ReformerConfig", "seq_cls")}
ROWS = [
    pytest.param(*row, marks=() if row in QUICK else pytest.mark.slow, id="-".join(row))
    for row in families()
    if row not in REFUSED
]


@pytest.mark.parametrize(("name", "task"), ROWS)
def test_family_does_everything(
    name: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: Any
) -> None:
    monkeypatch.chdir(tmp_path)

    def evaluate(run: str) -> float:
        done = process.run(["-m", "peftlab", "eval", run, "--json"], cwd=tmp_path, check=True)
        return float(json.loads(done.stdout)["metrics"]["loss"])

    row = measure(name, task, tmp_path, evaluate=evaluate)
    assert row.cells == dict.fromkeys(COLUMNS, "yes"), str(row)
