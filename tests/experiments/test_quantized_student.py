"""Students on frozen 4-bit weights: LoRA recovers what rounding, or a cut, took from the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from run_examples import write_data
from transformers import AutoModelForCausalLM

from peftlab.api.distill import distill
from peftlab.models import find_pretrained, load_model
from peftlab.training.progress import SilentProgress


def lesson(**distilling: Any) -> dict[str, Any]:
    return {
        "task": "causal_lm",
        "model": {"name": "tiny:llama", "quantize": "nf4"},
        "adapter": {"rank": 8},
        "data": {"train": "data.csv", "eval_rows": 12, "columns": {"text": "text"}},
        "train": {"max_steps": 30, "batch_size": 8, "lr": 3e-3},
        "eval": {"before": False},
        "distill": {"teacher": "tiny:llama", "baseline": False, **distilling},
        "run": {"dir": "run", "device": "cpu"},
    }


@pytest.mark.parametrize("cut", [None, {"layers": [0]}], ids=["the whole model", "a cut one"])
def test_lora_recovers_a_student_in_four_bits(
    cut: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is the model in its own precision. Training brings the student nearer to it. The student's frozen weights
    stay those of the 4-bit export."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    run = distill(lesson(**({"student_init": cut} if cut else {})), progress=SilentProgress())
    rows = {row["name"]: row for row in run.summary["card"]["metrics"]}
    assert 0 < rows["kl"]["student"]["value"] < 0.8 * rows["kl"]["cut"]["value"]
    trained = run.summary["card"]["costs"]["student"]["num_trained"]
    assert 0 < trained < 0.5 * run.summary["card"]["costs"]["student"]["num_parameters"]

    source = str(tmp_path / "run" / "init") if cut else "tiny:llama"
    export = load_model(find_pretrained(source), auto_class="AutoModelForCausalLM", device="cpu", quantize="nf4")
    student = AutoModelForCausalLM.from_pretrained(run.folder / "student", dtype=torch.float32)
    change = student.model.layers[0].mlp.up_proj.weight.detach() - dequantized(export.model.layers[0].mlp.up_proj)
    assert int((torch.linalg.svdvals(change.double()) > 1e-5).sum()) == 8


def dequantized(linear: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
