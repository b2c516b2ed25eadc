"""Which modules an adapter changes: blocks, frozen modules, norms, embeddings, and ranks that fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from peftlab.adapters import adapted_modules, inject, planned_modules
from peftlab.errors import RecipeError


@pytest.fixture
def llama(tiny: Callable[..., Any]) -> Any:
    return tiny("tiny:llama", adapter=False)


def planned(model: Any, method: str = "lora", **options: Any) -> list[str]:
    return planned_modules(model, method=method, **{"peft_type": "CAUSAL_LM", "targets": "all-linear", **options})


@pytest.mark.parametrize("layers", [[1], [-1], "1:", "-1:", "1:2"])
@pytest.mark.parametrize("method", ["lora", "vera"])
def test_layers_choose_blocks_for_every_method(llama: Any, layers: Any, method: str) -> None:
    names = planned(llama, method, layers=layers)
    assert names and all(name.startswith("model.layers.1.") for name in names)
    more = {"rank": 4, "alpha": 8} if method == "lora" else {"rank": 4}
    model = inject(llama, method, peft_type="CAUSAL_LM", layers=layers, **more)
    assert sorted(adapted_modules(model)) == sorted(names)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([2], "there is no block 2: this model has 2 blocks, 0 to 1"),
        ([-3], "there is no block -3"),
        ("2:", "2: is no block of the 2 of this model"),
    ],
)
def test_layers_that_do_not_exist_are_refused(llama: Any, layers: Any, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        planned(llama, layers=layers)
    assert message in str(error.value) and error.value.key == "adapter.layers"


def test_layers_without_blocks_are_refused(llama: Any) -> None:
    with pytest.raises(RecipeError, match="are not in numbered blocks"):
        planned(llama, targets=["lm_head"], layers=[0])


def test_freeze_leaves_out_modules_and_all_in_them(llama: Any) -> None:
    names = planned(llama, freeze=["mlp", "q_proj"])
    assert {name.rsplit(".", 1)[-1] for name in names} == {"k_proj", "v_proj", "o_proj"}
    with pytest.raises(RecipeError, match="leaves no module to adapt"):
        planned(llama, freeze=["layers"])
    with pytest.raises(RecipeError, match="'layres' matches no module; did you mean 'layers'"):
        planned(llama, freeze=["layres"])


def test_norms_and_embeddings_are_found_by_their_kind(llama: Any) -> None:
    norms = planned(llama, "ln_tuning", targets="all-norms")
    assert len(norms) == 5 and all("norm" in name for name in norms)
    assert planned(llama, "ln_tuning", targets=["input_layernorm"]) == [n for n in norms if "input_layernorm" in n]
    with pytest.raises(RecipeError, match="'q_proj' matches no module"):
        planned(llama, "ln_tuning", targets=["q_proj"])
    # The head is tied: PEFT trains its rows with those of the embeddings.
    assert planned(llama, "trainable_tokens", targets="embeddings") == ["model.embed_tokens", "lm_head"]


@pytest.mark.parametrize("method", ["lora", "vera", "boft"])
def test_head_of_a_classifier_is_trained_in_full_and_not_adapted(tiny: Callable[..., Any], method: str) -> None:
    model = tiny("tiny:bert", adapter=False)
    names = planned(model, method, peft_type="SEQ_CLS")
    assert names and not any("classifier" in name for name in names)
    more = {"lora": {"rank": 4, "alpha": 8}, "vera": {"rank": 4}, "boft": {}}[method]
    adapted = inject(model, method, peft_type="SEQ_CLS", **more)
    assert sorted(adapted_modules(adapted)) == sorted(names)
    assert any(p.requires_grad for n, p in adapted.named_parameters() if "classifier.modules_to_save" in n)


def test_method_without_a_place_for_a_new_head_is_refused(tiny: Callable[..., Any]) -> None:
    model = tiny("tiny:bert", adapter=False)
    with pytest.raises(RecipeError) as error:
        inject(model, "trainable_tokens", peft_type="SEQ_CLS", targets="embeddings", token_indices=[5])
    assert "trainable_tokens has no place for modules that are trained in full" in str(error.value)
    assert "classifier" in str(error.value)


def test_rank_above_every_weight_is_refused(llama: Any) -> None:
    widest = max(min(llama.get_submodule(name).weight.shape) for name in planned(llama))
    with pytest.raises(RecipeError) as error:
        inject(llama, "lora", peft_type="CAUSAL_LM", rank=widest + 1, alpha=8)
    assert f"expected at most {widest}" in str(error.value) and error.value.key == "adapter.rank"
    assert len(adapted_modules(inject(llama, "lora", peft_type="CAUSAL_LM", rank=widest, alpha=8))) == 14
