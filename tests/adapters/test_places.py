"""Which modules an adapter changes: blocks, frozen modules, norms, embeddings, and ranks that fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from peftlab.adapters import Pattern, adapted_modules, check_adapter, inject, planned_modules
from peftlab.errors import RecipeError
from tests.family_examples import READERS_OF_IMAGES, SEGMENTERS, WRITERS, make_config, make_model


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


@pytest.mark.parametrize(
    ("options", "block"),
    [
        ({"targets": r".*layers\.0\..*q_proj", "layers": "-2:"}, 0),
        ({"freeze": ["layers.1.mlp", "layers.1.self_attn.q_proj"], "layers": [-1]}, 1),
        ({"targets": ["0.self_attn.q_proj", "1.self_attn.k_proj"], "layers": [0]}, 0),
    ],
)
def test_layers_count_the_blocks_of_the_model_and_not_those_adapted(llama: Any, options: Any, block: int) -> None:
    assert {name.split(".")[2] for name in planned(llama, **options)} == {str(block)}


def test_layers_and_freeze_say_which_of_them_leaves_nothing(llama: Any) -> None:
    with pytest.raises(RecipeError, match=r"none of the 1 modules that adapter.targets names is in") as error:
        planned(llama, targets=["0.mlp.up_proj"], layers=[-1])
    assert error.value.key == "adapter.layers"
    with pytest.raises(RecipeError, match="leaves no module to adapt") as error:
        planned(llama, layers=[1], freeze=["layers.1"])
    assert error.value.key == "adapter.freeze"


def family(name: str) -> tuple[Any, str | None]:
    """A tiny model, and PEFT's task type of its task."""
    if name == "SwinConfig":
        return make_model(make_config(name, READERS_OF_IMAGES), "AutoModelForImageClassification"), None
    more = {"num_decoder_layers": 3} if name == "T5Config" else {}
    return make_model(make_config(name, **more), "AutoModelForSequenceClassification"), "SEQ_CLS"


@pytest.mark.parametrize(
    ("name", "layers", "stacks"),
    [
        ("BertConfig", [0], ["bert.encoder.layer.0"]),
        ("BertConfig", "-1:", ["bert.encoder.layer.1"]),
        # The encoder of this T5 has two blocks, its decoder three.
        ("T5Config", [0], ["transformer.decoder.block.0", "transformer.encoder.block.0"]),
        ("T5Config", [-1], ["transformer.decoder.block.2", "transformer.encoder.block.1"]),
        ("T5Config", "-1:", ["transformer.decoder.block.2", "transformer.encoder.block.1"]),
        ("T5Config", "2:", ["transformer.decoder.block.2"]),
        ("SwinConfig", [-1], ["swin.encoder.layers.1"]),
        ("SwinConfig", ":1", ["swin.encoder.layers.0"]),
    ],
)
def test_layers_of_other_families(name: str, layers: Any, stacks: list[str]) -> None:
    model, peft_type = family(name)
    names = planned(model, peft_type=peft_type, layers=layers)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert names == [n for n in linear if any(n.startswith(f"{stack}.") for stack in stacks)]
    assert {s for n in names for s in stacks if n.startswith(f"{s}.")} == set(stacks)


def test_layers_beyond_the_longest_stack_are_refused() -> None:
    model, peft_type = family("T5Config")
    with pytest.raises(RecipeError, match="there is no block 3: this model has 3 blocks, 0 to 2"):
        planned(model, peft_type=peft_type, layers=[0, 3])


