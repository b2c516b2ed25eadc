"""``model.adapter``: a run on a model with another adapter in its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from run_examples import Stopper, recipe, write_data
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peftlab
from peftlab.assembly.target import find_target, open_target
from peftlab.errors import ArtifactError, Interrupted, RecipeError
from peftlab.models import find_pretrained, load_model, load_tokenizer
from peftlab.training.progress import SilentProgress

IDS = torch.arange(4, 20)[None]
FIRST = {**recipe(train={"max_steps": 3}), "adapter": {"rank": 4, "alpha": 6, "rslora": True}}
CLASSES = {**recipe("seq_cls", train={"max_steps": 3}), "adapter": {"rank": 4, "bias": "all"}}
TOKENS = {**recipe(train={"max_steps": 3}), "adapter": {"rank": 4, "tokens": ["<a>", "<b>"]}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "cache"))
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def first(trained: Any, here: Path) -> Path:
    """A finished run with LoRA."""
    return trained(FIRST, write_data) / "run"


def train(document: Any, *overrides: str, **options: Any) -> Any:
    return peftlab.train(document, overrides, **{"progress": SilentProgress(), **options})


def second(first: Path | str, task: str = "causal_lm", **sections: Any) -> dict[str, Any]:
    changes = {"train": {"max_steps": 3}, "run": {"dir": "second"}} | sections
    return recipe(task, **{**changes, "model": {"adapter": str(first), **changes.get("model", {})}})


def base(auto_class: str = "AutoModelForCausalLM") -> Any:
    return load_model(find_pretrained("tiny:llama"), auto_class=auto_class, device="cpu")


@torch.no_grad()
def add_by_hand(model: Any, folder: Path, scale: float) -> Any:
    """``W + scale * B A`` for every layer of a LoRA, in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in (n for n in tensors if n.endswith(".lora_A.weight")):
        module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        update = tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
        module.weight.copy_((module.weight.double() + scale * update).float())
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_second_adapter_is_trained_over_the_first_and_merged_with_it(first: Path, here: Path) -> None:
    """A fold that forgets the scaling of the first, or an evaluation on the plain base, turns this red."""
    run = train(second(first))
    folded = add_by_hand(base(), first / "adapter", 6 / 4**0.5)
    ours = logits(open_target(find_target("second"), SilentProgress()).model)
    plain = peft.PeftModel.from_pretrained(folded, "second/adapter")
    close(ours, logits(plain))
    assert (ours - logits(peft.PeftModel.from_pretrained(base(), "second/adapter"))).abs().max() > 1e-3
    assert peftlab.evaluate("second", progress=SilentProgress())["metrics"]["loss"] == pytest.approx(
        run.summary["after"]["loss"], rel=1e-6
    )
    assert peftlab.merge("second", progress=SilentProgress())["verified"]
    by_hand = add_by_hand(add_by_hand(base(), first / "adapter", 6 / 4**0.5), run.adapter, 8 / 4)
    close(logits(AutoModelForCausalLM.from_pretrained("second/merged")), logits(by_hand))
    shutil.rmtree(here / "cache")  # it is made again
    close(logits(open_target(find_target("second"), SilentProgress()).model), ours)
    # The merged model has both adapters, and nothing is added to it.
    assert peftlab.evaluate("second/merged", progress=SilentProgress())["metrics"]["loss"] == pytest.approx(
        run.summary["after"]["loss"], rel=1e-4
    )


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_weights_are_quantized_after_the_fold(storage: str, first: Path, here: Path) -> None:
    """Quantizing first and adding the update to the result gives other weights."""
    add_by_hand(base(), first / "adapter", 6 / 4**0.5).save_pretrained("folded")
    load_tokenizer(find_pretrained("tiny:llama")).save_pretrained("folded")
    sections: dict[str, Any] = {"train": {"max_steps": 1}}
    ours = train(second(first, model={"quantize": storage}, **sections)).summary["before"]["loss"]
    folded = recipe(model={"name": "folded", "quantize": storage}, run={"dir": "other"}, **sections)
    assert ours == pytest.approx(train(folded).summary["before"]["loss"], rel=1e-6)


def test_sum_of_both_adapters_is_the_stacked_model(first: Path, here: Path) -> None:
    train(second(first))
    report = peftlab.combine_adapters([first, "second"], "both", weights=[1.0, 1.0], progress=SilentProgress())
    assert report["error"] == 0
    stacked = open_target(find_target("second"), SilentProgress()).model
    close(logits(peft.PeftModel.from_pretrained(base(), "both")), logits(stacked))
    assert report["metrics"]["after"]["loss"] == pytest.approx(report["parents"][1]["metrics"]["loss"], rel=1e-5)
    with pytest.raises(ArtifactError, match="the adapters have different bases"):
        peftlab.combine_adapters(["second", first], "other", progress=SilentProgress())


@pytest.mark.parametrize(("document", "task"), [(CLASSES, "seq_cls"), (TOKENS, "causal_lm")], ids=["head", "tokens"])
def test_head_biases_and_tokens_of_the_first_are_in_the_base(
    document: dict[str, Any], task: str, trained: Any, here: Path
) -> None:
    run = trained(document, write_data) / "run"
    other = train(second(run, task), "train.max_steps=1", "train.lr=1e-9")
    ended = json.loads((run / "run.json").read_text())["after"]["loss"]
    assert other.summary["before"]["loss"] == pytest.approx(ended, rel=1e-5)
    if task == "causal_lm":
        with pytest.raises(RecipeError, match=r"`adapter.tokens`: the tokenizer has '<a>' already, with the id"):
            train(second(run, adapter={"tokens": ["<a>"]}, run={"dir": "third"}))


