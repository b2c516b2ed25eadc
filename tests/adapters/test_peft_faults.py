"""The faults of PEFT in docs/adapters.md, each shown with PEFT alone.

When PEFT mends one, its test fails. Then remove its entry from the page, and the workaround that the test's docstring names.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peftlab.models import find_pretrained, load_model
from tests.family_examples import AUTO_CLASSES, CLASSIFIERS, make_config, make_model

PAGE = Path(__file__).resolve().parents[2] / "docs/adapters.md"
IDS = torch.arange(4, 20)[None]
WIDTH = 64
SHOWN: set[str] = set()


def shows(entry: str) -> Callable[[Any], Any]:
    """Marks a test as the evidence of the entry of the page that begins with these bold words."""
    SHOWN.add(entry)
    return lambda test: test


@pytest.fixture(autouse=True)
def same_draws() -> None:
    torch.manual_seed(0)


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def adapted(layer: nn.Module, config: type, **options: Any) -> Any:
    """A PeftModel of one layer; ``.base_model.model.layer`` is PEFT's layer."""
    return peft.get_peft_model(Holder(layer), config(target_modules=["layer"], **options)).eval()


def quantized(storage: str) -> Any:
    import bitsandbytes as bnb

    plain = nn.Linear(WIDTH, WIDTH)
    if storage == "int8":
        layer = bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(WIDTH, WIDTH, quant_type="nf4", compute_dtype=torch.float32)
        layer.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


def llama(quantize: str = "none") -> Any:
    pretrained = find_pretrained("tiny:llama")
    return load_model(pretrained, auto_class="AutoModelForCausalLM", device="cpu", quantize=quantize)


def classifier(family: str) -> Any:
    return make_model(make_config(family, CLASSIFIERS), AUTO_CLASSES["seq_cls"])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return result


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_every_entry_of_the_page_is_shown_here() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("\n## What PEFT ")[2].partition("\n## ")[0]
    entries = re.findall(r"^- \*\*(.+?)\*\*", section, re.MULTILINE)
    assert len(entries) == section.count("\n- ") > 10
    assert set(entries) == SHOWN


@shows("LayerNorm tuning")
def test_merge_of_layernorm_tuning_keeps_the_wrapper_of_the_head(tmp_path: Path) -> None:
    """Worked around in adapters/merge.py, ``_unwrap``."""
    base = classifier("BertConfig")
    config = peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"])
    model = peft.get_peft_model(base, config)
    model.base_model.model.classifier.modules_to_save["default"].weight.data += 1
    trained = logits(model)
    merged = model.merge_and_unload()
    assert type(merged.classifier).__name__ == "ModulesToSaveWrapper"
    merged.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert "classifier.weight" not in names and "classifier.modules_to_save.default.weight" in names
    assert relative(logits(type(base).from_pretrained(tmp_path)), trained) > 0.1


HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "vera": ("VeraConfig", {"r": 2}),
    "loha": ("LoHaConfig", {"r": 2}),
    "oft": ("OFTConfig", {"oft_block_size": 4}),
}


@shows("Heads of more than one layer")
@pytest.mark.parametrize("method", HEADS)
@pytest.mark.parametrize(
    ("family", "layer", "head"), [("RobertaConfig", "query", "classifier"), ("T5Config", "q", "classification_head")]
)
def test_merge_fails_on_a_head_of_two_layers(method: str, family: str, layer: str, head: str) -> None:
    """Worked around in adapters/merge.py, ``_unwrap``. LoRA is not concerned."""
    name, options = HEADS[method]
    config = getattr(peft, name)(task_type="SEQ_CLS", target_modules=[layer], modules_to_save=[head], **options)
    with pytest.raises(AttributeError, match="ClassificationHead' object has no attribute 'weight'"):
        peft.get_peft_model(classifier(family), config).merge_and_unload()


