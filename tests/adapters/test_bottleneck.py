"""Bottlenecks in every family: their places, their start, their gradients, their files; and what a ``PeftModel`` can do."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file

from peftlab.adapters import add_adapter, report, save_adapter
from peftlab.adapters.bottleneck import (
    STYLES,
    BottleneckConfig,
    add_bottlenecks,
    bottleneck_places,
    load_bottlenecks,
)
from peftlab.adapters.merge import fold
from peftlab.errors import RecipeError
from tests.adapters.bottleneck_examples import adapted, config_of, filled, inputs_of, logits, make
from tests.family_examples import make_config, make_model

_BERT = ("attention.output.dropout", "output.dropout", "output.LayerNorm")
_LLAMA = ("self_attn", "mlp", None)
# The output of the attention, that of the feed-forward, the norm after it in a post-norm block; the number of blocks.
FAMILIES: dict[str, tuple[str, str, str | None, int]] = {
    "BertConfig": (*_BERT, 2),
    "RobertaConfig": (*_BERT, 2),
    "ElectraConfig": (*_BERT, 2),
    "DebertaV2Config": (*_BERT, 2),
    "MPNetConfig": ("attention.dropout", "output.dropout", "output.LayerNorm", 2),
    "DistilBertConfig": ("attention", "ffn", "output_layer_norm", 2),
    "AlbertConfig": ("attention.output_dropout", "ffn_output", "full_layer_layer_norm", 1),
    "ModernBertConfig": ("attn", "mlp", None, 2),
    "GPT2Config": ("attn", "mlp", None, 2),
    "GPTNeoXConfig": ("post_attention_dropout", "post_mlp_dropout", None, 2),
    "OPTConfig": ("self_attn", "fc2", None, 2),
    "BloomConfig": ("self_attention.dense", "mlp.dense_4h_to_h", None, 2),
    "FalconConfig": ("self_attention", "mlp", None, 2),
    "LlamaConfig": (*_LLAMA, 2),
    "Qwen2Config": (*_LLAMA, 2),
    "MistralConfig": (*_LLAMA, 2),
    "MixtralConfig": (*_LLAMA, 2),
    "CohereConfig": (*_LLAMA, 2),
    "PhiConfig": (*_LLAMA, 2),
    "Gemma2Config": ("post_attention_layernorm", "post_feedforward_layernorm", None, 2),
    "T5Config": ("layer.0.dropout", "dropout", None, 4),
    "BartConfig": ("self_attn", "fc2", "final_layer_norm", 4),
    "ViTConfig": ("attention", "mlp", None, 2),
    "SwinConfig": ("drop_path", "mlp", None, 2),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_bottleneck_places_of_a_family(family: str, style: str) -> None:
    attention, feed_forward, norm, num_blocks = FAMILIES[family]
    places = bottleneck_places(make(family), config_of(style))
    per_block = 2 if style == "houlsby" else 1
    assert len(places) == per_block * num_blocks
    ends = list(places)
    wanted = (norm or feed_forward) if style == "pfeiffer" else feed_forward
    assert all(end.endswith(f".{wanted}") for end in ends[per_block - 1 :: per_block])
    if style == "houlsby":
        assert all(end.endswith(f".{attention}") for end in ends[::2])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_bottlenecks_start_learn_switch_off_and_reload(family: str, style: str, tmp_path: Path) -> None:
    base = make(family)
    before = logits(base)
    model = add_bottlenecks(base, config_of(style, scaling="learned"))
    # The up-projection starts at 0, so nothing is added, not even a rounding.
    assert torch.equal(logits(model), before)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".bottleneck.default." in name for name in trained)
    filled(model)
    model(**inputs_of(model)).logits.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == list(trained)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())

    after = logits(model)
    assert (after - before).abs().max() > 1e-3 * before.abs().max()
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after)

    model.save_pretrained(str(tmp_path))
    again = load_bottlenecks(make(family), tmp_path)
    assert torch.equal(logits(again), after)
    with again.disable_adapter():
        assert torch.equal(logits(again), before)
    assert not any(p.requires_grad for p in again.parameters())


def test_bottlenecks_of_t5_are_in_both_stacks_and_not_on_cross_attention() -> None:
    names = list(bottleneck_places(make("T5Config"), config_of("houlsby")))
    blocks = [f"transformer.{stack}.block.{i}.layer" for stack in ("encoder", "decoder") for i in (0, 1)]
    assert names == [
        f"{block}.{layer}.dropout" for block in blocks for layer in ((0, 1) if "encoder" in block else (0, 2))
    ]


def test_bottlenecks_of_swin_have_the_widths_of_their_stages() -> None:
    model = adapted("SwinConfig", "parallel")
    shapes = [tuple(layer.bottleneck["default"].down.weight.shape) for layer in model.bottleneck_layers()]
    assert shapes == [(4, 16), (8, 32)]


def test_bottlenecks_of_albert_are_shared_by_its_layers() -> None:
    model = adapted("AlbertConfig", "pfeiffer")
    calls = []
    (layer,) = model.bottleneck_layers()
    layer.bottleneck["default"].register_forward_hook(lambda *_: calls.append(1))
    logits(model)
    assert len(calls) == model.config.num_hidden_layers == 2


@pytest.mark.parametrize("style", STYLES)
def test_bottlenecks_on_nf4_weights(style: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    def base() -> Any:
        return tiny("tiny:llama", adapter=False, quantize="nf4", dtype="bfloat16")

    before = logits(base())
    model = add_bottlenecks(base(), config_of(style))
    assert torch.equal(logits(model), before)
    layers = model.bottleneck_layers()
    assert {layer.place.width for layer in layers} == {model.config.hidden_size}
    filled(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    output = model(**inputs_of(model)).logits
    assert output.dtype == before.dtype and not torch.equal(output, before)
    output.float().square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits(load_bottlenecks(base(), tmp_path)), output.detach())


def test_bottlenecks_in_bfloat16_train_float32_and_keep_the_dtype_of_the_model() -> None:
    model = filled(add_bottlenecks(make("BertConfig").bfloat16(), config_of("pfeiffer")))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("style", STYLES)
def test_bottlenecks_under_autocast_with_and_without_casts_of_their_inputs(style: str) -> None:
    gradients = []
    for casts in (contextlib.nullcontext, disable_input_dtype_casting):
        model = adapted("BertConfig", style, scaling="learned")
        with torch.autocast("cpu", torch.bfloat16), casts(model):
            model(**inputs_of(model)).logits.float().square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for cast, uncast in zip(*gradients, strict=True):
        assert cast.dtype == torch.float32 and cast.abs().max() > 0
        # bfloat16 keeps 8 bits; autocast rounds to it either way, but in other places.
        torch.testing.assert_close(uncast, cast, rtol=0, atol=0.1 * float(cast.abs().max()))


def test_parallel_bottlenecks_beside_prefix_tuning_are_the_mix_and_match_adapter() -> None:
    config = make_config("LlamaConfig")
    model = filled(add_bottlenecks(make_model(config, "AutoModelForCausalLM"), config_of("parallel")))
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    mixed = peft.get_peft_model(model.get_base_model(), prefix)
    for name, parameter in mixed.named_parameters():
        parameter.requires_grad_("prompt" in name or ".bottleneck." in name)  # PEFT froze the bottlenecks with the base
    mixed(**inputs_of(mixed)).logits.square().sum().backward()
    trained = [p for p in mixed.parameters() if p.requires_grad]
    assert len(trained) == 1 + 4 * 2
    assert all(p.grad.abs().max() > 0 for p in trained)


def test_bottlenecks_are_found_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = make_model(make_config("LlamaConfig"), "AutoModelForCausalLM")
    assert list(bottleneck_places(model, config_of("pfeiffer"))) == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_find_blocks_leaves_the_model_as_it_was() -> None:
    model = make("LlamaConfig").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    bottleneck_places(model, config_of("houlsby"))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.model.layers.modules())


def test_bottleneck_layers_chosen_by_index() -> None:
    model = adapted("BartConfig", "pfeiffer", layers=(3, 1, 1))
    assert model.peft_config["default"].bottleneck.layers == (1, 3)
    assert [layer.place.output for layer in model.bottleneck_layers()] == [
        "model.encoder.layers.1.fc2",
        "model.decoder.layers.1.fc2",
    ]


@pytest.mark.parametrize(("factor", "width"), [(16, 2), (0.5, 64), (5, 6), (1000, 1)])
def test_bottleneck_width_is_rounded_down_to_at_least_one(factor: float, width: int) -> None:
    layer = add_bottlenecks(make("BertConfig"), BottleneckConfig(reduction_factor=factor)).bottleneck_layers()[0]
    assert layer.bottleneck["default"].down.out_features == width


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        ({"style": "pfeifer"}, "adapter.style", "did you mean 'pfeiffer'"),
        ({"reduction_factor": 0}, "adapter.reduction_factor", "expected a number above 0, found 0"),
        ({"non_linearity": "rellu"}, "adapter.non_linearity", "no activation 'rellu'; did you mean 'relu'"),
        ({"dropout": 1.0}, "adapter.dropout", "found 1.0"),
        ({"scaling": "lerned"}, "adapter.scaling", "expected a number or 'learned', found 'lerned'"),
        ({"layers": ()}, "adapter.layers", "found none"),
        ({"layers": (-1,)}, "adapter.layers", "indices of layers from 0, found -1"),
    ],
)
def test_bottleneck_config_refuses(options: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        BottleneckConfig(**options)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("family", "options", "key", "message"),
    [
        ("BertConfig", {"layers": (0, 2)}, "adapter.layers", "from 0 to 1, the blocks of BertForSeq.*; found 2"),
        ("ConvNextConfig", {}, "adapter.method", "ConvNextForImageClassification has no list of equal blocks with"),
        ("MambaConfig", {}, "adapter.method", "MambaForCausalLM has no list of equal blocks with attention"),
        ("XLMConfig", {}, "adapter.method", "need one feed-forward output .* of XLMForSequenceClassification"),
        ("XLNetConfig", {"style": "houlsby"}, "adapter.method", "need an attention output .* of XLNetForSeq"),
    ],
)
def test_add_bottlenecks_refuses_a_model(family: str, options: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        add_bottlenecks(make(family), BottleneckConfig(**options))
    assert caught.value.key == key


def test_bottleneck_modules_to_save_are_trained_saved_and_switched_off(tmp_path: Path) -> None:
    base = make("BertConfig")
    before = logits(base)
    model = add_bottlenecks(base, config_of("pfeiffer"), modules_to_save=["classifier"], task_type="SEQ_CLS")
    assert report(model).whole == ("classifier",)
    filled(model)
    after = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    save_adapter(model, tmp_path)
    assert "base_model.model.classifier.weight" in load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits(load_bottlenecks(make("BertConfig"), tmp_path)), after)
    with pytest.raises(RecipeError, match="did you mean 'classifier'"):
        add_bottlenecks(make("BertConfig"), config_of("pfeiffer"), modules_to_save=["clasifier"])


def test_bottleneck_model_has_what_the_engine_uses_of_a_peft_model() -> None:
    base = make("LlamaConfig")
    model = add_bottlenecks(base, config_of("parallel"), task_type="CAUSAL_LM")
    assert model.get_base_model() is model.base_model.model is base
    assert all(name.startswith("base_model.model.") for name, _ in model.named_parameters())
    stored = model.peft_config["default"]
    assert (stored.peft_type.value, stored.task_type, stored.is_prompt_learning) == ("BOTTLENECK", "CAUSAL_LM", False)
    assert (model.active_adapter, model.active_adapters) == ("default", ["default"])
    assert (model.config, model.device, model.dtype) == (base.config, base.device, base.dtype)
    counts = report(model)
    assert counts.kinds == {"mlp": 2}
    # Per layer: 32 x 8 and 8 x 32 weights, 8 and 32 biases.
    assert counts.num_trained == 2 * (2 * 32 * 8 + 8 + 32)
    assert counts.num_total == sum(p.numel() for p in model.parameters())
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = model.nonsense


@pytest.mark.parametrize("family", ["BertConfig", "LlamaConfig", "T5Config", "SwinConfig"])
def test_bottlenecks_keep_the_lists_of_hidden_states_and_attentions(family: str) -> None:
    wanted = {"output_hidden_states": True, "output_attentions": True}
    outputs = [
        model(**inputs_of(model), **wanted)
        for model in (
            make(family, attn_implementation="eager"),
            filled(add_bottlenecks(make(family, attn_implementation="eager"), config_of("houlsby"))),
        )
    ]
    names = [name for name in outputs[0] if name.endswith(("hidden_states", "attentions"))]
    assert len(names) >= 2
    for name in names:
        base, ours = (output[name] for output in outputs)
        assert [x.shape for x in ours] == [x.shape for x in base]
        assert torch.equal(ours[0], base[0]) == (name != "cross_attentions")  # before the first adapter
        assert not torch.equal(ours[-1], base[-1])


def test_bottlenecks_refuse_to_merge() -> None:
    model = adapted()
    for merge in (model.merge_and_unload, model.merge_adapter, model.bottleneck_layers()[0].merge, lambda: fold(model)):
        with pytest.raises(ValueError, match="a non-linearity stands between its two matrices"):
            merge()


def test_bottlenecks_generate_with_a_cache() -> None:
    config = make_config("LlamaConfig")
    model = filled(add_bottlenecks(make_model(config, "AutoModelForCausalLM"), config_of("pfeiffer")))
    prompt = torch.tensor([[5, 6, 7]])
    texts = [
        model.generate(input_ids=prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*texts) and texts[0].shape == (1, 9)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_bottleneck_gradients_with_checkpointing(style: str, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted("LlamaConfig", style)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        model(**inputs_of(model)).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("style", STYLES)
def test_bottlenecks_survive_a_deep_copy(style: str) -> None:
    model = adapted("LlamaConfig", style)
    want = logits(model)
    other = copy.deepcopy(model)
    filled(model, seed=1)
    assert torch.equal(logits(other), want)
    assert not torch.equal(logits(model), want)


def test_bottleneck_dropout_acts_in_training_only() -> None:
    model = adapted(dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(logits(model), logits(model))


def test_second_bottleneck_is_frozen_and_can_be_switched_to(tmp_path: Path) -> None:
    first, second = (filled(adapted(), seed) for seed in (1, 2))
    second.save_pretrained(str(tmp_path / "second"))
    add_adapter(first, tmp_path / "second", name="teacher")
    want = logits(first)
    assert not any(p.requires_grad for n, p in first.named_parameters() if ".teacher." in n)
    first.set_adapter("teacher")
    assert torch.equal(logits(first), logits(second))
    assert {n.split(".bottleneck.")[1].split(".")[0] for n, p in first.named_parameters() if p.requires_grad} == {
        "teacher"
    }
    first.set_adapter("default")
    assert torch.equal(logits(first), want)
    first.save_pretrained(str(tmp_path / "both"))
    assert torch.equal(logits(load_bottlenecks(make("BertConfig"), tmp_path / "both" / "teacher")), logits(second))
    adapted(style="pfeiffer").save_pretrained(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"has the places of the first \(houlsby, layers all\); this one is pfeiffer"):
        first.load_adapter(str(tmp_path / "other"), adapter_name="other")
