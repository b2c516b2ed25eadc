"""LoRA through PEFT: what is adapted, files that plain PEFT reads, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftlab.adapters import adapter_files as files_module
from peftlab.adapters import check_adapter_files, inject, load_adapter, report, save_adapter, try_injection
from peftlab.errors import ArtifactError, RecipeError
from peftlab.specs.methods import METHODS
from tests.family_examples import READERS_OF_IMAGES, WRITERS, make_config
from tests.processes import Processes

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def base(tiny: Callable[..., Any]) -> Any:
    return tiny("tiny:llama", adapter=False)


def adapted(model: Any) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}


def lora(base: Any, **options: Any) -> Any:
    return inject(base, "lora", **{"peft_type": "CAUSAL_LM", "rank": 4, "alpha": 8, **options})


def test_inject_all_linear_leaves_out_the_head(base: Any) -> None:
    model = lora(base)
    assert {name.rsplit(".", 1)[-1] for name in adapted(model)} == LINEARS
    counts = report(model)
    assert counts.num_modules == 14
    assert counts.kinds == dict.fromkeys(LINEARS, 2)
    by_hand = sum(4 * (m.in_features + m.out_features) for n, m in base.named_modules() if hasattr(m, "lora_A"))
    assert counts.num_trained == by_hand == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert str(counts).startswith(f"{by_hand:,} of ")


def test_inject_targets_match_name_endings(base: Any) -> None:
    model = lora(base, targets=["q_proj", "0.mlp.up_proj"])
    assert adapted(model) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
    }


def test_inject_refuses_a_regex_that_matches_more_than_linears(base: Any) -> None:
    with pytest.raises(
        RecipeError, match=r"also matches 'model.layers.1.self_attn', a LlamaAttention, which cannot have"
    ):
        lora(base, targets=r".*layers\.1\..*")


def test_inject_regex_matches_whole_names(base: Any) -> None:
    assert adapted(lora(base, targets=r".*layers\.1\..*[qv]_proj")) == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    }


def test_inject_into_bert_trains_the_new_head(tiny: Callable[..., Any]) -> None:
    model = tiny("tiny:bert", targets=["query", "value"])
    assert report(model).kinds == {"query": 2, "value": 2}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("classifier.modules_to_save" in n for n in trained), "the new head has to be trained"
    assert not any("classifier" in n for n in adapted(model))


@pytest.mark.parametrize(
    ("options", "message", "key"),
    [
        ({"targets": ["q_porj"]}, r"'q_porj' matches no module; did you mean 'q_proj'\?", "adapter.targets"),
        ({"targets": ["q_proj", "zzz"]}, r"'zzz' matches no module \(this model has .*up_proj", "adapter.targets"),
        ({"targets": ["proj"]}, "'proj' matches no module", "adapter.targets"),
        ({"targets": ["self_attn"]}, "'self_attn' matches no module", "adapter.targets"),
        ({"targets": "q_proj"}, "the regular expression 'q_proj' matches none of the 16", "adapter.targets"),
        (
            {"modules_to_save": ["lm_haed"]},
            "'lm_haed' matches no module; did you mean 'lm_head'",
            "adapter.modules_to_save",
        ),
    ],
)
def test_inject_refuses_targets_that_match_nothing(base: Any, options: Any, message: str, key: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        lora(base, **options)
    assert caught.value.key == key
    assert not any(hasattr(m, "lora_A") for m in base.modules())


def randomize(model: Any) -> None:
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=g) * 0.05)


VARIANTS = [
    pytest.param({}, {"use_rslora": False}, id="lora"),
    pytest.param({"rslora": True}, {"use_rslora": True}, id="rslora"),
    pytest.param({"dora": True}, {"use_dora": True}, id="dora"),
    pytest.param({"targets": ["q_proj", "v_proj"], "dropout": 0.5}, {"lora_dropout": 0.5}, id="dropout"),
    pytest.param({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, id="modules_to_save"),
    pytest.param({"modules_to_save": ["norm"]}, {"modules_to_save": ["norm"]}, id="save-norm"),
    pytest.param(
        {"targets": ["embed_tokens", "q_proj"]}, {"target_modules": ["embed_tokens", "q_proj"]}, id="embedding"
    ),
    pytest.param({"targets": r".*layers\.1.*q_proj"}, {"target_modules": r".*layers\.1.*q_proj"}, id="regex"),
]
IDS = torch.tensor([[5, 9, 33, 100, 7]])


@pytest.mark.parametrize(("options", "config"), VARIANTS)
def test_save_adapter_files_load_in_plain_peft(
    tiny: Callable[..., Any], tmp_path: Path, options: Any, config: dict[str, Any]
) -> None:
    from peft import PeftModel

    base = tiny("tiny:llama", adapter=False)
    model = lora(base, **options).eval()
    untouched = tiny("tiny:llama", adapter=False)(input_ids=IDS).logits
    randomize(model)
    save_adapter(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {k: written[k] for k in config} == config
    assert (written["r"], written["lora_alpha"], written["task_type"]) == (4, 8, "CAUSAL_LM")
    want = model(input_ids=IDS).logits
    assert float((want - untouched).abs().max()) > 1e-3
    plain = PeftModel.from_pretrained(tiny("tiny:llama", adapter=False), str(tmp_path)).eval()
    # PEFT sums base and adapter in the other order.
    torch.testing.assert_close(plain(input_ids=IDS).logits, want, rtol=1e-5, atol=1e-6)
    ours = load_adapter(tiny("tiny:llama", adapter=False), tmp_path).eval()
    assert torch.equal(ours(input_ids=IDS).logits, want)
    assert not any(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_save_adapter_saves_trained_biases(tiny: Callable[..., Any], tmp_path: Path, bias: str) -> None:
    from peft import PeftModel

    base = tiny("tiny:bert", adapter=False)
    model = inject(base, "lora", peft_type="SEQ_CLS", rank=4, alpha=8, targets=["query"], bias=bias).eval()
    randomize(model)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["bias"] == bias
    names = set(load_file(str(tmp_path / "adapter_model.safetensors")))
    assert any(n.endswith("query.bias") or "query.base_layer.bias" in n for n in names)
    assert any("LayerNorm.bias" in n for n in names) == (bias == "all")
    want = model(input_ids=IDS).logits
    plain = PeftModel.from_pretrained(tiny("tiny:bert", adapter=False), str(tmp_path)).eval()
    # PEFT sums base and adapter in the other order.
    torch.testing.assert_close(plain(input_ids=IDS).logits, want, rtol=1e-5, atol=1e-6)
    ours = load_adapter(tiny("tiny:bert", adapter=False), tmp_path).eval()
    assert torch.equal(ours(input_ids=IDS).logits, want)


def test_save_adapter_keeps_a_fractional_alpha(base: Any, tmp_path: Path) -> None:
    model = lora(base, alpha=2.5)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 2.5


def saved(tiny: Callable[..., Any], folder: Path, **options: Any) -> Path:
    save_adapter(tiny("tiny:llama", **options), folder)
    return folder


@pytest.mark.parametrize("change", ["width", "fewer-layers", "bert"])
def test_load_adapter_refuses_an_adapter_of_another_model(
    tiny: Callable[..., Any], tmp_path: Path, change: str
) -> None:
    import transformers

    from peftlab.models.tiny import tiny_config

    folder = saved(tiny, tmp_path / "a")
    sizes = {"width": {"intermediate_size": 96}, "fewer-layers": {"num_hidden_layers": 1}}
    if change == "bert":
        other = tiny("tiny:bert", adapter=False)
    else:
        config = tiny_config("tiny:llama")
        for key, value in sizes[change].items():
            setattr(config, key, value)
        other = transformers.LlamaForCausalLM(config)
    with pytest.raises(ArtifactError, match=r"made for another model \(tiny:llama\)"):
        load_adapter(other, folder)


def test_load_adapter_refuses_a_missing_tensor(tiny: Callable[..., Any], tmp_path: Path) -> None:
    folder = saved(tiny, tmp_path / "a")
    path = str(folder / "adapter_model.safetensors")
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match=r"1 tensors do not match, .*in the model but not in the file"):
        load_adapter(tiny("tiny:llama", adapter=False), folder)


def test_load_adapter_without_completeness_check_misses_the_tensor(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "_check_complete", lambda *args: None)
    with pytest.raises(pytest.fail.Exception):
        test_load_adapter_refuses_a_missing_tensor(tiny, tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut weights", r"adapter_model.safetensors is damaged"),
        ("no weights", r"adapter_model.safetensors; it is missing"),
        ("no config", r"adapter_config.json; it is missing"),
        ("bad config", r"adapter_config.json is damaged"),
        ("config is a list", r"adapter_config.json is damaged"),
        ("config without type", r"adapter_config.json is damaged"),
        ("pickle", r"found adapter_model.bin, a pickle"),
        ("empty", r"contains no tensors"),
    ],
)
def test_load_adapter_refuses_damaged_files(
    tiny: Callable[..., Any], tmp_path: Path, damage: str, message: str
) -> None:
    folder = saved(tiny, tmp_path / "a")
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage in ("no weights", "pickle"):
        weights.unlink()
        if damage == "pickle":
            torch.save({}, folder / "adapter_model.bin")
    elif damage == "no config":
        config.unlink()
    elif damage == "empty":
        save_file({}, str(weights))
    else:
        texts = {"bad config": "{", "config is a list": "[]", "config without type": "{}"}
        config.write_text(texts[damage])
    with pytest.raises(ArtifactError, match=message):
        load_adapter(tiny("tiny:llama", adapter=False), folder)
    if damage not in ("config is a list", "config without type"):
        with pytest.raises(ArtifactError, match=message):
            check_adapter_files(folder)


SAVED = {"targets": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"], "modules_to_save": ["lm_head", "norm"]}
SAVE = f"""
import sys
from pathlib import Path
from tests.conftest import _tiny
from peftlab.adapters import save_adapter
save_adapter(_tiny("tiny:llama", **{SAVED}), Path(sys.argv[1]))
"""


def test_save_adapter_files_do_not_depend_on_the_hash_seed(
    tmp_path: Path, tiny: Callable[..., Any], process: Processes
) -> None:
    save_adapter(tiny("tiny:llama", **SAVED), tmp_path / "here")
    process.run_with_other_hashes(SAVE, tmp_path / "there")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


@pytest.mark.parametrize(
    ("family", "auto", "peft_type", "targets"),
    [
        ("GPT2Config", "AutoModelForCausalLM", "CAUSAL_LM", "all-linear"),
        ("ResNetConfig", "AutoModelForImageClassification", None, ["convolution"]),
    ],
)
def test_what_peft_refuses_is_found_without_weights(
    family: str, auto: str, peft_type: str | None, targets: Any
) -> None:
    import transformers

    def refusal(method: str, attempt: Callable[..., Any], device: str) -> str | None:
        given = {"targets": targets} if METHODS[method].has_targets else {}
        given |= dict.fromkeys(METHODS[method].required, 8)
        with torch.device(device):
            model = getattr(transformers, auto).from_config(make_config(family, READERS_OF_IMAGES | WRITERS))
        try:
            attempt(model, method, peft_type=peft_type, **given)
        except RecipeError as error:
            return str(error)
        return None

    chosen = ["lora", "oft", "loha", "c3a", "vera", "ia3", "hra", "boft", "road", "osf"]
    found = {name: (refusal(name, try_injection, "meta"), refusal(name, inject, "cpu")) for name in chosen}
    assert all(early == late for early, late in found.values())
    assert found["lora"] == (None, None) and any(early for early, _ in found.values())


@pytest.mark.parametrize("kind", ["olora", "pissa", "eva"])
def test_initialisation_that_reads_weights_is_not_refused_without_them(base: Any, kind: str) -> None:
    try_injection(base.to("meta"), "lora", peft_type="CAUSAL_LM", init_lora_weights=kind)
