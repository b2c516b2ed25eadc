"""X-LoRA: a run that trains which of given adapters each token uses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from run_examples import Stopper, recipe, write_data
from safetensors.torch import load_file, save_file

import peftlab
from peftlab.assembly.target import find_target, open_target
from peftlab.errors import ArtifactError, Interrupted, PeftlabError, RecipeError
from peftlab.models import find_pretrained, load_model, load_tokenizer
from peftlab.recipe import load_recipe
from peftlab.training.progress import SilentProgress

IDS = torch.arange(4, 20)[None]
QUIET: dict[str, Any] = {"progress": SilentProgress()}
CLASSIFIER = "base_model.internal_xlora_classifier.layers.0."


def base(name: str = "tiny:llama") -> Any:
    model = load_model(find_pretrained(name), auto_class="AutoModelForCausalLM", device="cpu")
    model.config.use_cache = False
    return model


def write_adapter(folder: str, **options: Any) -> None:
    torch.manual_seed(len(folder))
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options
    peft.get_peft_model(base(), peft.LoraConfig(task_type="CAUSAL_LM", **config)).save_pretrained(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two adapters: of two ranks, at other places."""
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    write_adapter("legal")
    write_adapter("programs", r=2, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "down_proj"])
    return tmp_path


def mixture(**changes: Any) -> dict[str, Any]:
    adapter = {"method": "xlora", "adapters": {"law": "legal", "code": "programs"}} | changes
    return {**recipe(run={"dir": "mix"}), "adapter": adapter}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