@pytest.mark.parametrize("lock", [True, False])
def test_classifier_takes_the_body_of_a_language_model(lock: bool, first: Path, here: Path) -> None:
    adapter = first
    if not lock:
        adapter = shutil.copytree(first / "adapter", here / "plain")
    data = {"train": "data.csv", "eval_rows": 12, "columns": {"text": "text", "label": "kind"}}
    document = recipe(
        "seq_cls", data=data, model={"name": "tiny:llama", "adapter": str(adapter)}, run={"dir": "second"}
    )
    train(document, "train.max_steps=1")
    opened = open_target(find_target("second"), SilentProgress()).model.get_base_model()
    folded = add_by_hand(base(), first / "adapter", 6 / 4**0.5)
    weight = opened.model.layers[1].mlp.up_proj.base_layer.weight
    torch.testing.assert_close(weight, folded.model.layers[1].mlp.up_proj.weight, rtol=1e-6, atol=1e-7)
    assert not torch.equal(weight, base().model.layers[1].mlp.up_proj.weight)


def test_adapter_of_plain_peft_goes_under_a_run(here: Path) -> None:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False
    )
    peft.get_peft_model(base(), config).save_pretrained("plain")
    train(second("plain", train={"max_steps": 1}))
    folded = add_by_hand(base(), Path("plain"), 5 / 3)
    ours = logits(open_target(find_target("second"), SilentProgress()).model)
    close(ours, logits(peft.PeftModel.from_pretrained(folded, "second/adapter")))


def test_resumed_run_ends_with_the_same_bytes_and_stacks_grow(first: Path, here: Path) -> None:
    document = second(first, train={"max_steps": 5})
    whole = train(document).adapter / "adapter_model.safetensors"
    with pytest.raises(Interrupted):
        train(document, "run.dir=cut", progress=Stopper(at=3))
    again = train("cut", resume=True).adapter / "adapter_model.safetensors"
    assert whole.read_bytes() == again.read_bytes()
    third = train(second("second", train={"max_steps": 1}), "run.dir=third")
    by_hand = add_by_hand(add_by_hand(base(), first / "adapter", 6 / 4**0.5), Path("second/adapter"), 8 / 4)
    ours = logits(open_target(find_target("third"), SilentProgress()).model)
    close(ours, logits(peft.PeftModel.from_pretrained(by_hand, third.adapter)))
    document = recipe(run={"dir": "on"}) | {"adapter": {"start": "third"}}
    with pytest.raises(ArtifactError, match=r"was made for another model: .*; its run has model.adapter: \S*second"):
        train(document)
    document["model"] |= {"adapter": "second"}
    on = train(document, "train.max_steps=1")
    assert on.summary["before"]["loss"] == pytest.approx(third.summary["after"]["loss"], rel=1e-6)


def test_first_adapter_that_moved_or_changed_is_named(first: Path, here: Path) -> None:
    shutil.copytree(first, "moved")
    document = second("moved", train={"max_steps": 4})
    with pytest.raises(Interrupted):
        train(document, progress=Stopper(at=2))
    shutil.move("moved", "elsewhere")
    with pytest.raises(RecipeError, match=r"`model.adapter`.*there is no folder \S*moved"):
        train("second", resume=True)
    train("second", f"model.adapter={here}/elsewhere", resume=True)
    with pytest.raises(RecipeError, match=r"`model.adapter`.*there is no folder \S*moved"):
        peftlab.evaluate("second", progress=SilentProgress())
    shutil.move("elsewhere", "moved")
    file = Path("moved/adapter/adapter_model.safetensors")
    save_file({n: t + 1 for n, t in load_file(file).items()}, file)
    with pytest.raises(ArtifactError, match=r"'tiny:llama with \S*moved' now has"):
        peftlab.evaluate("second", progress=SilentProgress())
    with pytest.raises(ArtifactError, match=r"the base adapter has changed.*restore the adapter that model.adapter"):
        train("second/recipe.lock.yaml", "run.dir=again")


def test_adapter_that_cannot_be_folded_or_is_of_other_weights_is_refused(trained: Any, first: Path, here: Path) -> None:
    peft.get_peft_model(base(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(
        "prompt"
    )
    with pytest.raises(
        RecipeError, match=r"prompt tuning cannot be folded into the model: its virtual tokens change no weight"
    ):
        train(second("prompt"))
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], lora_bias=True)
    peft.get_peft_model(base(), config).save_pretrained("bias")
    with pytest.raises(RecipeError, match=r"`model.adapter`.*PEFT cannot merge this LORA adapter: .* has no bias"):
        train(second("bias"))
    base().save_pretrained("model")
    load_tokenizer(find_pretrained("tiny:llama")).save_pretrained("model")
    with pytest.raises(
        ArtifactError, match=r"was made for another model: it was trained on weights tiny:llama, and 'model'"
    ):
        train(second(first, model={"name": "model"}))
    with pytest.raises(RecipeError, match=r"`model.adapter`: there is no folder nowhere"):
        train(second("nowhere"))
    assert not list((here / "cache/stacked").glob("*"))
