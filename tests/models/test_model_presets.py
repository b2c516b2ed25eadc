"""``shape:NAME``: models of known shape with random weights, quantized while they are built."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoConfig, AutoModelForCausalLM

import peftlab
from peftlab.errors import RecipeError
from peftlab.models import find_pretrained, load_model, load_tokenizer, model_max_length, quiet
from peftlab.models import presets as presets_module
from peftlab.models.presets import PRESETS, linear_shapes, preset_config, random_weight
from peftlab.models.source import resolve_model
from peftlab.training.progress import SilentProgress

IDS = torch.tensor([[5, 9, 33, 100, 7, 8], [1, 2, 3, 4, 250, 6]])
SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}
# What each family adds. The small copies keep it, so that their buffers and ties are built too.
FAMILIES = {
    "llama-3-8b": ["rope_parameters", "tie_word_embeddings"],
    "llama-3.2-1b": ["rope_parameters", "tie_word_embeddings"],
    "qwen3-8b": ["rope_parameters", "tie_word_embeddings"],
    "mistral-7b": ["rope_parameters", "sliding_window", "tie_word_embeddings"],
    "gemma-2-2b": [
        "rope_parameters",
        "tie_word_embeddings",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "query_pre_attn_scalar",
    ],
}


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``shape:small-NAME`` for each family, and a temporary cache folder."""
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "cache"))
    for name, keys in FAMILIES.items():
        class_name, values = PRESETS[name]
        extra: dict[str, Any] = {k: values[k] for k in keys}
        if extra["rope_parameters"]["rope_type"] == "llama3":
            extra["rope_parameters"] = {**extra["rope_parameters"], "original_max_position_embeddings": 128}
        monkeypatch.setitem(PRESETS, f"small-{name}", (class_name, {**SMALL, **extra}))


def build(name: str = "small-llama-3-8b", auto_class: str = "AutoModelForCausalLM", **options: Any) -> Any:
    return load_model(find_pretrained(f"shape:{name}"), auto_class=auto_class, device="cpu", **options)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("mistral-7b", 7_248_023_552),
        ("gemma-2-2b", 2_614_341_888),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_presets_have_the_published_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(preset_config(f"shape:{name}"))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", PRESETS)
def test_linear_shapes_equal_those_of_the_decoder(name: str) -> None:
    config = preset_config(f"shape:{name}")
    config.num_hidden_layers = 1
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = [m for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    shapes = linear_shapes(f"shape:{name}")
    assert len(shapes) == len(set(shapes))
    assert set(shapes) == {tuple(m.weight.shape) for m in linears}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_an_ordinary_model_with_these_weights(family: str) -> None:
    model = build(f"small-{family}")
    ordinary = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    norms = {n: p for n, p in ordinary.named_parameters() if "norm" in n}  # 1, but 0 where the family adds 1
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in norms.items()) and len(norms) >= 5
    ordinary.load_state_dict(model.state_dict())
    assert torch.equal(model(input_ids=IDS).logits, ordinary(input_ids=IDS).logits)
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(ordinary.named_buffers()).keys()
    assert all(torch.equal(buffers[name], buffer) for name, buffer in ordinary.named_buffers())
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == model.config.tie_word_embeddings
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"quantize": "nf4"},
        {"quantize": "nf4", "double_quant": False, "compute_dtype": "bfloat16", "dtype": "bfloat16"},
        {"quantize": "int8"},
    ],
)
@pytest.mark.parametrize("family", ["llama-3-8b", "llama-3.2-1b"])
def test_presets_equal_the_same_weights_loaded_from_files(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    folder = tmp_path / "files"
    with quiet():
        build(f"small-{family}").save_pretrained(folder)
    loaded = load_model(find_pretrained(str(folder)), auto_class="AutoModelForCausalLM", device="cpu", **options)
    model = build(f"small-{family}", **options)
    for name in ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):  # what PEFT reads
        assert getattr(model, name, None) == getattr(loaded, name, None)
    assert type(model.hf_quantizer) is type(loaded.hf_quantizer)
    assert model.config.quantization_config.to_dict() == loaded.config.quantization_config.to_dict()
    want = dict(loaded.named_modules())
    for name, module in model.named_modules():
        assert type(module) is type(want[name]), name
        if isinstance(module, Linear4bit):
            assert module.compute_dtype == want[name].compute_dtype
            assert module.support_avx512bf16_for_cpu is False
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == state[name].dtype, name
            assert torch.equal(value, state[name]), name
    assert torch.equal(model(input_ids=IDS).logits, loaded(input_ids=IDS).logits)