@torch.no_grad()
def by_hand(classifier: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of X-LoRA's equation: each layer adds the sum over adapters of ``p(token) * scale * B A x``, with the mixture p
    of a linear classifier on the last hidden states of the plain model."""
    model = base()
    hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    weight, bias = (classifier[f"{CLASSIFIER}{name}"] for name in ("weight", "bias"))
    mixed = torch.softmax(hidden @ weight.T + bias, dim=-1)
    for index, (folder, scale) in enumerate((("legal", 8 / 4), ("programs", 3 / 2**0.5))):
        tensors = load_file(f"{folder}/adapter_model.safetensors")
        for name in (n for n in tensors if n.endswith("lora_A.weight")):
            layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
            layer.register_forward_hook(
                lambda _, x, y, a=a, b=b, i=index, s=scale: y + s * ((mixed[..., i, None] * x[0]) @ a.T) @ b.T
            )
    return logits(model)


def test_only_the_classifier_is_trained_and_its_mixture_is_the_equation(here: Path) -> None:
    """A file without the classifier, as PEFT writes it, or adapters in another order turn this red."""
    run = peftlab.train(mixture(), **QUIET)
    assert run.summary["after"]["loss"] < run.summary["before"]["loss"]
    assert run.summary["adapter"]["num_trained"] == 2 * 64 + 2
    trained = load_file("mix/adapter/adapter_model.safetensors")
    assert sorted(trained) == [f"{CLASSIFIER}bias", f"{CLASSIFIER}weight"]
    for name, folder in (("law", "legal"), ("code", "programs")):
        own, theirs = (load_file(f"{f}/adapter_model.safetensors") for f in (f"mix/adapter/{name}", folder))
        assert own.keys() == theirs.keys() and all(torch.equal(own[n], theirs[n]) for n in own)
    wanted = by_hand(trained)
    model = open_target(find_target("mix"), SilentProgress()).model
    ours = logits(model)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(base(), "mix/adapter")), wanted, rtol=1e-4, atol=1e-4
    )
    written = model.generate(input_ids=IDS, max_new_tokens=3, eos_token_id=None, do_sample=False)
    for length in range(IDS.shape[1], written.shape[1]):
        with torch.no_grad():
            following = model(input_ids=written[:, :length]).logits[0, -1].argmax()
        assert written[0, length] == following
    turned = {n: t.flip(0) for n, t in trained.items()}
    assert (by_hand(turned) - wanted).abs().max() > 1e-2


def test_run_needs_nothing_outside_its_folder_and_may_be_moved(here: Path) -> None:
    run = peftlab.train(mixture() | {"eval": {}}, **QUIET)
    (answer,) = peftlab.predict("mix", [{"word": "red 3"}], max_new_tokens=4, **QUIET)
    for name in ("legal", "programs"):
        shutil.rmtree(name)
    shutil.move("mix", "moved")
    assert peftlab.evaluate("moved", **QUIET)["metrics"]["loss"] == pytest.approx(
        run.summary["after"]["loss"], rel=1e-6
    )
    assert list(peftlab.predict("moved", [{"word": "red 3"}], max_new_tokens=4, **QUIET)) == [answer]
    with pytest.raises(RecipeError, match="X-LoRA cannot be merged: it mixes its adapters by the input"):
        peftlab.merge("moved", **QUIET)


@pytest.mark.parametrize(
    "options",
    [{}, {"xlora_depth": 2, "xlora_size": 16, "layerwise_scalings": True, "top_k_lora": 1}],
    ids=["plain", "deep"],
)
def test_resumed_run_ends_with_the_same_bytes(options: dict[str, Any], here: Path) -> None:
    whole = peftlab.train(mixture(**options), **QUIET).adapter
    document = mixture(**options)
    document["run"] = {"dir": "cut", "save_every": 2}
    with pytest.raises(Interrupted):
        peftlab.train(document, progress=Stopper(at=3))
    again = peftlab.train("cut", resume=True, **QUIET).adapter
    for name in ("", "law/", "code/"):
        file = f"{name}adapter_model.safetensors"
        assert (whole / file).read_bytes() == (again / file).read_bytes()


def test_mixture_goes_on_and_a_changed_adapter_is_noticed(here: Path) -> None:
    first = peftlab.train(mixture(), **QUIET)
    assert first.summary["mergeable"] is False, "no line says to merge it"
    document = {**mixture(), "adapter": {"start": "mix"}, "run": {"dir": "on"}, "train": {"max_steps": 4}}
    with pytest.raises(Interrupted):
        peftlab.train(document, progress=Stopper(at=2))
    on = peftlab.train("on", resume=True, **QUIET)
    assert on.summary["before"]["loss"] == pytest.approx(first.summary["after"]["loss"], rel=1e-6)
    shutil.move("mix", "moved")
    section = load_recipe(document | {"adapter": {"start": "moved"}}).recipe.adapter
    assert section.options["adapters"] == {name: f"moved/adapter/{name}" for name in ("law", "code")}
    with pytest.raises(Interrupted):
        peftlab.train({**mixture(), "run": {"dir": "cut"}}, progress=Stopper(at=2))
    write_adapter("programs", r=2, target_modules=["q_proj", "down_proj"])
    with pytest.raises(ArtifactError, match=r"mixed adapters has changed.*restore those that adapter.adapters names"):
        peftlab.train("cut", resume=True, **QUIET)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"a": "legal", "b": "nowhere"}, r"`adapter.adapters`: b: there is no folder nowhere"),
        ({"a": "legal"}, "`adapter.adapters`: expected 2 to 10 adapters to mix, found 1"),
        (
            {"a/b": "legal", "c": "dora"},
            r"'a/b' is no name for a folder of its own: .*; c: dora is an adapter of DoRA, and X-LoRA mixes",
        ),
        (
            {"a": "legal", "b": "head"},
            r"b: head changes lm_head\S*, and PEFT's X-LoRA reads only the factors of layers in the body",
        ),
        (
            {"a": "wide", "b": "legal"},
            "a: wide was made for another model: in_features of .* are 32 in it, and 64 here",
        ),
    ],
)
def test_adapters_that_cannot_be_mixed_are_named(adapters: dict[str, str], message: str, here: Path) -> None:
    write_adapter("dora", use_dora=True)
    write_adapter("head", modules_to_save=["lm_head"])
    shutil.copytree("legal", "wide")
    tensors = load_file("legal/adapter_model.safetensors")
    cut = {n: t[:, :32].contiguous() if "lora_A" in n else t for n, t in tensors.items()}
    save_file(cut, "wide/adapter_model.safetensors")
    with pytest.raises(RecipeError, match=message):
        peftlab.train(mixture(adapters=adapters), **QUIET)
    assert not Path("mix").exists()


def test_other_bases_families_and_settings_are_refused(trained: Any, here: Path) -> None:
    document = mixture(adapters={"a": str(trained(recipe(), write_data) / "run"), "b": "legal"})
    base().save_pretrained("model")
    load_tokenizer(find_pretrained("tiny:llama")).save_pretrained("model")
    document["model"] = {"name": "model"}
    with pytest.raises(ArtifactError, match=r"expected adapters of 'model' \(\w+\); found a on weights tiny:llama"):
        peftlab.train(document, **QUIET)
    for changes, message in (
        ({"train": {"max_steps": 1, "gradient_checkpointing": True}}, "the mixture of each forward, which is gone"),
        ({"model": {"name": "tiny:llama", "quantize": "nf4"}}, "X-LoRA does not work on nf4 weights"),
        ({"adapter": {"method": "xlora"}}, "xlora needs adapter.adapters"),
        (
            {"adapter": mixture(beside=[{"method": "oft", "targets": ["o_proj"]}])["adapter"]},
            "X-LoRA trains its classifier",
        ),
    ):
        with pytest.raises(RecipeError, match=message):
            peftlab.train(mixture() | changes, **QUIET)
    classes = recipe("seq_cls")["data"]
    with pytest.raises(PeftlabError, match="xlora has no place for modules that are trained in full"):
        peftlab.train(mixture() | {"task": "seq_cls", "data": classes, "eval": {}}, **QUIET)


def test_checkpoint_says_which_adapters_are_missing(here: Path) -> None:
    peftlab.train({**mixture(), "run": {"dir": "mix", "save_every": 3}}, **QUIET)
    shutil.rmtree("legal")
    with pytest.raises(ArtifactError, match=r"mixes adapters that are missing: legal; put them back"):
        peftlab.evaluate(min(Path("mix/checkpoints").iterdir()), **QUIET)
