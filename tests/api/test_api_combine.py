"""Adapters combined, and converted from other methods, against sums of dense updates and PEFT alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from run_examples import recipe, write_data

import peftlab
from peftlab.adapters.updates import read_updates
from peftlab.errors import ArtifactError, RecipeError, VerificationError
from peftlab.models import find_pretrained, load_model
from peftlab.training.progress import SilentProgress

QUIET: dict[str, Any] = {"progress": SilentProgress()}


@pytest.fixture
def runs(trained: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """Two runs on one base: of another seed, rank and scaling."""
    first = trained(recipe(adapter={"rslora": True}), write_data) / "run"
    second = trained(recipe(adapter={"rank": 2}, run={"seed": 7}), write_data) / "run"
    monkeypatch.chdir(tmp_path)
    return first, second


@pytest.fixture
def classifiers(trained: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    first = trained(recipe("seq_cls"), write_data) / "run"
    second = trained(recipe("seq_cls", run={"seed": 7}), write_data) / "run"
    monkeypatch.chdir(tmp_path)
    return first, second


def base() -> Any:
    return load_model(find_pretrained("tiny:llama"), auto_class="AutoModelForCausalLM", device="cpu")


def updates(folder: Path | str) -> dict[str, np.ndarray]:
    model = peft.PeftModel.from_pretrained(base(), str(folder)).eval()
    return {u.name: u.matrix().numpy().astype(np.float64) for u in read_updates(model)}


@pytest.mark.parametrize(("method", "signs"), [("linear", (1, 1)), ("difference", (1, -1)), ("svd", (1, 1))])
def test_combine_adapters_is_the_sum_of_updates(runs: tuple[Path, Path], method: str, signs: tuple[int, int]) -> None:
    """PEFT's own `linear` (sums of factors), or rsLoRA's scaling taken for LoRA's, turns this red."""
    options = {"rank": 6} if method == "svd" else {}
    report = peftlab.combine_adapters(runs, "both", method=method, weights=[1.0, 0.5], **options, **QUIET)
    first, second, both = updates(runs[0] / "adapter"), updates(runs[1] / "adapter"), updates("both")
    assert set(both) == set(first)
    for name, change in both.items():
        wanted = signs[0] * first[name] + 0.5 * signs[1] * second[name]
        np.testing.assert_allclose(change, wanted, atol=1e-6 * np.abs(wanted).max())
    assert report["error"] == 0
    assert report["logits"]["kl_mean"] < 1e-6
    assert [set(p["metrics"]) == set(report["metrics"]["after"]) for p in report["parents"]] == [True, True]
    assert peftlab.evaluate("both", **QUIET)["metrics"] == pytest.approx(report["metrics"]["after"])


def test_combine_adapters_svd_is_the_best_of_its_rank(runs: tuple[Path, Path]) -> None:
    report = peftlab.combine_adapters(runs, "both", method="svd", rank=3, tolerance=1.0, **QUIET)
    first, second, both = updates(runs[0] / "adapter"), updates(runs[1] / "adapter"), updates("both")
    lost = whole = 0.0
    for name, change in both.items():
        values = np.linalg.svd(first[name] + second[name], compute_uv=False)
        error = np.linalg.norm(first[name] + second[name] - change)
        assert error == pytest.approx(np.linalg.norm(values[3:]), rel=1e-3)
        lost, whole = lost + error**2, whole + float(np.square(values).sum())
    assert report["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_combine_adapters_gives_what_peft_gives(classifiers: tuple[Path, Path], method: str) -> None:
    report = peftlab.combine_adapters(classifiers, "both", method=method, density=0.6, **QUIET)
    assert report["logits"]["kl_mean"] < 1e-6
    assert report["density"] == 0.6
    assert report["reference"] == "PEFT's combined adapter in memory"
    labels = [p["label"] for p in peftlab.predict("both", ["red 1"], **QUIET)]
    assert labels[0] in ("animal", "colour")


def test_combine_adapters_keeps_the_head_of_the_first(classifiers: tuple[Path, Path]) -> None:
    from safetensors.torch import load_file

    peftlab.combine_adapters(classifiers, "both", **QUIET)
    heads = [load_file(f / "adapter_model.safetensors") for f in (classifiers[0] / "adapter", Path("both"))]
    names = [name for name in heads[0] if ".lora_" not in name]
    assert names
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in names)


def test_combine_adapters_refuses_mistakes(runs: tuple[Path, Path], trained: Any) -> None:
    a, b = runs
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"method": "tied"}, "unknown method 'tied'; did you mean 'ties'"),
        ({"weights": [1.0]}, "expected 2 weights, one per adapter, found 1"),
        ({"weights": [0.0, 0.0]}, "not all zero"),
        ({"density": 0.5}, "--density belongs to ties"),
        ({"method": "ties", "density": 0.0}, "--density above 0"),
        ({"rank": 4}, "--rank belongs to svd"),
        ({"method": "svd", "rank": 0}, "--rank of at least 1"),
        ({"method": "ties"}, "PEFT cannot combine these adapters: .*same r"),
    ]
    for options, message in mistakes:
        with pytest.raises(RecipeError, match=message):
            peftlab.combine_adapters([a, b], "both", **options, **QUIET)
    with pytest.raises(RecipeError, match="at least two adapters"):
        peftlab.combine_adapters([a], "both", **QUIET)
    with pytest.raises(RecipeError, match="cancel each other"):
        peftlab.combine_adapters([a, a], "both", method="difference", **QUIET)
    other = trained(recipe("seq_cls"), write_data) / "run"
    with pytest.raises(ArtifactError, match=r"different bases: .* weights tiny:llama, .* on tiny:bert"):
        peftlab.combine_adapters([a, other], "both", **QUIET)
    assert not list(Path().iterdir())