@shows("Layer replication")
def test_merge_adds_the_updates_of_all_replicas_to_one_weight() -> None:
    """Worked around in adapters/merge.py, ``_unshare``."""
    options = {"layer_replication": [[0, 2], [0, 2]], "target_modules": ["q_proj"], "init_lora_weights": False}
    base = llama()
    start = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, **options))
    trained = logits(model)
    layers = [block.self_attn.q_proj for block in model.base_model.model.model.layers]
    both = sum(layers[i].get_delta_weight("default") for i in (0, 2))
    merged = model.merge_and_unload()
    weights = [block.self_attn.q_proj.weight for block in merged.model.layers]
    assert weights[0] is weights[2]
    torch.testing.assert_close(weights[0], start + both)
    assert relative(logits(merged), trained) > 1e-3


@shows("OFT on convolutions")
def test_merged_rotation_of_a_convolution_is_another_function() -> None:
    """Refused by assembly/merging.py, ``_failures``."""
    model = adapted(nn.Conv2d(4, 8, 3), peft.OFTConfig, oft_block_size=4, init_weights=False)
    x = torch.randn(1, 4, 8, 8)
    trained = model(x)
    assert relative(model.merge_and_unload()(x), trained) > 0.5


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x, x, x)[0]
        return result


@shows("LoRA on torch's own attention")
@torch.no_grad()
def test_update_of_the_output_projection_of_torchs_attention_counts_twice() -> None:
    """Worked around in adapters/merge_check.py, ``Formulas``."""
    plain = Attention()
    model = peft.get_peft_model(
        copy.deepcopy(plain), peft.LoraConfig(target_modules=["layer"], r=2, lora_alpha=2, init_lora_weights=False)
    ).eval()
    layer, x = model.base_model.model.layer, torch.randn(5, 1, 8)
    inside = layer.base_layer.out_proj
    into, out = (part.lora_B["default"].weight @ part.lora_A["default"].weight for part in (layer, inside))
    trained = model(x)
    plain.layer.in_proj_weight += into
    plain.layer.out_proj.weight += out
    assert relative(trained, plain(x)) > 0.1
    plain.layer.out_proj.weight += out
    torch.testing.assert_close(trained, plain(x))
    torch.testing.assert_close(model.merge_and_unload()(x), plain(x))


@shows("LoKr on `nn.Conv1d`")
@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.Conv2d])
def test_product_of_lokr_on_a_convolution_in_one_dimension_is_no_kronecker_product(convolution: type) -> None:
    """Worked around in adapters/layer_rules.py, ``_lokr``. On ``nn.Conv2d`` PEFT trains the paper's product."""
    model = adapted(convolution(8, 8, 3), peft.LoKrConfig, r=8, init_weights=False)
    layer = model.base_model.model.layer
    small, large = layer.lokr_w1["default"], layer.lokr_w2["default"]
    update = layer.get_delta_weight("default") / layer.scaling["default"]
    product = torch.einsum("ab,cd...->acbd...", small, large).reshape(update.shape)
    assert (relative(update, product) > 1) == (convolution is nn.Conv1d)


@shows("Unmerging")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerged_weight_is_another(dtype: torch.dtype) -> None:
    """Worked around in adapters/unmerge.py, ``ExactUnmerge``."""
    base = nn.Linear(64, 64).to(dtype)
    before = base.weight.detach().clone()
    model = adapted(base, peft.LoraConfig, init_lora_weights=False)
    model.merge_adapter()
    model.unmerge_adapter()
    assert int((base.weight != before).sum()) > 100  # of 4,096 values


