"""``adapter.start``: a run that begins with the adapter of another one."""

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

import peftlab
from peftlab.errors import ArtifactError, Interrupted, RecipeError
from peftlab.models import find_pretrained, load_model, load_tokenizer
from peftlab.training.progress import SilentProgress

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("causal_lm", {"rank": 4, "alpha": 8, "targets": ["q_proj", "up_proj"], "layers": [1], "rslora": True}),
    "head": ("seq_cls", {"rank": 4, "bias": "all"}),
    "tokens": ("causal_lm", {"rank": 4, "tokens": ["<a>", "<b>"]}),
    "pissa": ("causal_lm", {"rank": 4, "init_lora_weights": "pissa"}),
    "patterns": ("causal_lm", {"rank": 4, "patterns": [{"targets": ["q_proj"], "rank": 2, "alpha": 3}]}),
    "dora": ("causal_lm", {"rank": 4, "dora": True}),
    "bottleneck": ("seq_cls", {"method": "bottleneck", "style": "houlsby", "scaling": "learned", "layers": [0]}),
    "oft": ("causal_lm", {"method": "oft", "oft_block_size": 8}),
    "fourierft": ("causal_lm", {"method": "fourierft", "n_frequency": 50, "random_loc_seed": 5}),
}


def first(name: str) -> dict[str, Any]:
    task, adapter = ADAPTERS[name]
    return {**recipe(task, train={"max_steps": 3}), "adapter": adapter}


def train(document: Any, *overrides: str, **options: Any) -> Any:
    return peftlab.train(document, overrides, **{"progress": SilentProgress(), **options})


def goes_on(start: Path | str, task: str = "causal_lm", **adapter: Any) -> dict[str, Any]:
    document = recipe(task, train={"max_steps": 1}, run={"dir": "second"})
    return {**document, "adapter": {"start": str(start), **adapter}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def lora(trained: Any, here: Path) -> Path:
    """A finished run with LoRA."""
    return trained(first("lora"), write_data) / "run"


@pytest.mark.parametrize("name", ADAPTERS)
def test_run_begins_where_the_other_one_ended(name: str, trained: Any, here: Path) -> None:
    """A start that is not loaded, or an alpha that is not read from the adapter, turns this red."""
    run = trained(first(name), write_data) / "run"
    second = train(goes_on(run, ADAPTERS[name][0]))
    ended = json.loads((run / "run.json").read_text())["after"]["loss"]
    assert second.summary["before"]["loss"] == pytest.approx(ended, rel=1e-6)
    assert second.summary["after"]["loss"] != second.summary["before"]["loss"]
    stored, own = (load_file(f / "adapter/adapter_model.safetensors") for f in (run, second.folder))
    # A run with PiSSA is saved as a plain LoRA of twice the rank, and this one goes on.
    assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in stored.items()}
    assert second.summary["reopened"]["kl_mean"] < 1e-6


def test_resumed_run_with_a_start_ends_with_the_same_bytes(lora: Path, here: Path) -> None:
    document = goes_on(lora, dropout=0.1) | {"train": {"max_steps": 5, "batch_size": 8, "lr": 1e-2}}
    whole = train(document).adapter / "adapter_model.safetensors"
    document["run"] = {"dir": "cut", "save_every": 2}
    with pytest.raises(Interrupted):
        train(document, progress=Stopper(at=3))
    again = train("cut", resume=True).adapter / "adapter_model.safetensors"
    assert whole.read_bytes() == again.read_bytes()
    fresh = train({**document, "adapter": {"rank": 4}, "run": {"dir": "fresh"}}).adapter / "adapter_model.safetensors"
    assert fresh.read_bytes() != whole.read_bytes()


