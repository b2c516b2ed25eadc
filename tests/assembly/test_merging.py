"""The merge of adapters that plain PEFT trained and saved, of many methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peftlab
from peftlab.errors import RecipeError
from peftlab.models import find_pretrained, load_model
from peftlab.training.progress import SilentProgress
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


@pytest.mark.parametrize(("dtype", "said"), [("bfloat16", True), ("float32", False)])
def test_merge_that_rounding_undoes_says_so(brought: Callable[[str], torch.Tensor], dtype: str, said: bool) -> None:
    brought("patterns")
    path = "adapter/adapter_model.safetensors"
    # An update of a ten-thousandth of the weight is below the resolution of bfloat16, and above that of float32.
    small = {name: value * (1e-4 if "lora_B" in name else 1) for name, value in load_file(path).items()}
    save_file(small, path, metadata={"format": "pt"})
    notes = Notes()
    report = peftlab.merge("adapter", recipe=RECIPE, output="merged", dtype=dtype, progress=notes)
    assert report["verified"]
    lines = [line for line in notes.lines if f"rounding to {dtype}" in line]
    assert bool(lines) is said
    assert not said or "--dtype float32" in lines[0]