def test_head_of_an_image_classifier_is_named_to_no_method() -> None:
    """VeRA's configuration has no exclude_modules: its targets have to leave out the head themselves."""
    model, peft_type = family("SwinConfig")
    places: Any = {"peft_type": peft_type, "targets": "all-linear"}
    config = check_adapter(model, "vera", rank=4, **places)
    assert config.modules_to_save == ["classifier"]
    assert sorted(config.target_modules) == sorted(planned(model, "vera", **places))
    assert not any("classifier" in name for name in config.target_modules)
    norms = planned(model, "ln_tuning", peft_type=peft_type, targets="all-norms")
    assert norms == [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]


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


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, "adapter.layer_replication"),
        ({"targets": ["q_proj"], "layers": [0]}, "adapter.layers"),
        ({"targets": ["q_proj"], "freeze": ["layers.0"]}, "adapter.freeze"),
        ({"targets": ["q_proj"], "patterns": [Pattern(["q_proj"], rank=2)]}, "adapter.patterns"),
    ],
)
def test_replicated_layers_need_endings(llama: Any, options: Any, key: str) -> None:
    """PEFT makes the layers after the names were found, so these settings left them without an adapter."""
    values: dict[str, Any] = {"peft_type": "CAUSAL_LM", "rank": 4, "alpha": 8, "layer_replication": [[0, 2], [0, 2]]}
    with pytest.raises(RecipeError) as error:
        inject(llama, "lora", **values, **options)
    assert error.value.key == key
    model = inject(llama, "lora", **values, targets=["q_proj"])
    assert [n.split(".")[2] for n in adapted_modules(model)] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("options", [{"layers": [1]}, {"freeze": ["layers.0"]}])
def test_layers_and_freeze_choose_experts(options: dict[str, Any]) -> None:
    model = make_model(make_config("MixtralConfig", WRITERS), "AutoModelForCausalLM")
    names = planned(model, **options)
    assert "model.layers.1.mlp.experts" in names and all(name.startswith("model.layers.1.") for name in names)
    adapted = inject(model, "lora", peft_type="CAUSAL_LM", rank=4, alpha=8, **options)
    assert set(adapted_modules(adapted)) == set(names)
    # Two experts: w2 has the rank 4, and w1 and w3, which are fused, have it each.
    assert sorted(p.shape[0] for n, p in adapted.named_parameters() if ".experts." in n and "lora_A" in n) == [8, 16]


def test_router_that_returns_more_than_a_product_gets_no_adapter() -> None:
    """Llama 4's router is a linear layer with a forward of its own; PEFT's layer would fail on its tuple."""
    from transformers import Llama4TextConfig

    values = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "intermediate_size_mlp": 64,
        "num_hidden_layers": 2,
        "vocab_size": 260,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
    model = make_model(Llama4TextConfig(**values, **heads, pad_token_id=0), "AutoModelForCausalLM")
    names = planned_modules(model, peft_type="CAUSAL_LM", targets="all-linear")
    assert names and not [name for name in names if "router" in name]
    with pytest.raises(RecipeError, match="'router' matches no module"):
        planned_modules(model, peft_type="CAUSAL_LM", targets=["router"])


def test_linear_layers_of_a_models_own_code_get_adapters() -> None:
    """Falcon has a linear layer of its own, which gives its product."""
    model = make_model(make_config("FalconConfig"), "AutoModelForCausalLM")
    names = planned_modules(model, peft_type="CAUSAL_LM", targets="all-linear")
    assert {name.rpartition(".")[2] for name in names} == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


@pytest.mark.parametrize(("auxiliary", "names"), [(False, ["head.head"]), (True, ["head.head", "auxiliary_head.head"])])
def test_heads_in_heads_of_their_name_are_saved_once(auxiliary: bool, names: list[str]) -> None:
    """PEFT wraps DPT's head and the head in it, and then finds no place for the saved weights."""
    from peftlab.adapters.places import head_modules

    config = make_config("DPTConfig", SEGMENTERS, use_auxiliary_head=auxiliary)
    model = make_model(config, "AutoModelForSemanticSegmentation")
    found = head_modules(model)
    assert found == ["neck", *names]
    wrapped = [n for n, _ in model.named_modules() if any(n.endswith(f) for f in found)]
    assert not [a for a in wrapped for b in wrapped if a.startswith(f"{b}.")]