def test_changed_start_is_noticed_on_resume_and_needed_by_nothing_else(lora: Path, here: Path) -> None:
    shutil.copytree(lora, "first")
    document = goes_on("first") | {"train": {"max_steps": 5}, "run": {"dir": "cut"}}
    with pytest.raises(Interrupted):
        train(document, progress=Stopper(at=2))
    file = Path("first/adapter/adapter_model.safetensors")
    save_file({n: t + 1 for n, t in load_file(file).items()}, file)
    with pytest.raises(ArtifactError, match=r"start adapter has changed.*restore the adapter that adapter.start names"):
        train("cut", resume=True)
    shutil.rmtree("first")
    with pytest.raises(RecipeError, match=r"adapter.start.*there is no folder \S*first"):
        train("cut", resume=True)
    shutil.copytree(lora, "first")
    train("cut", resume=True)
    shutil.rmtree("first")
    assert peftlab.evaluate("cut", progress=SilentProgress())["metrics"]["loss"] > 0
    assert peftlab.merge("cut", progress=SilentProgress())["verified"]


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "lora_alpha": 3}, {"init_lora_weights": "pissa"}], ids=str
)
def test_adapter_of_plain_peft_goes_on(options: dict[str, Any], here: Path) -> None:
    """Its outputs by PEFT alone are those of the first step."""
    model = load_model(find_pretrained("tiny:llama"), auto_class="AutoModelForCausalLM", device="cpu")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "down_proj"], **options)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained("plain")
    second = train(goes_on("plain"))
    wanted = peftlab.evaluate("plain", recipe=goes_on("plain"), progress=SilentProgress())["metrics"]["loss"]
    assert second.summary["before"]["loss"] == pytest.approx(wanted, rel=1e-5)
    base = peftlab.evaluate("tiny:llama", recipe=goes_on("plain"), progress=SilentProgress())["metrics"]["loss"]
    assert abs(wanted - base) > 1e-3


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"rank": 8}, r"`adapter.rank`.*adapter.rank: expected 4, found 8; leave these keys out"),
        (
            {"alpha": 4, "rslora": False},
            r"adapter.alpha: expected 8, found 4; adapter.rslora: expected True, found False",
        ),
        ({"method": "vera"}, r"`adapter.method`.*expected lora, the method of the adapter in .*; found vera"),
        ({"targets": ["q_proj"], "layers": [1]}, r"other tensors than this recipe: \d+ of the file have no place here"),
        ({"targets": "all-linear"}, r"other tensors than this recipe: \d+ are missing in the file"),
    ],
)
def test_recipe_that_describes_another_adapter_is_refused(
    adapter: dict[str, Any], message: str, lora: Path, here: Path
) -> None:
    with pytest.raises((RecipeError, ArtifactError), match=message):
        train(goes_on(lora, **adapter))
    assert not Path("second").exists()


def test_adapter_of_other_weights_or_classes_is_refused(trained: Any, lora: Path, here: Path) -> None:
    other = goes_on(lora)
    load_model(find_pretrained("tiny:llama"), auto_class="AutoModelForCausalLM", device="cpu").save_pretrained("model")
    load_tokenizer(find_pretrained("tiny:llama")).save_pretrained("model")
    other["model"] = {"name": "model"}
    with pytest.raises(
        ArtifactError, match=r"was made for another model: it was trained on weights tiny:llama, and 'model'"
    ):
        train(other)
    run = trained(first("head"), write_data) / "run"
    names = goes_on(run, "seq_cls")
    names["data"] = {**names["data"], "label_names": {"animal": "beast", "colour": "hue"}}
    with pytest.raises(RecipeError, match="tells apart animal, colour; found"):
        train(names)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("nowhere", r"`adapter.start`: there is no folder nowhere; expected a run"),
        (".", r"`adapter.start`: . has no adapter_config.json; expected a run"),
        ("broken", r"broken/adapter_config.json is damaged: .*; restore it from a checkpoint"),
        ("unknown", "expected nothing, the method of the adapter in unknown; found lora"),
    ],
)
def test_start_that_is_no_adapter_is_refused(start: str, message: str, here: Path) -> None:
    for name, text in (("broken", "{"), ("unknown", '{"peft_type": "NOTHING"}')):
        Path(name).mkdir()
        Path(name, "adapter_config.json").write_text(text)
        save_file({"a": torch.ones(1)}, Path(name, "adapter_model.safetensors"))
    with pytest.raises((RecipeError, ArtifactError), match=message):
        train(goes_on(start))
    with pytest.raises(RecipeError, match=r"adapter.start: has no effect without an adapter"):
        peftlab.load_recipe({**goes_on("x"), "adapter": {"method": "none", "start": "x"}, "lock": {"name": "x"}})


@pytest.mark.parametrize("method", ["p_tuning", "adalora"])
def test_method_whose_files_are_for_inference_goes_on_from_a_checkpoint(method: str, here: Path) -> None:
    document = {
        **recipe(train={"max_steps": 2, "lr": 1e-3}, run={"dir": "run", "save_every": 1}),
        "adapter": {"method": method},
    }
    document["eval"] |= {"every": 1}
    run = train(document)
    with pytest.raises(ArtifactError, match=r"are for inference: they have .*; name a checkpoint, such as"):
        train(goes_on("run"))
    second = train(goes_on("run/checkpoints/step-00000001") | {"train": {"max_steps": 3}})
    at_first = next(line for line in run.metrics() if line.get("step") == 1 and "eval" in line)
    assert second.summary["before"]["loss"] == pytest.approx(at_first["eval"]["loss"], rel=1e-6)