def test_convert_adapter_keeps_the_magnitudes_of_dora(trained: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """PEFT's conversion alone would drop them: then the updates differ."""
    run = trained(recipe(adapter={"dora": True}), write_data) / "run"
    monkeypatch.chdir(tmp_path)
    report = peftlab.convert_adapter(run, "plain", rank=1.0, **QUIET)
    before, after = updates(run / "adapter"), updates("plain")
    for name, change in after.items():
        np.testing.assert_allclose(change, before[name], atol=1e-5 * np.abs(before[name]).max())
    assert report["method"] == "DORA"
    assert report["error"] < 1e-5
    with pytest.raises(VerificationError, match="Use a larger --rank"):
        peftlab.convert_adapter(run, "small", rank=1, tolerance=1e-12, **QUIET)
    assert not Path("small").exists()


RECIPE = {
    "task": "causal_lm",
    "model": {"name": "tiny:llama"},
    "data": {"train": "data.csv", "eval_rows": 4, "template": {"user": "{word}", "assistant": "{kind}"}},
}
BROUGHT: dict[str, Any] = {
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM"),
    "lokr": lambda: peft.LoKrConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM"),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4, task_type="CAUSAL_LM"),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "lora": lambda: peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "pissa": lambda: peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"),
    "biases": lambda: peft.LoraConfig(target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)

    def write(name: str) -> None:
        torch.manual_seed(0)
        model = peft.get_peft_model(base(), BROUGHT[name]())
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        shutil.rmtree("adapter", ignore_errors=True)
        model.save_pretrained("adapter")

    return write


@pytest.mark.parametrize("name", ["loha", "lokr", "vera"])
def test_convert_adapter_states_the_error_of_each_update(brought: Any, name: str) -> None:
    brought(name)
    report = peftlab.convert_adapter("adapter", "plain", rank=3, tolerance=10.0, recipe=RECIPE, **QUIET)
    before, after = updates("adapter"), updates("plain")
    for module in report["modules"]:
        change = before[module["name"]]
        error = np.linalg.norm(change - after[module["name"]]) / np.linalg.norm(change)
        values = np.linalg.svd(change, compute_uv=False)
        assert module["error"] == pytest.approx(error, abs=1e-5)
        assert module["error"] == pytest.approx(np.linalg.norm(values[3:]) / np.linalg.norm(values), abs=1e-5)
    exact = peftlab.convert_adapter("adapter", "exact", rank=1.0, recipe=RECIPE, **QUIET)
    assert exact["error"] < 1e-3
    assert exact["logits"]["kl_mean"] < 1e-6
    assert peftlab.merge("exact", output="merged", **QUIET)["verified"]


def test_convert_adapter_refuses_with_the_reason(brought: Any) -> None:
    reasons = {
        "ia3": r"PEFT cannot convert this adapter to LoRA: Some module types .*ia3",
        "lora": "is a LoRA adapter already; peftlab adapters shrink",
        "prompt": "PROMPT_TUNING adds virtual tokens",
    }
    for name, message in reasons.items():
        brought(name)
        with pytest.raises(RecipeError, match=message):
            peftlab.convert_adapter("adapter", "plain", rank=2, recipe=RECIPE, **QUIET)
    for rank, message in [(0, "--rank of at least 1"), (1.5, "a share above 0")]:
        with pytest.raises(RecipeError, match=message):
            peftlab.convert_adapter("adapter", "plain", rank=rank, recipe=RECIPE, **QUIET)
    brought("loha")
    with pytest.raises(RecipeError, match="PEFT cannot convert this adapter to LoRA: The chosen rank 999"):
        peftlab.convert_adapter("adapter", "plain", rank=999, recipe=RECIPE, **QUIET)
    assert not Path("plain").exists()


def test_shrink_adapter_refuses_adapters_that_are_more_than_updates(brought: Any) -> None:
    for name, message in [
        ("pissa", "initialised with pissa"),
        ("biases", "trains biases"),
        ("prompt", "virtual tokens"),
    ]:
        brought(name)
        with pytest.raises(RecipeError, match=message):
            peftlab.shrink_adapter("adapter", "small", recipe=RECIPE, **QUIET)


def test_show_adapter_says_that_a_prompt_has_no_matrix(brought: Any) -> None:
    brought("prompt")
    figures = peftlab.show_adapter("adapter", recipe=RECIPE, **QUIET)
    assert figures["modules"] == []
    assert "adds virtual tokens" in figures["notes"][0]
    with pytest.raises(RecipeError, match="nothing to draw"):
        peftlab.show_adapter("adapter", picture="a.png", recipe=RECIPE, **QUIET)
    with pytest.raises(RecipeError, match=r"ends in \.png or \.svg, found 'a\.gif'"):
        peftlab.show_adapter("adapter", picture="a.gif", recipe=RECIPE, **QUIET)
