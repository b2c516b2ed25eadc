"""``adapter.target_parameters``: LoRA on the stacked experts of mixture-of-experts models, from ``check`` to the merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import peftlab
from peftlab.assembly.target import find_target, open_target
from peftlab.errors import Interrupted, RecipeError
from peftlab.training.progress import SilentProgress
from tests.family_examples import write_family
from tests.family_table import family_recipe, write_rows
from tests.run_examples import Stopper

IDS = torch.arange(4, 20)[None]
UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
QUIET: dict[str, Any] = {"progress": SilentProgress()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    return tmp_path


def document(family: str, parameters: list[str], **sections: Any) -> dict[str, Any]:
    if not Path("model").exists():
        write_family(Path("model"), family, "causal_lm")
    adapter = {"rank": 4, "alpha": 8, "targets": ["q_proj"], "target_parameters": parameters} | sections.pop(
        "adapter", {}
    )
    return family_recipe("causal_lm", adapter=adapter, **sections)


def said(recipe: dict[str, Any]) -> list[str]:
    return [f["message"] for f in peftlab.check(recipe, **QUIET)["findings"] if f["kind"] == "reach"]


def base(folder: str = "model") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return result


def updates(change: torch.Tensor, tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The update of each expert by the formula, alpha / rank B A, with its rows of A and its columns of B.

    A and B are for [inputs, outputs] or for [outputs, inputs]; a square weight does not say, so the nearer one to ``change``.
    """
    first, second = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    count = len(change)
    each = torch.stack([8 / 4 * second[:, e::count] @ first.reshape(count, 4, -1)[e] for e in range(count)])
    ways = [way for way in (each, each.mT) if way.shape == change.shape]
    return min(ways, key=lambda way: float((way - change).norm()))


@pytest.mark.parametrize(
    ("family", "parameters", "experts"),
    [
        ("OlmoeConfig", [UP, DOWN], 4),
        ("MixtralConfig", [DOWN], 2),
        ("Qwen3MoeConfig", [DOWN, UP], 4),
    ],
)
def test_experts_are_trained_opened_by_plain_peft_and_merged(
    here: Path, family: str, parameters: list[str], experts: int
) -> None:
    recipe = document(family, parameters)
    kinds = sorted(name.removeprefix("mlp.") for name in parameters)
    counted = ", ".join(f"{kind} of {experts} experts in each of 2 layers" for kind in kinds)
    assert f"the adapter changes {counted}" in said(recipe)
    run = peftlab.train(recipe, **QUIET)
    report = run.summary["adapter"]
    assert report["experts"] == counted
    assert report["kinds"] == dict.fromkeys([*kinds, "q_proj"], 2)
    plain = peft.PeftModel.from_pretrained(base(), "run/adapter")
    torch.testing.assert_close(logits(plain), logits(open_target(find_target("run"), SilentProgress()).model))
    assert (logits(plain) - logits(base())).abs().max() > 1e-4

    figures = peftlab.merge("run", **QUIET)
    assert figures["verified"]
    before, after = base(), base("run/merged")
    tensors = load_file("run/adapter/adapter_model.safetensors")
    # PEFT nests the adapters of one module, that of its last parameter outermost.
    inner = {DOWN: "", UP: ".base_layer"}
    for layer in range(2):
        for parameter in parameters:
            name = f"model.layers.{layer}.{parameter}"
            change = (after.get_parameter(name) - before.get_parameter(name)).detach()
            wanted = updates(change, tensors, f"base_model.model.{name.rpartition('.')[0]}{inner[parameter]}")
            assert all(expert.any() for expert in wanted)
            torch.testing.assert_close(change, wanted, rtol=1e-3, atol=1e-6)
            assert not torch.allclose(change, wanted.roll(1, 0), rtol=1e-3, atol=1e-6)

    shown = {module["name"]: module for module in peftlab.show_adapter("run", **QUIET)["modules"]}
    assert shown["model.layers.1.mlp.experts"]["reason"] == "it adapts a bare parameter"
    assert shown["model.layers.1.self_attn.q_proj"]["rank"] == 4


def test_run_with_experts_resumes_to_the_byte(here: Path) -> None:
    options: dict[str, Any] = {"adapter": {"layers": [1], "rank": 2}, "run": {"dir": "run", "save_every": 2}}
    run = peftlab.train(document("MixtralConfig", [DOWN], **options), **QUIET)
    assert run.summary["adapter"]["experts"] == "experts.down_proj of 2 experts in 1 layer"
    options["run"] = {"dir": "other", "save_every": 2}
    with pytest.raises(Interrupted):
        peftlab.train(document("MixtralConfig", [DOWN], **options), progress=Stopper(at=3))
    peftlab.train("other", resume=True, **QUIET)
    files = [Path(name, "adapter/adapter_model.safetensors").read_bytes() for name in ("run", "other")]
    assert files[0] == files[1]


def test_check_counts_experts_and_says_that_they_are_not_quantized(here: Path) -> None:
    (text, *_) = said(document("Qwen3MoeConfig", [DOWN], model={"quantize": "int8"}))
    assert text == "the adapter changes experts.down_proj of 4 experts in each of 2 layers, not quantized"


@pytest.mark.parametrize(
    ("adapter", "key", "says"),
    [
        (
            {"target_parameters": ["mlp.experts.down_prj"]},
            "adapter.target_parameters",
            r"'mlp\.experts\.down_prj' matches no parameter; did you mean 'mlp\.experts\.down_proj'\? \(this model has "
            r"mlp\.gate\.weight, mlp\.experts\.gate_up_proj, mlp\.experts\.down_proj\)",
        ),
        ({"dropout": 0.1}, "adapter.dropout", "adapts weights whose inputs PEFT does not see"),
        ({"dora": True}, "adapter.dora", r"DoRA does not work with adapter\.target_parameters"),
    ],
)
def test_mistakes_are_one_message(here: Path, adapter: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as info:
        said(document("MixtralConfig", [DOWN], adapter=adapter))
    assert info.value.key == key
