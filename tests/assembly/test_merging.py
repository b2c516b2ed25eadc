"""The merge of adapters that plain PEFT trained and saved, of many methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peftlab
from peftlab.errors import RecipeError, VerificationError
from peftlab.models import find_pretrained, load_model, save_plain
from peftlab.training.progress import SilentProgress
from tests.family_examples import AUTO_CLASSES, write_family
from tests.family_table import family_recipe, write_rows
from tests.run_examples import Notes

IDS = torch.arange(4, 20)[None]
RECIPE = {
    "task": "causal_lm",
    "model": {"name": "tiny:llama"},
    "data": {"train": "rows.jsonl", "eval_rows": 4, "template": {"user": "{text}", "assistant": "{label}"}},
    "run": {"dir": "run"},
}
ATTENTION, MLP = ["q_proj", "v_proj"], ["down_proj"]
METHODS: dict[str, Callable[[], Any]] = {
    "ia3": lambda: peft.IA3Config(target_modules=[*ATTENTION, *MLP], feedforward_modules=MLP),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4),
    "loha": lambda: peft.LoHaConfig(target_modules=[*ATTENTION, *MLP], r=4),
    "oft": lambda: peft.OFTConfig(target_modules=ATTENTION, oft_block_size=8),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=ATTENTION, init_r=4, target_r=2, total_step=100),
    "patterns": lambda: peft.LoraConfig(target_modules=ATTENTION, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 3}),
    "biases": lambda: peft.LoraConfig(target_modules=ATTENTION, bias="all"),
    "pissa": lambda: peft.LoraConfig(target_modules=[*ATTENTION, *MLP], init_lora_weights="pissa"),
    "olora": lambda: peft.LoraConfig(target_modules=[*ATTENTION, *MLP], init_lora_weights="olora"),
    "dora-embedding": lambda: peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], use_dora=True),
    "replicated": lambda: peft.LoraConfig(target_modules=ATTENTION, layer_replication=[[0, 2], [1, 2]]),
    "tokens": lambda: peft.LoraConfig(target_modules=ATTENTION, trainable_token_indices=[4, 5]),
    "parameters": lambda: peft.LoraConfig(target_modules=ATTENTION, target_parameters=["mlp.up_proj.weight"]),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "bias": lambda: peft.LoraConfig(target_modules=ATTENTION, lora_bias=True),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4),
}  # fmt: skip
REFUSED = {
    "bias": "PEFT cannot merge this LORA adapter: .* the base layer has no bias; use it as an adapter",
    "prompt": "prompt tuning cannot be merged: its virtual tokens change no weight",
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS).logits
    return result


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], torch.Tensor]:
    """Writes ``adapter`` with other values in everything that is trained, and returns its logits."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"it is {i}", "label": "ab"[i % 2]} for i in range(16)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(name: str) -> torch.Tensor:
        torch.manual_seed(0)
        config = METHODS[name]()
        config.task_type = "CAUSAL_LM"
        base = load_model(find_pretrained("tiny:llama"), auto_class="AutoModelForCausalLM", device="cpu")
        model = peft.get_peft_model(base, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape)
        model.eval().save_pretrained("adapter")
        return logits(model)

    return write


@pytest.mark.parametrize("name", [name for name in METHODS if name not in REFUSED])
def test_adapter_of_plain_peft_merges(brought: Callable[[str], torch.Tensor], name: str) -> None:
    wanted = brought(name)
    report = peftlab.merge("adapter", recipe=RECIPE, output="merged", progress=SilentProgress())
    assert report["verified"]
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained("merged")), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_adapter_that_cannot_be_merged_says_why(brought: Callable[[str], torch.Tensor], name: str) -> None:
    brought(name)
    with pytest.raises(RecipeError, match=REFUSED[name]):
        peftlab.merge("adapter", recipe=RECIPE, output="merged", progress=SilentProgress())
    assert not Path("merged").exists()


def lost_lines(dtype: str) -> list[str]:
    notes = Notes()
    report = peftlab.merge("adapter", recipe=RECIPE, output="merged", dtype=dtype, progress=notes)
    assert report["verified"]
    return [line for line in notes.lines if f"rounding to {dtype}" in line]


