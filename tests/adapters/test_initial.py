"""LoRA's initialisations: what is saved fits the model as it was, and data-driven ones see the rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peftlab.adapters import InitialRows, inject, load_adapter, save_adapter
from peftlab.errors import RecipeError

IDS = torch.arange(3, 27).reshape(2, 12)
CHANGES_WEIGHTS = ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"]


@pytest.fixture
def base(tiny: Callable[..., Any]) -> Any:
    return tiny("tiny:llama", adapter=False)


def rows() -> InitialRows:
    def loss(model: torch.nn.Module, index: int) -> torch.Tensor:
        return model(input_ids=IDS, labels=IDS).loss

    return InitialRows([{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}], loss)


def lora(base: Any, kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {"rank": 4, "alpha": 8, "init_lora_weights": kind, **options}
    return inject(base, "lora", peft_type="CAUSAL_LM", rows=rows, **settings)


def train(model: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    "options", [{}, {"rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}]
)
@pytest.mark.parametrize("kind", CHANGES_WEIGHTS)
def test_adapter_that_changed_the_weights_is_saved_for_the_model_as_it_was(
    base: Any, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    untouched = copy.deepcopy(base)
    start = logits(untouched)
    model = lora(base, kind, **options)
    # The start is the model's own: what is in the adapter is missing in the weights.
    torch.testing.assert_close(logits(model), start, rtol=1e-4, atol=1e-4)
    train(model)
    trained = logits(model)
    assert float((trained - start).abs().max()) > 1e-2
    save_adapter(model, tmp_path / "adapter")
    for opened in (
        PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "adapter"),
        load_adapter(copy.deepcopy(untouched), tmp_path / "adapter"),
    ):
        torch.testing.assert_close(logits(opened), trained, rtol=1e-4, atol=1e-4)


def test_adapter_saved_without_its_first_factors_is_another_model(base: Any, tmp_path: Path) -> None:
    """The deliberate fault: PEFT's own file, on the model as it was."""
    untouched = copy.deepcopy(base)
    model = lora(base, "pissa")
    train(model)
    save_adapter(model, tmp_path, to_go_on=True)
    stored = load_file(str(tmp_path / "adapter_model.safetensors"))
    plain = inject(untouched, "lora", peft_type="CAUSAL_LM", rank=4, alpha=8)
    names = dict(plain.named_parameters())
    with torch.no_grad():
        for name, value in stored.items():
            names[name.replace(".weight", ".default.weight")].copy_(value)
    assert float((logits(plain) - logits(model)).abs().max()) > 0.1


def test_lora_without_such_a_start_is_saved_as_it_is(base: Any, tmp_path: Path) -> None:
    model = lora(base, "orthogonal")
    save_adapter(model, tmp_path)
    shapes = {n: t.shape for n, t in load_file(str(tmp_path / "adapter_model.safetensors")).items()}
    assert all(4 in shape for shape in shapes.values())


def test_eva_starts_with_the_main_directions_of_the_inputs(base: Any) -> None:
    layer = base.get_submodule("model.layers.1.mlp.down_proj")
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    logits(base)
    hook.remove()
    x = seen[0].reshape(-1, seen[0].shape[-1]).double()
    _, _, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    model = lora(base, "eva", targets=["1.mlp.down_proj"], rank=2)
    A = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj").lora_A["default"].weight.double()
    cosines = torch.nn.functional.normalize(A, dim=1) @ directions[: len(A)].T
    # PEFT's incremental PCA does not centre the first batch exactly; the plane is the same.
    assert float(torch.linalg.svdvals(cosines).min()) > 0.9


def test_initialisation_from_data_without_rows_is_refused(base: Any) -> None:
    with pytest.raises(RecipeError, match="eva initialises the adapter from training rows"):
        inject(base, "lora", peft_type="CAUSAL_LM", rank=4, alpha=8, init_lora_weights="eva")


@pytest.mark.skipif(torch.cuda.is_available(), reason="PEFT's LoftQ runs on a GPU")
def test_loftq_without_a_gpu_is_refused(base: Any) -> None:
    with pytest.raises(RecipeError, match="PEFT initialises LoftQ on a GPU only"):
        lora(base, "loftq")


def test_unknown_initialisation_names_its_key(base: Any) -> None:
    with pytest.raises(RecipeError) as error:
        lora(base, "pisa")
    assert error.value.key == "adapter.init_lora_weights"
    assert "pisa" in str(error.value)