class Watch:
    """Stands for ``random_weight``. Notes which full-precision tensors are alive whenever the next one is made."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self.real, self.made, self.alive = real, {}, []

    def __call__(self, shape: Any, *, seed: str, **options: Any) -> Any:
        self.look()
        weight = self.real(shape, seed=seed, **options)
        self.made[seed.rpartition("/")[2]] = StorageWeakRef(weight.untyped_storage())
        return weight

    def look(self) -> None:
        self.alive.append({name for name, storage in self.made.items() if not storage.expired()})


@pytest.mark.parametrize("quantize", ["nf4", "int8", "none"])
def test_linear_weights_are_in_full_precision_one_at_a_time(monkeypatch: pytest.MonkeyPatch, quantize: str) -> None:
    watch = Watch(random_weight)
    monkeypatch.setattr(presets_module, "random_weight", watch)
    model = build(quantize=quantize)
    watch.look()
    kept = {"model.embed_tokens.weight", "lm_head.weight"}
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert watch.made.keys() == linear | kept
    assert len(watch.alive) == len(watch.made) + 1
    if quantize == "none":
        assert watch.alive[-1] == linear | kept  # the watch sees tensors that stay
    else:
        quantized = {"nf4": Linear4bit, "int8": Linear8bitLt}[quantize]
        assert all(isinstance(model.get_submodule(n.removesuffix(".weight")), quantized) for n in linear - kept)
        assert all(alive <= kept for alive in watch.alive)
        assert watch.alive[-1] == kept


def test_presets_give_the_same_weights_at_every_build() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = build().state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    two = build(dtype="bfloat16").state_dict()
    assert all(torch.equal(value, two[name].float()) for name, value in one.items())
    other = build("small-mistral-7b").state_dict()
    for name, value in one.items():
        if "norm" in name:
            assert bool((value == 1).all())
        else:
            assert not torch.equal(value, other[name])
            assert abs(float(value.std()) / 0.02 - 1) < 0.06  # 2,048 values or more: the error of std is 1.6 % at most
            assert abs(float(value.mean())) < 0.02 * 0.1
    assert not torch.equal(one["model.layers.0.mlp.up_proj.weight"], one["model.layers.1.mlp.up_proj.weight"])


def test_random_weight_does_not_depend_on_the_number_of_threads() -> None:
    weights = []
    for workers in (1, 4):
        with ThreadPoolExecutor(workers) as pool:
            weights.append(
                random_weight((37, 29), dtype=torch.float32, device="cpu", seed="a", pool=pool, piece_size=100)
            )
    assert torch.equal(*weights)
    assert len(weights[0].unique()) > 500  # the pieces differ


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_presets_have_the_requested_dtype(quantize: str, dtype: str) -> None:
    model = build(quantize=quantize, dtype=dtype)
    assert model.dtype == model.config.dtype == getattr(torch, dtype)
    plain = {p.dtype for n, p in model.named_parameters() if "_proj" not in n or quantize == "none"}
    assert plain == {getattr(torch, dtype)}
    logits = model(input_ids=IDS).logits
    assert logits.dtype == getattr(torch, dtype)
    assert bool(torch.isfinite(logits).all())


def test_presets_take_attention_and_task_heads() -> None:
    model = build(auto_class="AutoModelForSequenceClassification", num_labels=3, attention="eager", quantize="nf4")
    assert model.config._attn_implementation == "eager"
    assert model(input_ids=IDS).logits.shape == (2, 3)
    assert type(model.score) is torch.nn.Linear


def test_presets_refuse_unknown_names() -> None:
    for name, message in [
        (
            "shape:llama3-8b",
            "unknown shape 'shape:llama3-8b'; did you mean 'shape:llama-3-8b'\\? There are llama-3-8b, ",
        ),
        ("shape:Qwen3-4B", "did you mean 'shape:qwen3-4b'"),
        ("shape:zzz", "unknown shape 'shape:zzz'. There are llama-3-8b, llama-3.2-1b, .*smollm2-135m"),
    ]:
        with pytest.raises(RecipeError, match=message) as caught:
            resolve_model(name)
        assert caught.value.key == "model.name"
    with pytest.raises(RecipeError, match="a revision needs a hub model"):
        resolve_model("shape:llama-3-8b", "main")


def test_fingerprint_follows_name_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "shape:small-llama-3-8b"
    before = find_pretrained(name)
    assert before.fingerprint == find_pretrained(name).fingerprint
    class_name, values = PRESETS["small-llama-3-8b"]
    monkeypatch.setitem(PRESETS, "copy", (class_name, values))
    assert find_pretrained("shape:copy").fingerprint != before.fingerprint
    monkeypatch.setitem(PRESETS, "small-llama-3-8b", (class_name, {**values, "rms_norm_eps": 1e-6}))
    after = find_pretrained(name)
    assert after.fingerprint != before.fingerprint
    assert after.location != before.location


def test_cache_of_a_preset_holds_only_the_config() -> None:
    pretrained = find_pretrained("shape:llama-3.2-1b")
    assert [p.name for p in Path(pretrained.location).iterdir()] == ["config.json"]
    config = AutoConfig.from_pretrained(pretrained.location)
    assert config.to_dict() == preset_config("shape:llama-3.2-1b").to_dict() | {"_name_or_path": config.name_or_path}


def test_tokenizer_of_a_preset_is_the_byte_level_one() -> None:
    pretrained = find_pretrained("shape:llama-3-8b")
    tokenizer = load_tokenizer(pretrained)
    assert tokenizer.chat_template
    text = "Hello, w\u00f6rld! \U0001f600\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= min(values["vocab_size"] for _, values in PRESETS.values())
    assert model_max_length(pretrained, tokenizer) == 8192
    config = preset_config("shape:llama-3-8b")
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


@pytest.mark.parametrize(("quantize", "target"), [("none", "original"), ("nf4", "dequantized")])
def test_train_and_merge_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str, target: str) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        "word,kind",
        *(f"{word} {i},{kind}" for i in range(6) for word, kind in (("red", "colour"), ("cat", "animal"))),
    ]
    Path("data.csv").write_text("\n".join(rows))
    document = {
        "task": "causal_lm",
        "model": {"name": "shape:small-llama-3.2-1b", "quantize": quantize},
        "data": {"train": "data.csv", "eval_rows": 4, "template": {"user": "{word}", "assistant": "{kind}"}},
        "train": {"max_steps": 1, "batch_size": 4, "lr": 1e-2},
        "run": {"dir": "run", "merge": target},
    }
    run = peftlab.train(document, progress=SilentProgress())
    assert run.summary["merge"]["verified"]
    assert AutoConfig.from_pretrained(run.folder / "merged").dtype == torch.bfloat16
    merged = peftlab.evaluate(run.folder / "merged", progress=SilentProgress())["metrics"]
    assert merged["loss"] == pytest.approx(run.summary["after"]["loss"], rel=1e-3)  # the files are bfloat16
