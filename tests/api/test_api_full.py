"""Training of the whole model without an adapter, up to a folder that plain transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import peftlab
from peftlab.adapters import load_trained, save_trained, train_all
from peftlab.errors import ArtifactError, Interrupted, RecipeError
from peftlab.models import find_pretrained, load_model
from peftlab.training.progress import SilentProgress


def recipe(**sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "task": "causal_lm",
        "model": {"name": "tiny:llama"},
        "adapter": {"method": "none"},
        "data": {"train": "package:peftlab.recipes/smoke.jsonl", "eval_rows": 12},
        "train": {"max_steps": 5, "batch_size": 8, "lr": 1e-2},
        "run": {"dir": "run"},
    }
    base["data"]["template"] = {"user": "{question}", "assistant": "{answer}"}
    return base | {name: {**base.get(name, {}), **values} for name, values in sections.items()}


def train(document: Any, *overrides: str, **options: Any) -> Any:
    return peftlab.train(document, overrides, **{"progress": SilentProgress(), **options})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(name: str = "tiny:llama") -> Any:
    return load_model(find_pretrained(name), auto_class="AutoModelForCausalLM", device="cpu")


def test_full_training_moves_every_weight_and_transformers_loads_them(here: Path) -> None:
    run = train(recipe())
    before, after = weights().state_dict(), AutoModelForCausalLM.from_pretrained(run.model).state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not run.adapter.exists() and run.summary["full"]
    assert run.summary["adapter"]["num_trained"] == run.summary["adapter"]["num_total"]
    for target in (run.folder, run.model):
        metrics = peftlab.evaluate(target, progress=SilentProgress())["metrics"]
        assert metrics["loss"] == pytest.approx(run.summary["after"]["loss"], rel=1e-5)
    with pytest.raises(RecipeError, match="no adapter to merge: run/model is its trained model"):
        peftlab.merge(run.folder, progress=SilentProgress())


def test_freeze_leaves_modules_unchanged(here: Path) -> None:
    run = train(recipe(adapter={"method": "none", "freeze": ["embed_tokens", "layers.0"]}))
    before, after = weights().state_dict(), AutoModelForCausalLM.from_pretrained(run.model).state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {n for n in before if "embed_tokens" in n or "layers.0." in n or n == "lm_head.weight"}


class Stopper(SilentProgress):
    def step(self, step: int, values: Any) -> None:
        if step == 3:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)


def test_full_training_resumed_ends_with_the_same_bytes(here: Path) -> None:
    whole = train(recipe(run={"dir": "whole"}))
    with pytest.raises(Interrupted):
        train(recipe(), progress=Stopper())
    resumed = train("run", resume=True)
    name = "model.safetensors"
    assert (resumed.model / name).read_bytes() == (whole.model / name).read_bytes()
    damaged = load_file(str(whole.model / name))
    assert any(not torch.equal(damaged[n], w) for n, w in weights().state_dict().items() if n in damaged)


def test_full_training_keeps_the_best_step(here: Path) -> None:
    run = train(
        recipe(train={"max_steps": 6, "lr": 0.2, "schedule": "constant"}, eval={"every": 1, "best": "loss"}),
    )
    losses = {r["step"]: r["eval"]["loss"] for r in run.metrics() if "eval" in r and not r.get("final")}
    assert run.summary["training"]["best_step"] != 6, "the trial needs a late step that is worse"
    assert run.summary["after"]["loss"] == pytest.approx(min(losses.values()), rel=1e-5)
    assert peftlab.evaluate(run.folder, progress=SilentProgress())["metrics"]["loss"] == pytest.approx(
        run.summary["after"]["loss"], rel=1e-5
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"quantize": "nf4"}}, "nf4 weights cannot be trained"),
        ({"adapter": {"method": "none", "rank": 4}}, "rank: has no effect without an adapter"),
        ({"adapter": {"method": "lora", "freeze": ["model"]}}, "leaves no module to adapt"),
        ({"adapter": {"method": "none", "freeze": ["embedings"]}}, "'embedings' matches no module"),
        ({"adapter": {"method": "none", "freeze": ["model", "lm_head"]}}, "every weight is frozen"),
        ({"run": {"merge": "original"}}, "merge: has no effect without an adapter"),
    ],
)
def test_full_training_refuses_impossible_recipes(here: Path, sections: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        train(recipe(**sections))
    assert not list(here.iterdir())


def test_load_trained_refuses_weights_of_another_training(tmp_path: Path) -> None:
    one, other = weights(), weights()
    train_all(one)
    train_all(other, freeze=["embed_tokens"])
    save_trained(one, tmp_path)
    with pytest.raises(ArtifactError, match="other trained weights"):
        load_trained(other, tmp_path)
    (tmp_path / "trained.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_trained(one, tmp_path)