def shrink(part: str) -> None:
    """An update of some hundred-thousandth of the weight is below the resolution of 16 bits, and above that of float32."""
    path = "adapter/adapter_model.safetensors"
    small = {n: value * (1e-5 if part in n and "lora_B" in n else 1) for n, value in load_file(path).items()}
    save_file(small, path, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merge_that_rounding_undoes_says_so(brought: Callable[[str], torch.Tensor], dtype: str) -> None:
    brought("patterns")
    shrink("")
    (line,) = lost_lines(dtype)
    assert "4 of 4 layers" in line and "--dtype float32" in line


def test_merge_in_float32_keeps_a_small_update(brought: Callable[[str], torch.Tensor]) -> None:
    brought("patterns")
    shrink("")
    assert lost_lines("float32") == []


def test_merge_names_the_layer_that_loses_its_update(brought: Callable[[str], torch.Tensor]) -> None:
    brought("patterns")
    shrink("layers.1.self_attn.v_proj")
    (line,) = lost_lines("float16")
    assert "1 of 4 layers" in line and "most model.layers.1.self_attn.v_proj: by" in line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_file_with_one_other_value_is_refused(
    brought: Callable[[str], torch.Tensor], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight of one layer, by 3 % of the update's typical size, or by one step of 16 bits."""
    brought("patterns")
    name = "model.layers.1.self_attn.v_proj.weight"

    def save(model: Any, files: Any, written: Path, **options: Any) -> None:
        save_plain(model, files, written, **options)
        path = written / "model.safetensors"
        tensors = load_file(path)
        value = float(tensors[name][3, 5])
        tensors[name][3, 5] += 1e-4 if dtype == "float32" else value * 2**-6
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr("peftlab.assembly.merging.save_plain", save)
    with pytest.raises(
        VerificationError, match=r"1 of 4 merged layers differ .*layers\.1\.self_attn\.v_proj"
    ) as caught:
        peftlab.merge("adapter", recipe=RECIPE, output="merged", dtype=dtype, progress=SilentProgress())
    assert caught.value.exit_code == 6 and not Path("merged").exists()


def lora(*targets: str, **options: Any) -> Any:
    return peft.LoraConfig(target_modules=list(targets), r=4, **options)


_CONV = {"target_modules": ["convolution"], "use_effective_conv2d": True}
FAMILIES: list[tuple[str, str, Callable[[], Any], int]] = [
    ("GPT2Config", "causal_lm", lambda: lora("c_attn", "c_proj", "wte", use_dora=True), 7),
    ("BertConfig", "seq_cls", lambda: peft.OFTConfig(target_modules=["query", "output.dense"], oft_block_size=8), 6),
    ("ResNetConfig", "image_cls", lambda: peft.LoHaConfig(r=4, **_CONV), 6),
    ("MixtralConfig", "causal_lm", lambda: lora("q_proj", "w1", "w2", "w3"), 6),
]
SLOW: list[tuple[str, str, Callable[[], Any], int]] = [
    ("GPT2Config", "causal_lm", lambda: lora("c_attn", "c_proj", lora_bias=True), 6),
    ("GPT2Config", "causal_lm", lambda: lora("c_attn", init_lora_weights="pissa"), 2),
    ("GPT2Config", "causal_lm", lambda: peft.VeraConfig(target_modules=["c_attn", "c_proj"], r=4), 6),
    ("GPT2Config", "causal_lm", lambda: peft.IA3Config(target_modules=(n := ["c_attn", "c_proj"]), feedforward_modules=n), 6),
    ("BertConfig", "seq_cls", lambda: lora("query", "value", lora_bias=True), 4),
    ("BertConfig", "seq_cls", lambda: peft.LoKrConfig(target_modules=["query"], r=1, decompose_both=True), 2),
    ("BertConfig", "seq_cls", lambda: peft.AdaLoraConfig(target_modules=["query"], init_r=4, target_r=2, total_step=9), 2),
    ("ResNetConfig", "image_cls", lambda: lora("convolution"), 6),
    ("ResNetConfig", "image_cls", lambda: lora("convolution", use_dora=True), 6),
    ("ResNetConfig", "image_cls", lambda: peft.IA3Config(target_modules=["convolution"], feedforward_modules=[]), 6),
    ("ResNetConfig", "image_cls", lambda: peft.LoKrConfig(r=1, **_CONV), 6),
    ("ConvNextConfig", "image_cls", lambda: lora("pwconv1", "downsampling_layer.1"), 3),
    ("MixtralConfig", "causal_lm", lambda: lora("q_proj", target_parameters=["mlp.experts.down_proj"], use_rslora=True), 4),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "task", "config", "num_layers"), [*FAMILIES, *(pytest.param(*f, marks=pytest.mark.slow) for f in SLOW)]
)
def test_adapter_of_plain_peft_merges_on_every_kind_of_layer(
    family: str, task: str, config: Callable[[], Any], num_layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer is compared with the formula of its method."""
    monkeypatch.chdir(tmp_path)
    write_family(tmp_path / "model", family, task)
    write_rows(tmp_path)
    options = {} if task == "causal_lm" else {"num_labels": 10 if task == "image_cls" else 2}
    base = getattr(transformers, AUTO_CLASSES[task]).from_pretrained("model", dtype="float32", **options)
    settings = config()
    settings.modules_to_save = ["classifier"] if options else None
    torch.manual_seed(0)
    model = peft.get_peft_model(base, settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained("adapter")
    report = peftlab.merge("adapter", recipe=family_recipe(task), output="merged", progress=SilentProgress())
    layers = report["targets"]["original"]["layers"]
    assert report["verified"] and not report["targets"]["original"]["of_training"]
    assert (layers["by_formula"], layers["by_probes"], layers["unchecked"]) == (num_layers, 0, 0)
    assert 0 < layers["relative"] < 1e-4
