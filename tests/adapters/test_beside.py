"""Adapters beside the main one: every method that can be one is saved, opened and merged; those that cannot are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peftlab.adapters import Beside, adapted_modules, beside, inject, load_adapter, save_adapter
from peftlab.adapters.beside import load_tensors_beside, tensors_beside
from peftlab.adapters.merge import fold
from peftlab.adapters.updates import read_updates
from peftlab.errors import RecipeError
from peftlab.specs.methods import METHODS

# Sizes that fit layers of 64 values.
OPTIONS = {
    "oft": {"oft_block_size": 8},
    "c3a": {"block_size": 16},
    "fourierft": {"n_frequency": 50},
    "miss": {"rank": 8},
    "road": {"group_size": 8},
}
FITS = [name for name, spec in METHODS.items() if spec.beside]
IDS = torch.arange(4, 20)[None]


def adapted(base: Any, method: str, main: str) -> Any:
    """A model whose adapters all have random values."""
    targets = ["norm"] if method == "ln_tuning" else None if method == "bottleneck" else ["up_proj"]
    other = Beside(method, targets, options=OPTIONS.get(method, {}))
    model = inject(base, main, peft_type="CAUSAL_LM", targets=["q_proj", "v_proj"], beside=[other])
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("method", FITS)
def test_method_is_saved_opened_and_merged(method: str, tiny: Any, tmp_path: Path) -> None:
    model = adapted(tiny("tiny:llama", adapter=False), method, "ia3" if method != "ia3" else "lora")
    assert list(beside(model)) == [method]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    files = len(tensors_beside(model, method))
    save_adapter(model, tmp_path)
    opened = load_adapter(tiny("tiny:llama", adapter=False), tmp_path)
    torch.testing.assert_close(logits(opened), logits(model), rtol=1e-6, atol=1e-6)
    assert files and len(trained) >= files and not any(p.requires_grad for p in opened.parameters())
    again = load_adapter(tiny("tiny:llama", adapter=False), tmp_path, trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == set(trained)
    if method == "bottleneck":
        return
    others = set(adapted_modules(model)) - {n for n in adapted_modules(model) if n.endswith(("q_proj", "v_proj"))}
    methods = {u.name: u for u in read_updates(model)}
    assert others and others < set(methods), "each layer is read by the rules of its own method"
    torch.testing.assert_close(logits(fold(opened)), logits(model), rtol=1e-4, atol=1e-4)


def test_file_of_another_shape_is_refused_and_changes_nothing(tiny: Any) -> None:
    model = adapted(tiny("tiny:llama", adapter=False), "oft", "lora")
    before = {n: t.clone() for n, t in tensors_beside(model, "oft").items()}
    other = dict(before)
    name = next(iter(other))
    other[name] = other[name][:1]
    with pytest.raises(RuntimeError, match=rf"differ, such as {name}"):
        load_tensors_beside(model, "oft", {n: t + 1 for n, t in other.items()})
    assert all(torch.equal(t, before[n]) for n, t in tensors_beside(model, "oft").items())


@pytest.mark.parametrize("method", ["vera", "randlora", "vblora", "prefix_tuning", "adalora"])
def test_method_with_values_outside_of_its_layers_is_refused(method: str, tiny: Any) -> None:
    with pytest.raises(RecipeError, match="keeps values outside of its layers"):
        adapted(tiny("tiny:llama", adapter=False), method, "lora")
