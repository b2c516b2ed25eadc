"""The options of adapter methods in a recipe: which exist, which values they take, and what a change of method keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftlab.adapters import check_adapter
from peftlab.assembly import Assembly
from peftlab.errors import RecipeError
from peftlab.recipe import load_recipe, write_lock
from peftlab.recipe.schema import AdapterSection
from peftlab.recipe.shipped import recipe_schema
from peftlab.specs.methods import METHODS

BASE: dict[str, Any] = {"task": "causal_lm", "model": {"name": "tiny:llama"}, "data": {"train": "x.jsonl"}}
REQUIRED = {
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 2},
    "trainable_tokens": {"token_indices": [5]},
    "xlora": {"adapters": {"law": "no/law", "code": "no/code"}},
}


def load(adapter: dict[str, Any], *overrides: str, **sections: Any) -> Any:
    return load_recipe({**BASE, **sections, "adapter": adapter}, list(overrides))


def problem(adapter: dict[str, Any], **sections: Any) -> str:
    with pytest.raises(RecipeError) as error:
        load(adapter, **sections)
    return str(error.value)


@pytest.mark.parametrize("method", [name for name, spec in METHODS.items() if not spec.refused])
def test_method_with_its_defaults_is_a_recipe_that_its_lock_repeats(method: str, tmp_path: Path) -> None:
    loaded = load({"method": method, **REQUIRED.get(method, {})})
    lock = tmp_path / "recipe.lock.yaml"
    write_lock(lock, loaded, fingerprints={}, environment={})
    again = load_recipe(lock).recipe
    assert again.adapter == loaded.recipe.adapter
    assert again.adapter.options == REQUIRED.get(method, {})


@pytest.mark.parametrize(
    ("method", "rank", "alpha"), [("lora", 8, 16.0), ("vera", 256, None), ("loha", 8, 8.0), ("oft", None, None)]
)
def test_rank_and_alpha_are_the_methods_own(method: str, rank: int | None, alpha: float | None) -> None:
    adapter = load({"method": method}).recipe.adapter
    assert (adapter.rank, adapter.alpha) == (rank, alpha)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vera", {"d_initial": 1, "save_projection": False}),
        ("fourierft", {"random_loc_seed": None}),
        ("lora", {"layer_replication": [[0, 2], [1, 2]], "init_lora_weights": "pissa_niter_4"}),
        ("lora", {"init_lora_weights": "eva", "eva_config": {"rho": 3}}),
        ("lora", {"trainable_token_indices": {"embed_tokens": [3]}, "rank_pattern": {"q_proj": 2}}),
        ("ia3", {"feedforward_modules": ["down_proj"]}),
        ("hira", {"init_weights": None}),
        ("road", {"variant": "road_2"}),
        ("osf", {"effective_rank": 0.5}),
        ("bottleneck", {"scaling": "learned", "style": "houlsby"}),
    ],
)
def test_options_of_the_types_in_peft_are_kept_by_recipe_and_lock(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    loaded = load({"method": method, **options})
    assert loaded.recipe.adapter.options == options
    write_lock(tmp_path / "lock.yaml", loaded, fingerprints={}, environment={})
    assert load_recipe(tmp_path / "lock.yaml").recipe.adapter == loaded.recipe.adapter


def test_null_is_no_value_for_a_key_of_ours() -> None:
    assert load({"rank": None, "targets": None, "layers": None}).recipe.adapter == load({}).recipe.adapter


def test_rank_of_the_recipe_is_kept_even_if_it_is_loras_default() -> None:
    assert load({"method": "vera", "rank": 8}).recipe.adapter.rank == 8


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"method": "vera", "d_inital": 1}, "adapter.d_inital: unknown key; did you mean `d_initial`?"),
        ({"method": "vera", "n_frequency": 1}, "adapter.n_frequency: is an option of fourierft, waveft, not of vera"),
        ({"r": 4}, "adapter.r: unknown key; did you mean `rank`?"),
        ({"use_qalora": True}, "adapter.use_qalora: cannot be set: PEFT uses it on GPTQ weights only"),
        ({"method": "adalora", "lora_bias": True}, "adapter.lora_bias: cannot be set: AdaLoRA takes it from LoRA's options"),
        ({"eva_config": {"rho": 3}}, "adapter.eva_config: has no effect without adapter.init_lora_weights: eva; set that"),
        ({"lora_r": 4}, "adapter.lora_r: unknown key; did you mean `rank`?"),
        ({"method": "vera", "vera_dropout": 0.1}, "adapter.vera_dropout: unknown key; did you mean `dropout`?"),
        ({"layers_to_transform": [1]}, "adapter.layers_to_transform: unknown key; did you mean `layers`?"),
        ({"method": "adalora", "total_step": 9}, "adapter.total_step: is the number of steps of the run"),
        ({"vera": True}, "adapter.vera: unknown key; did you mean `method: vera`?"),
        ({"learning_rate": 1}, "adapter.learning_rate: unknown key; did you mean `train.lr`?"),
        ({"method": "oft", "oft_block_size": "big"}, "adapter.oft_block_size: expected whole number, found 'big'"),
        ({"method": "oft", "coft": "perhaps"}, "adapter.coft: expected true or false, found 'perhaps'"),
        ({"method": "oft", "coft": 1}, "adapter.coft: expected true or false, found 1"),
        ({"method": "vera", "d_initial": "0.1"}, "adapter.d_initial: expected number, found '0.1'"),
        ({"method": "vera", "d_initial": True}, "adapter.d_initial: expected number, found true"),
        ({"method": "vera", "d_initial": None}, "adapter.d_initial: expected number, found nothing"),
        ({"method": "vera", "projection_prng_key": 7.0}, "adapter.projection_prng_key: expected whole number, found 7.0"),
        ({"method": "vera", "d_inital": None}, "adapter.d_inital: unknown key; did you mean `d_initial`?"),
        ({"r": None}, "adapter.r: unknown key; did you mean `rank`?"),
        ({"method": "cpt"}, "adapter.method: no recipe can use cpt"),
        ({"method": "poly"}, "adapter.method: no recipe can use poly: it needs the number of a task with each row"),
        ({"method": "adaption_prompt"}, "adapter.method: adaption_prompt needs adapter.adapter_len"),
        ({"method": "vera", "alpha": 3}, "adapter.alpha: has no effect for adapter.method: vera"),
        ({"method": "boft", "bias": "lora_only"}, "adapter.bias: expected one of none, all, boft_only"),
        ({"method": "vera", "tokens": ["<x>"]}, "adapter.tokens: has no effect for adapter.method: vera"),
        ({"method": "none", "layers": [0]}, "adapter.layers: has no effect without an adapter"),
        ({"exclude_modules": ["lm_head"]}, "adapter.exclude_modules: unknown key; did you mean `freeze`?"),
        ({"loraplus_lr_ratio": 16}, "adapter.loraplus_lr_ratio: unknown key; did you mean `train.loraplus_lr_ratio`?"),
        ({"method": "prefix_tuning", "lora_r": 4}, "adapter.lora_r: unknown key; prefix_tuning has no rank; remove it"),
        ({"method": "vera", "lora_alpha": 4}, "adapter.lora_alpha: unknown key; vera has no alpha; remove it"),
        ({"method": "none", "layers_to_transform": [0]}, "adapter.layers_to_transform: unknown key; none has no layers;"),
        ({"method": "vera", "lora_bias": True}, "adapter.lora_bias: is an option of lora, not of vera"),
        ({"patterns": [{"targets": ["q_proj"], "r": 2, "lr": 1}]}, "adapter.patterns.0.r: unknown key; did you mean `rank`?"),
        ({"patterns": [{"rank": 2}]}, "adapter.patterns.0.targets: missing"),
        ({"patterns": [{"targets": [], "rank": 2}]}, "adapter.patterns.0.targets: an empty list adapts nothing"),
        ({"patterns": [{"targets": ["q"], "rank": 0}]}, "adapter.patterns.0.rank: expected a whole number of at least 1, found 0"),
        ({"patterns": [{"targets": ["q"], "dropout": 1}]}, "adapter.patterns.0.dropout: expected a number of at least 0 and below 1"),
        ({"patterns": [{"targets": ["q"], "lr": 0}]}, "adapter.patterns.0.lr: expected a number above 0, found 0"),
        ({"patterns": [{"targets": "(", "rank": 2}]}, "adapter.patterns.0.targets: not a valid regular expression"),
        ({"patterns": [{"targets": ["q"], "rank": 2, "layers": "last"}]}, "adapter.patterns.0.layers: expected a list of indices"),
        ({"method": "prefix_tuning", "patterns": [{"targets": ["q"], "rank": 2}]}, "adapter.patterns: has no effect for"),
        ({"layers": []}, "adapter.layers: an empty list adapts nothing"),
        ({"layers": ":"}, "adapter.layers: adapts no block in particular; remove it"),
        ({"layers": 3}, "adapter.layers: expected a list of whole numbers or text, found 3"),
        ({"layers": [True]}, "adapter.layers.0: expected a whole number, found true"),
        ({"freeze": "lm_head"}, "adapter.freeze: expected a list of texts, found 'lm_head'"),
        ({"method": "bottleneck", "freeze": ["lm_head"]}, "adapter.freeze: has no effect for adapter.method: bottleneck"),
        ({"method": "loha", "dropout": 0.1}, "adapter.dropout: has no effect for adapter.method: loha"),
        ({"method": "trainable_tokens"}, "adapter.method: trainable_tokens needs adapter.token_indices: List of integers"),
        ({"method": "trainable_tokens", "token_indices": "5"}, "adapter.token_indices: expected list of whole numbers, found '5'"),
        ({"trainable_token_indices": 5}, "expected list of whole numbers or mapping of texts to lists of whole numbers, found 5"),
        ({"layer_replication": [[1]]}, "adapter.layer_replication: expected list of lists of whole numbers, found"),
        ({"eva_config": 5}, "adapter.eva_config: expected mapping, found 5"),
        ({"init_lora_weights": 5}, "expected true or false or 'gaussian' or 'eva' or 'olora' or 'pissa' or 'pissa_niter_["),
        ({"method": "osf", "effective_rank": "half"}, "adapter.effective_rank: expected whole number or number, found 'half'"),
        ({"layers": "3-4"}, "adapter.layers: expected a list of indices, or a range such as 12: or -6:"),
        ({"patterns": [{"targets": ["q_proj"]}]}, "a pattern without rank, alpha, dropout or lr changes nothing"),
        ({"patterns": [{"targets": ["q_proj"], "ranks": 2}]}, "adapter.patterns.0.ranks: unknown key; did you mean `rank`?"),
        ({"method": "bottleneck", "styel": "houlsby"}, "adapter.styel: unknown key; did you mean `style`?"),
    ],
)  # fmt: skip
def test_wrong_setting_of_a_method_is_one_message(adapter: dict[str, Any], message: str) -> None:
    assert message in problem(adapter)


@pytest.mark.parametrize(
    ("adapter", "sections", "message"),
    [
        ({"method": "p_tuning"}, {"data": {"train": "x", "packing": True}}, "data.packing: p_tuning puts its tokens before"),
        ({"method": "prefix_tuning"}, {"train": {"gradient_checkpointing": True}}, "transformers drops when it recomputes"),
        ({"method": "prefix_tuning"}, {"run": {"merge": "original"}}, "run.merge: prefix tuning cannot be merged: its virtual"),
        ({"method": "deft"}, {"model": {"name": "m", "quantize": "nf4"}}, "DEFT does not work on nf4 weights; set model.quantize to none"),
        ({"method": "loha"}, {"model": {"name": "m", "quantize": "nf4"}}, "set model.quantize to none, or to int8"),
        ({"method": "vera"}, {"train": {"loraplus_lr_ratio": 4}}, "train.loraplus_lr_ratio: has no effect without the matrices A and B"),
        ({"method": "cpt"}, {"run": {"kernels": "cpu-bf16"}}, "1 problem in the recipe:\n  adapter.method: no recipe can use cpt"),
        ({"method": "vera"}, {"run": {"kernels": "cpu-bf16"}}, "under LoRA, and VeRA does not run fused; set auto"),
        ({"dora": True}, {"run": {"kernels": "cpu-bf16"}}, "under LoRA, and DoRA does not run fused; set auto"),
        ({"method": "none"}, {"run": {"kernels": "cpu-bf16"}}, "under LoRA, and without an adapter no weight is frozen; set auto"),
        ({"method": "bottleneck"}, {"run": {"merge": "original"}}, "bottleneck adapters cannot be merged: a non-linearity stands"),
        ({"method": "none"}, {"train": {"loraplus_lr_ratio": 4}}, "train.loraplus_lr_ratio: has no effect without the matrices"),
        ({"method": "none"}, {"model": {"name": "m", "quantize": "int8"}}, "int8 weights cannot be trained; set model.quantize: none"),
        ({"method": "p_tuning"}, {"task": "image_cls"}, "p_tuning puts tokens before a text, and task: image_cls has none"),
    ],
)  # fmt: skip
def test_method_and_another_section_that_exclude_each_other(
    adapter: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    assert message in problem(adapter, **sections)


def test_method_on_the_command_line_replaces_what_belongs_to_the_files_method(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "task: causal_lm\nmodel: {name: tiny:llama}\ndata: {train: x.jsonl}\n"
        "adapter:\n  rank: 16\n  alpha: 32\n  dropout: 0.1\n  targets: [q_proj]\n  lora_bias: true\n"
    )
    loaded = load_recipe(path, ["adapter.method=vera"])
    adapter = loaded.recipe.adapter
    assert (adapter.method, adapter.rank, adapter.dropout, adapter.targets) == ("vera", 256, 0.1, ["q_proj"])
    assert loaded.notes == (
        "adapter.method on the command line replaces adapter.rank, adapter.alpha, adapter.lora_bias (r.yaml:5, 6, 9)",
    )
    assert load_recipe(path, ["adapter.method=vera", "adapter.rank=4"]).recipe.adapter.rank == 4
    assert load_recipe(path, ["adapter.method=lora"]).recipe.adapter.rank == 16
    # Norms are no linear layers.
    assert load_recipe(path, ["adapter.method=ln_tuning"]).recipe.adapter.targets == "all-norms"


@pytest.mark.parametrize(
    ("adapter", "method", "kept", "replaced"),
    [
        (
            {"rank": 4, "patterns": [{"targets": ["q_proj"], "rank": 2}], "layers": [0], "freeze": ["k_proj"]},
            "vera",
            {"layers": [0], "freeze": ["k_proj"], "patterns": []},
            "adapter.rank, adapter.patterns",
        ),
        ({"bias": "lora_only", "modules_to_save": ["norm"]}, "oft", {"bias": "none", "modules_to_save": ["norm"]}, "adapter.bias"),
        ({"bias": "all", "dora": True}, "oft", {"bias": "all", "dora": False}, "adapter.dora"),
        ({"dropout": 0.5, "layers": "1:"}, "loha", {"dropout": 0.0, "layers": "1:"}, "adapter.dropout"),
        ({"targets": ["q_proj"], "layers": [1]}, "p_tuning", {"targets": "all-linear", "layers": None}, "adapter.targets, adapter.layers"),
        ({"freeze": ["lm_head"], "rank": 4}, "none", {"freeze": ["lm_head"], "rank": None}, "adapter.rank"),
        ({"method": "vera", "rank": 4, "d_initial": 0.5}, "lora", {"rank": 8, "alpha": 16.0}, "adapter.rank, adapter.d_initial"),
        ({"method": "vera", "rank": 4, "d_initial": 0.5}, "pvera", {"rank": 256}, "adapter.rank, adapter.d_initial"),
    ],
)  # fmt: skip
def test_other_method_keeps_what_means_the_same_for_it(
    adapter: dict[str, Any], method: str, kept: dict[str, Any], replaced: str
) -> None:
    loaded = load(adapter, f"adapter.method={method}")
    assert {name: getattr(loaded.recipe.adapter, name) for name in kept} == kept
    assert loaded.recipe.adapter.options == {}
    assert loaded.notes == (f"adapter.method on the command line replaces {replaced} (the recipe)",)


def test_method_and_option_on_the_command_line() -> None:
    adapter = load({"rank": 4}, "adapter.method=vera", "adapter.d_initial=0.5").recipe.adapter
    assert (adapter.rank, adapter.options) == (256, {"d_initial": 0.5})
    with pytest.raises(RecipeError, match=r"command line  adapter.alpha: has no effect for adapter.method: vera"):
        load({"alpha": 4}, "adapter.method=vera", "adapter.alpha=2")


def test_derived_recipe_keeps_the_options() -> None:
    loaded = load({"method": "vera", "d_initial": 0.5})
    assert loaded.derive({"train.lr": 1.0}).recipe.adapter.options == {"d_initial": 0.5}
    assert loaded.derive({"adapter.projection_prng_key": 3}).recipe.adapter.options == {
        "d_initial": 0.5,
        "projection_prng_key": 3,
    }
    with pytest.raises(RecipeError, match=r"adapter.rnk: unknown key; did you mean `rank`"):
        loaded.derive({"adapter.rnk": 3})


def test_schema_lists_the_options_and_forbids_others() -> None:
    section = recipe_schema()["$defs"]["AdapterSection"]
    assert section["additionalProperties"] is False
    assert "vera" in section["properties"]["d_initial"]["description"]
    options = {name for spec in METHODS.values() for name in spec.options}
    keys = set(AdapterSection.model_fields)
    assert set(section["properties"]) == options | keys
    # Else a recipe's value would go to the key and never to the option.
    assert not options & keys
    names = section["properties"]["init_weights"]["description"]
    assert all(f"{spec.name}:" in names for spec in METHODS.values() if "init_weights" in spec.options)


@pytest.mark.parametrize(
    ("adapter", "config"),
    [
        ({"method": "vera", "rank": 16, "d_initial": 0.5, "dropout": 0.25}, {"r": 16, "d_initial": 0.5, "vera_dropout": 0.25}),
        ({"method": "fourierft", "n_frequency": 9, "random_loc_seed": None}, {"n_frequency": 9, "random_loc_seed": None}),
        ({"method": "fourierft", "n_frequency": 9}, {"random_loc_seed": 777}),
        ({"method": "adalora", "rank": 6, "init_r": 9}, {"target_r": 6, "init_r": 9, "lora_alpha": 8, "total_step": 1}),
        ({"method": "loha"}, {"r": 8, "alpha": 8}),
        ({"method": "ia3"}, {"feedforward_modules": set()}),
        ({"method": "p_tuning"}, {"num_virtual_tokens": 20}),
        ({"method": "boft", "bias": "boft_only", "boft_block_size": 8}, {"bias": "boft_only", "boft_block_size": 8}),
        ({"rslora": True, "init_lora_weights": "gaussian"}, {"use_rslora": True, "init_lora_weights": "gaussian", "r": 8}),
        ({"init_lora_weights": "loftq"}, {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}),
    ],
)  # fmt: skip
def test_options_reach_pefts_configuration(
    tiny: Callable[..., Any], adapter: dict[str, Any], config: dict[str, Any]
) -> None:
    assembly = Assembly(load(adapter))
    made = check_adapter(
        tiny("tiny:llama", adapter=False), assembly.method.name, **assembly.adapter_places, **assembly.adapter_options
    )
    assert {name: getattr(made, name) for name in config} == config
