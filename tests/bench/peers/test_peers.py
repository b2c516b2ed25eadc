"""bench.peers on tiny models: the cost of a micro-batch, what the engines of a distillation share, and the gate's
arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import ROOT
from bench.peers import distillation_engines, split_cost
from bench.peers.gate import loss_differences

SMOKE = f"{ROOT}/recipes/smoke.jsonl"


def test_split_cost_is_fitted() -> None:
    padded = [8, 16, 64, 512]
    fitted = split_cost.fit(padded, [2e-3 + 1e-5 * tokens for tokens in padded])
    assert fitted["constant_ms"] == pytest.approx(2) and fitted["ms_per_token"] == pytest.approx(0.01)
    assert fitted["split_cost_tokens"] == pytest.approx(200) and fitted["largest_relative_residual"] < 1e-9


def test_split_cost_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_cost, "LENGTHS", (4, 8))
    recipe = {
        "task": "causal_lm",
        "model": {"name": "tiny:llama"},
        "data": {"train": f"{SMOKE}#8", "template": {"prompt": "{question}\n", "completion": "{answer}"}},
    }
    measured = split_cost.measure(recipe, budget_s=0.0)
    assert measured["rounds"] == 1 and len(measured["shapes"]) == 8
    assert all(seconds > 0 for *_, seconds in measured["shapes"])


def test_distillation_engines_share_student_adapter_and_targets(tmp_path: Path) -> None:
    """They share a student cut from its teacher, its first adapter and the stored targets."""
    settings = {
        "task": "causal_lm",
        "model": {"name": str(tmp_path / "student")},
        "adapter": {"rank": 2, "alpha": 4, "dropout": 0.0, "targets": "all-linear"},
        "data": {
            "train": f"{SMOKE}#12",
            "eval_rows": 4,
            "template": {"prompt": "{question}\n", "completion": "{answer}"},
        },
        "train": {
            "batch_size": 4,
            "lr": 1e-3,
            "schedule": "linear",
            "warmup": 0.0,
            "max_steps": 2,
            "precision": "float32",
        },
        "run": {"seed": 0, "device": "cpu"},
        "distill": {"teacher": {"name": "tiny:llama"}, "baseline": False},
    }
    spec = {"adapter": str(tmp_path / "adapter"), "cache": str(tmp_path / "cache"), "num_layers": 1}
    work = tmp_path / "work"
    work.mkdir()
    shared = distillation_engines.write_shared(settings, spec, work)
    assert len(shared["student"]["layers"]) == 1 and shared["student"]["parameters"] < shared["student"]["of"]
    assert shared["captured"]["positions"] > 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_loss_differences_are_relative_to_ours() -> None:
    assert loss_differences([2.0, 4.0], [2.0, 5.0]) == [0.0, pytest.approx(0.2)]
