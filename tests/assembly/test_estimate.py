"""The FLOPs behind the estimated time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import peftlab
from peftlab.assembly.estimate import _flops_per_image
from peftlab.training.progress import SilentProgress
from tests.family_examples import FAMILIES, make_config
from tests.family_table import make_skeleton


def test_flops_of_an_image_count_convolutions() -> None:
    config = make_config("ResNetConfig", FAMILIES["image_cls"])
    model = make_skeleton("ResNetConfig", "image_cls")
    by_layer = {}

    def count(layer: Any, _: Any, output: torch.Tensor) -> None:
        size = output.shape[-2:].numel() if isinstance(layer, torch.nn.Conv2d) else 1
        by_layer[layer] = 2 * layer.weight.numel() * size

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    shape = (config.num_channels, 32, 32)
    assert _flops_per_image(model, shape) == sum(by_layer.values()) > 0
    assert _flops_per_image(model, (config.num_channels, 64, 64)) > 3 * _flops_per_image(model, shape)


def test_flops_of_a_model_whose_forward_pass_reads_values() -> None:
    model = make_skeleton("DetrConfig", "object_detection")
    with pytest.raises(RuntimeError), torch.no_grad():
        model.eval()(pixel_values=torch.zeros(1, 3, 64, 64, device="meta"))
    assert _flops_per_image(model, (3, 64, 64)) > 1e6
    assert next(model.parameters()).is_meta


def test_steps_of_a_contrastive_loss_in_several_micro_batches_read_their_rows_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(f'{{"a": "film {i}", "b": "a film {i}"}}\n' for i in range(20, 52)))
    recipe = {
        "task": "embedding",
        "model": {"name": "tiny:bert"},
        "data": {"train": "rows.jsonl", "eval_rows": 4, "columns": {"anchor": "a", "positive": "b"}},
    }

    def flops(**train: Any) -> float:
        estimate = peftlab.check({**recipe, "train": {"max_steps": 2, **train}}, progress=SilentProgress())["estimate"]
        return float(estimate["flops"])

    assert flops(batch_size=4, accumulate=2) == pytest.approx(1.5 * flops(batch_size=8), rel=1e-6)