@shows("IA3")
def test_adapter_of_ia3_on_all_linear_layers_cannot_be_loaded(tmp_path: Path) -> None:
    """Worked around in specs/methods.py, the defaults of ``ia3``."""
    peft.get_peft_model(llama(), peft.IA3Config(target_modules="all-linear")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`feedforward_modules` should be a subset of `target_modules`"):
        peft.PeftModel.from_pretrained(llama(), tmp_path)


BYTES = {"deft": "DeftConfig", "peanut": "PeanutConfig", "hra": "HRAConfig"}


@shows("DEFT, PEANuT and HRA on int8")
@pytest.mark.parametrize("method", BYTES)
def test_stored_bytes_are_taken_for_the_weight(method: str) -> None:
    """Refused by recipe/rules.py, ``quantized_weights_are_not_trained``. The reference is the same adapter on the weight that the
    bytes stand for."""
    options = {} if method == "deft" else {"init_weights": False}
    base = quantized("int8")
    plain = nn.Linear(WIDTH, WIDTH, bias=False)
    plain.weight.data = base.weight.data.float() * base.weight.SCB[:, None] / 127
    plain.bias = base.bias
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(base(x), plain(x), rtol=1e-3, atol=1e-3)
    outputs = []
    for layer in (base, plain):
        torch.manual_seed(1)
        outputs.append(adapted(layer, getattr(peft, BYTES[method]), **options)(x))
    assert relative(*outputs) > 1


@shows("Uni-LoRA on quantized weights")
@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_scales_of_unilora_are_rounded_to_bytes(storage: str) -> None:
    """Refused by recipe/rules.py, ``quantized_weights_are_not_trained``. Each scale is 1 / sqrt(n), where n factors share a value."""
    model = adapted(quantized(storage), peft.UniLoraConfig, r=4, theta_d_length=128)
    layer = model.base_model.model.layer
    assert layer.unilora_scales_A["default"].dtype in (torch.int8, torch.uint8)
    assert not layer.unilora_scales_A["default"].any()
    x = torch.randn(3, WIDTH)
    model.base_model.unilora_theta_d["default"].data += 1
    torch.testing.assert_close(model(x), layer.base_layer(x))
    dense = adapted(nn.Linear(WIDTH, WIDTH), peft.UniLoraConfig, r=4, theta_d_length=128).base_model.model.layer
    assert set(dense.unilora_scales_A["default"].unique().tolist()) == {0.5}


def mixture(folder: Path, quantize: str = "none") -> Any:
    """PEFT's X-LoRA over two adapters that are written to ``folder``."""
    for name in ("one", "two"):
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM", lora_alpha=8
        )
        peft.get_peft_model(llama(), config).save_pretrained(folder / name)
    base = llama(quantize)
    base.config.use_cache = False
    adapters = {"0": str(folder / "one"), "1": str(folder / "two")}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=64, adapters=adapters, layerwise_scalings=True)
    return peft.get_peft_model(base, config)


@shows("X-LoRA")
def test_saved_xlora_lacks_its_classifier(tmp_path: Path) -> None:
    """Worked around in adapters/mixture.py, ``mixture_state``."""
    model = mixture(tmp_path)
    layer = model.base_model.internal_xlora_classifier.layers[0]
    layer.weight.data.copy_(torch.randn(layer.weight.shape))
    trained = logits(model)
    model.save_pretrained(tmp_path / "mix")
    names = {n for n, t in model.state_dict().items() if "xlora_classifier" in n}
    assert names and not names & set(load_file(tmp_path / "mix/adapter_model.safetensors"))
    base = llama()
    base.config.use_cache = False
    assert relative(logits(peft.PeftModel.from_pretrained(base, tmp_path / "mix")), trained) > 1e-3


@shows("X-LoRA")
@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_forward_of_xlora_fails_on_quantized_weights(tmp_path: Path, storage: str) -> None:
    """Refused by recipe/rules.py, ``quantized_weights_are_not_trained``."""
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'scalings'"):
        logits(mixture(tmp_path, storage))


@shows("P-tuning")
def test_file_of_p_tuning_lacks_the_network(tmp_path: Path) -> None:
    """Worked around in adapters/full.py, ``save_state``, which writes checkpoints."""
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8)
    model = peft.get_peft_model(llama(), config)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum("mlp_head" in name for name in trained) == 6
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"prompt_embeddings"}
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)


@shows("AdaLoRA")
def test_file_of_adalora_lacks_the_averages_and_the_ranks_that_come_back(tmp_path: Path) -> None:
    """Worked around in adapters/schedule.py, ``schedule_state``."""
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        init_r=4,
        target_r=2,
        total_step=9,
        tinit=0,
        tfinal=2,
        deltaT=1,
    )
    model = peft.get_peft_model(llama(), config)
    for step in range(1, 6):
        model(input_ids=IDS, labels=IDS).loss.backward()
        model.base_model.update_and_allocate(step)
    model.save_pretrained(tmp_path)
    allocator = model.base_model.rankallocator
    assert allocator.exp_avg_ipt
    saved = load_file(tmp_path / "adapter_model.safetensors")
    in_model = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert not again.base_model.rankallocator.exp_avg_ipt
    assert sum(t.numel() for t in saved.values()) < in_model
