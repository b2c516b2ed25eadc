"""Methods that nobody tried on quantized weights: PEFT's faulty ones are refused before training, and correct ones pass."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora.bnb import Linear8bitLt

import peftlab
from peftlab.adapters import inject
from peftlab.errors import RecipeError
from peftlab.specs.methods import METHODS
from tests.run_examples import Notes, recipe, write_data

TARGETS = ["q_proj", "down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {"lora": {"rank": 4, "alpha": 8}, "vera": {"rank": 4}, "unilora": {"rank": 4}}


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a method one that nobody tried on quantized weights."""
    return lambda name: monkeypatch.setitem(METHODS, name, dataclasses.replace(METHODS[name], storages=None))


def injected(tiny: Callable[..., Any], method: str, storage: str, targets: list[str] = TARGETS) -> Any:
    base = tiny("tiny:llama", adapter=False, quantize=storage)
    torch.manual_seed(0)
    return inject(base, method, peft_type="CAUSAL_LM", targets=targets, **OPTIONS.get(method, {}))


@pytest.mark.parametrize(
    ("method", "storage", "says"),
    [
        ("deft", "int8", r"its outputs differ by [\d.e+]+ times their size from those"),
        ("peanut", "int8", r"its outputs differ by [\d.e+]+ times their size from those"),
        ("hra", "int8", r"its outputs differ by [\d.e+]+ times their size from those"),
        ("unilora", "int8", r"its outputs differ by 0\.\d+ times their size from those"),
        ("unilora", "nf4", r"its outputs differ by 0\.\d+ times their size from those"),
        ("hra", "nf4", r"it fails \(mat1 and mat2 shapes cannot be multiplied .*\) and runs"),
    ],
)
def test_method_that_reads_the_bytes_is_refused(
    tiny: Callable[..., Any], untried: Callable[[str], None], method: str, storage: str, says: str
) -> None:
    untried(method)
    wanted = (
        rf"nobody tried {METHODS[method].label} .* in model\.layers\.0\.\w+\.\w+_proj, {says} .*model\.quantize: none"
    )
    with pytest.raises(RecipeError, match=wanted) as info:
        injected(tiny, method, storage)
    assert info.value.key == "adapter.method"


@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["lora", "oft", "vera", "ia3"])
def test_method_that_computes_with_the_weights_passes_and_nothing_is_left_behind(
    tiny: Callable[..., Any], untried: Callable[[str], None], method: str, storage: str
) -> None:
    known = injected(tiny, method, storage)
    assert known.quantized_check is None
    draws = torch.get_rng_state()
    untried(method)
    random.seed(0)
    np.random.seed(0)
    others = random.getstate(), np.random.get_state()[1].tolist()
    model = injected(tiny, method, storage)
    assert torch.equal(torch.get_rng_state(), draws)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == others
    check = model.quantized_check
    assert sorted(name.rsplit(".", 1)[1] for name in check.layers) == sorted(TARGETS)
    assert check.worst < 0.3 and not check.left_out
    left, right = known.state_dict(), model.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_every_kind_of_layer_is_compared(
    tiny: Callable[..., Any], untried: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of 10 % of the update, in layers of one shape."""
    untried("lora")
    forward = Linear8bitLt.forward

    def faulty(self: Any, x: torch.Tensor) -> torch.Tensor:
        right: torch.Tensor = forward(self, x)
        base = self.base_layer(x)
        return right if self.in_features <= self.out_features else base + 1.1 * (right - base)

    injected(tiny, "lora", "int8")
    monkeypatch.setattr(Linear8bitLt, "forward", faulty)
    injected(tiny, "lora", "int8", ["q_proj"])
    with pytest.raises(RecipeError, match=r"in model\.layers\.0\.mlp\.down_proj, its outputs differ by"):
        injected(tiny, "lora", "int8")


def test_run_says_what_was_compared_and_refuses_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untried: Callable[[str], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    for method in ("ia3", "hra", "lora"):
        untried(method)
    sections: dict[str, Any] = {"model": {"quantize": "int8"}, "eval": {"before": False}}
    document = recipe(**sections) | {"adapter": {"method": "ia3", "targets": TARGETS}}
    text = "IA3 was not tried on int8 weights; the run compares its layers with dequantized ones first"
    assert text in [finding["message"] for finding in peftlab.check(document)["findings"]]
    progress = Notes()
    document["train"]["max_steps"] = 1
    peftlab.train(document, progress=progress)
    (line,) = [line for line in progress.lines if "quantized weights before" in line]
    assert line.startswith("IA3 was not tried on quantized weights before; 2 layers give what they give")
    document["adapter"] = {"rank": 4, "targets": ["q_proj"], "beside": [{"method": "hra", "targets": ["down_proj"]}]}
    document["run"]["dir"] = "other"
    with pytest.raises(RecipeError, match="nobody tried HRA on quantized weights"):
        peftlab.train(document, progress=Notes())
    assert not Path("other/adapter").exists()
