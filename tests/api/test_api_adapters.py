"""The adapter of a run shown, shrunk, combined and converted: each result is what plain PEFT loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from run_examples import recipe, write_data
from transformers import AutoModelForCausalLM

import peftlab
from peftlab.adapters.updates import read_updates
from peftlab.errors import RecipeError, VerificationError
from peftlab.models import find_pretrained, load_model
from peftlab.training.progress import SilentProgress

QUIET: dict[str, Any] = {"progress": SilentProgress()}
IDS = torch.arange(4, 20)[None]


@pytest.fixture
def writer(trained: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder: Path = trained(recipe(), write_data)
    monkeypatch.chdir(tmp_path)
    return folder / "run"


@pytest.fixture
def classifier(trained: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder: Path = trained(recipe("seq_cls"), write_data)
    monkeypatch.chdir(tmp_path)
    return folder / "run"


def plain(folder: Path | str) -> Any:
    """The base model with an adapter, through PEFT alone."""
    base = load_model(find_pretrained("tiny:llama"), auto_class="AutoModelForCausalLM", device="cpu")
    return peft.PeftModel.from_pretrained(base, str(folder)).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS).logits
    return result


def updates(folder: Path | str) -> dict[str, np.ndarray]:
    return {u.name: u.matrix().numpy().astype(np.float64) for u in read_updates(plain(folder))}


def test_show_adapter_equals_dense_norms_and_values(writer: Path) -> None:
    figures = peftlab.show_adapter(writer, picture="a.svg", **QUIET)
    weights = dict(
        load_model(find_pretrained("tiny:llama"), auto_class="AutoModelForCausalLM", device="cpu").named_modules()
    )
    dense = updates(writer / "adapter")
    assert {m["name"] for m in figures["modules"]} == set(dense)
    for module in figures["modules"]:
        change = dense[module["name"]]
        weight = np.linalg.norm(weights[module["name"]].weight.float().numpy())
        assert module["relative"] == pytest.approx(np.linalg.norm(change) / weight, rel=1e-5)
        assert module["values"] == pytest.approx(np.linalg.svd(change, compute_uv=False)[:4], rel=1e-5)
        assert 1 <= module["effective_rank"] <= module["rank"] == 4
    total = figures["total"]
    assert total["norm"] == pytest.approx(np.sqrt(sum(np.linalg.norm(d) ** 2 for d in dense.values())))
    assert sum(k["num_modules"] for k in figures["kinds"]) == total["num_modules"] == len(dense)
    assert Path("a.svg").read_text().startswith("<?xml")


def test_shrink_adapter_cuts_all_modules_at_one_value(writer: Path) -> None:
    report = peftlab.shrink_adapter(writer, "small", keep=0.5, tolerance=0.5, **QUIET)
    assert report["parameters"]["share"] <= 0.5
    before, after = updates(writer / "adapter"), updates("small")
    for name, change in before.items():
        U, values, V = np.linalg.svd(change, full_matrices=False)
        kept = values >= report["threshold"] * (1 - 1e-6)
        wanted = (U[:, kept] * values[kept]) @ V[kept]
        np.testing.assert_allclose(after.get(name, np.zeros_like(change)), wanted, atol=1e-6)
    assert report == json.loads(Path("small/shrink.json").read_text())
    evaluated = peftlab.evaluate("small", **QUIET)
    assert evaluated["metrics"] == pytest.approx(report["metrics"]["after"])
    assert peftlab.merge("small", output="merged", **QUIET)["verified"]
    merged = AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(logits(merged), logits(plain("small")), rtol=1e-4, atol=1e-4)


def test_shrink_adapter_by_default_changes_next_to_nothing(classifier: Path) -> None:
    report = peftlab.shrink_adapter(classifier, "small", **QUIET)
    assert report["rule"] == {"energy": 0.99}
    assert 0.99 <= report["energy"] <= 1
    assert report["in_full"] > 0  # the new head
    assert report["of_training"]
    rows = [p["label"] for p in peftlab.predict("small", ["red 1", "dog 2"], **QUIET)]
    assert rows == [p["label"] for p in peftlab.predict(classifier, ["red 1", "dog 2"], **QUIET)]


def test_shrink_adapter_beyond_the_tolerance_leaves_nothing(writer: Path) -> None:
    with pytest.raises(VerificationError, match=r"does not agree, nothing was written.*--tolerance"):
        peftlab.shrink_adapter(writer, "small", keep=0.1, tolerance=1e-9, **QUIET)
    assert not list(Path().iterdir())


def test_shrink_adapter_refuses_what_it_cannot_do(writer: Path, classifier: Path) -> None:
    shutil.copytree(writer, "run")
    with pytest.raises(RecipeError, match="--keep and --budget exclude each other"):
        peftlab.shrink_adapter("run", "small", keep=0.1, budget=5, **QUIET)
    with pytest.raises(RecipeError, match="--keep above 0 and at most 1, found 1"):
        peftlab.shrink_adapter("run", "small", keep=1.5, **QUIET)
    with pytest.raises(RecipeError, match="--budget of at least one"):
        peftlab.shrink_adapter("run", "small", budget=0, **QUIET)
    with pytest.raises(RecipeError, match="run exists; choose another --to"):
        peftlab.shrink_adapter("run", "run", **QUIET)
    with pytest.raises(RecipeError, match="no such run"):
        peftlab.shrink_adapter("nope", "small", **QUIET)
    with pytest.raises(RecipeError, match="neither a run folder"):
        peftlab.shrink_adapter(".", "small", **QUIET)
    with pytest.raises(RecipeError, match="tolerance above 0"):
        peftlab.shrink_adapter("run", "small", tolerance=-1.0, **QUIET)
    peftlab.merge("run", **QUIET)
    with pytest.raises(RecipeError, match="has no adapter: it is a merged model"):
        peftlab.shrink_adapter("run/merged", "small", **QUIET)
    assert sorted(p.name for p in Path().iterdir()) == ["run"]


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_shrink_adapter_on_a_quantized_base(trained: Any, monkeypatch: Any, tmp_path: Path, storage: str) -> None:
    """PEFT's dequantization takes the scales away from an int8 weight: the next forward then fails."""
    run = trained(recipe(model={"quantize": storage}), write_data) / "run"
    monkeypatch.chdir(tmp_path)
    report = peftlab.shrink_adapter(run, "small", tolerance=0.1, **QUIET)
    assert report["logits"]["kl_mean"] < 1e-3
    halves = peftlab.combine_adapters([run, run], "same", weights=[0.5, 0.5], **QUIET)
    assert halves["metrics"]["after"] == pytest.approx(halves["parents"][0]["metrics"], abs=1e-3)
