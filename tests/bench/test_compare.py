"""``peftlab bench compare`` on results whose speeds are known."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from peftlab.bench.compare import compare_results
from peftlab.bench.summary import summarize
from peftlab.bench.sweep import Cell
from peftlab.cli.app import run
from peftlab.errors import ArtifactError
from tests.bench.bench_examples import CEILINGS

CELLS = [Cell("train", "lora", rank, "none", "auto", 2, 16) for rank in (8, 16, 64)]
UNIT = {"task": "causal_lm", "model": "tiny:llama", "fingerprint": "f", "precision": "no", "new_tokens": 32}


def result(step_s: dict[int, list[float]], *, peak: float = 1e8) -> dict[str, Any]:
    """A bench.json with the seconds of a step by rank, one per repetition. A rank without seconds has no figures."""
    records: list[dict[str, Any]] = [{"kind": "ceilings", **CEILINGS}]
    for cell in CELLS:
        assert cell.rank is not None
        seconds = step_s.get(cell.rank)
        gate = {
            "kind": "gate",
            "cell": cell.key,
            "status": "ok",
            "num_trained": 1,
            "num_total": 2,
            "flops_per_step": 1e9,
        }
        if seconds is None:
            gate |= {"status": "memory", "reason": "too large"}
        records.append(gate)
        for i, s in enumerate(seconds or []):
            memory = {"load_peak_bytes": peak, "before_bytes": 0, "peak_bytes": peak, "increase_bytes": 0}
            run = {"kind": "run", "cell": cell.key, "status": "ok", "repetition": i, "step_s": [s, s], "joules": None}
            run |= {"memory": memory | {"reserved_bytes": 0}, "losses": [2.0], "draws": False, "micro_batches": 1}
            run |= {"rows_per_step": 2, "tokens_per_step": 32, "num_fused": 1, "num_adapted": 1, "slow": []}
            records.append(run)
    header = {
        "format": 1,
        "machine": {"name": "cpu"},
        "versions": {"torch": "2.13"},
        "commit": None,
        "unit": dict(UNIT),
    }
    header["protocol"] = {"repeats": 5, "steps": 2, "warm_up": 1}
    return {"header": header, "ceilings": dict(CEILINGS), "cells": summarize(CELLS, {}, records)}


STEADY = [1.0, 1.01, 0.99, 1.02, 0.98]
NAMES = ("a", "b")


def test_compare_reports_a_difference_and_no_difference() -> None:
    a = result({8: STEADY, 16: STEADY})
    b = result({8: [0.5 * s for s in STEADY], 16: [1.03, 0.97, 1.0, 1.05, 0.96]}, peak=5e7)
    comparison = compare_results(a, b, NAMES)
    faster, same = comparison["cells"]
    assert faster["speed"]["value"] == pytest.approx(2) and faster["speed"]["differs"]
    assert 1.9 < faster["speed"]["low"] <= 2 <= faster["speed"]["high"] < 2.1
    assert same["speed"]["differs"] is False
    assert faster["memory_ratio"]["value"] == pytest.approx(0.5) and faster["memory_ratio"]["differs"]
    assert comparison["said"] == []
    assert comparison["only_a"] == [{"key": CELLS[2].key, "status": "memory"}]


def test_compare_decides_nothing_on_two_repetitions() -> None:
    comparison = compare_results(result({8: [1.0, 1.1]}), result({8: [0.5, 0.6]}), NAMES)
    assert comparison["cells"][0]["speed"]["differs"] is None


def test_compare_accepts_different_numbers_of_repetitions() -> None:
    comparison = compare_results(result({8: STEADY}), result({8: [0.5, 0.51, 0.49]}), NAMES)
    assert comparison["cells"][0]["speed"]["differs"]


def test_compare_reports_another_machine_and_refuses_other_work() -> None:
    a, b = result({8: STEADY}), result({8: STEADY})
    b["header"]["machine"]["name"] = "H100"
    b["header"]["versions"]["torch"] = "2.14"
    assert compare_results(a, b, NAMES)["said"] == [
        'machine.name: "cpu" in A, "H100" in B',
        'versions.torch: "2.13" in A, "2.14" in B',
    ]
    b["header"]["unit"]["precision"] = "bf16"
    with pytest.raises(
        ArtifactError, match=r"a and b cannot be compared, their workloads differ \(precision: 'no' and 'bf16'\)"
    ):
        compare_results(a, b, NAMES)


def test_compare_command_prints_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = result({8: STEADY, 16: STEADY}), result({8: [0.5 * s for s in STEADY], 16: STEADY, 64: STEADY})
    for name, document in (("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "bench.json").write_text(json.dumps(document))
    command = ["bench", "compare", str(tmp_path / "a"), str(tmp_path / "b" / "bench.json")]
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert "2.00 (1.9" in shown and "no difference" in shown
    assert "same machine, versions and protocol" in shown
    assert "only in A: train/lora/r64/none/auto/2x16/1 (memory)" in shown
    assert run([*command, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["cells"]) == 2
    other = copy.deepcopy(b)
    other["header"]["unit"]["fingerprint"] = "g"
    (tmp_path / "b" / "bench.json").write_text(json.dumps(other))
    assert run(command) == 5
    (tmp_path / "b" / "bench.json").write_text("{}")
    assert run(command) == 5
    assert "is not a result of peftlab bench" in capsys.readouterr().err
    assert run(["bench", "compare", str(tmp_path / "a"), str(tmp_path / "absent")]) == 2
    assert "does not exist; give a bench.json" in capsys.readouterr().err
