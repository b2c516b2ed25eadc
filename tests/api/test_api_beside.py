"""``adapter.beside``: adapters of several methods in one run."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from run_examples import Stopper, contents, recipe, write_data
from safetensors.torch import load_file

import peftlab
from peftlab.adapters import load_adapter, rate_factors, without_adapter
from peftlab.adapters.bottleneck import load_bottlenecks
from peftlab.assembly import Assembly
from peftlab.assembly.prepare import trainable
from peftlab.assembly.target import find_target, open_target
from peftlab.errors import ArtifactError, Interrupted, RecipeError
from peftlab.models import find_pretrained, load_model
from peftlab.recipe import load_recipe
from peftlab.training.progress import SilentProgress

IDS = torch.arange(4, 20)[None]
MIXES: dict[str, dict[str, Any]] = {
    "lora": {
        "rank": 4,
        "beside": [
            {"method": "ia3", "targets": ["k_proj", "v_proj"]},
            {"method": "oft", "targets": ["gate_proj"], "layers": [0], "oft_block_size": 8, "lr": 1e-3},
        ],
    },
    "oft": {"method": "oft", "oft_block_size": 8, "beside": [{"method": "lora", "targets": ["q_proj"], "rank": 4}]},
    "mix and match": {
        "method": "prefix_tuning",
        "num_virtual_tokens": 4,
        "beside": [{"method": "bottleneck", "style": "parallel"}],
    },
}
METHODS = {"lora": ["ia3", "oft"], "oft": ["lora"], "mix and match": ["bottleneck"]}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def document(mix: str, **sections: Any) -> dict[str, Any]:
    return recipe(**sections) | {"adapter": MIXES[mix]}


@pytest.fixture(params=MIXES)
def mix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(mix: str, trained: Any, here: Path) -> Path:
    """A finished run."""
    return Path(shutil.copytree(trained(document(mix), write_data) / "run", here / "run"))


def train(recipe: Any, **options: Any) -> Any:
    return peftlab.train(recipe, **{"progress": SilentProgress(), **options})


def base(**options: Any) -> Any:
    return load_model(find_pretrained("tiny:llama"), auto_class="AutoModelForCausalLM", device="cpu", **options)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


def plain_peft(folder: Path) -> Any:
    """The model as docs/adapters.md says that PEFT opens it."""
    model = base()
    if (folder / "beside/bottleneck").is_dir():
        load_bottlenecks(model, folder / "beside/bottleneck")
    opened = peft.PeftModel.from_pretrained(model, folder)
    for path in sorted((folder / "beside").iterdir()):
        if path.name != "bottleneck":
            config = peft.PeftConfig.from_pretrained(path)
            peft.inject_adapter_in_model(config, model)
            model.peft_config = {"default": config}
            peft.set_peft_model_state_dict(
                model,
                {
                    k.removeprefix("base_model.model."): v
                    for k, v in load_file(path / "adapter_model.safetensors").items()
                },
            )
    return opened


def test_all_adapters_are_trained_saved_and_opened(mix: str, run: Path) -> None:
    summary = json.loads((run / "run.json").read_text())
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert summary["reopened"]["kl_mean"] < 1e-9, "the files give the outputs of the model in memory"
    assert sorted(path.name for path in (run / "adapter/beside").iterdir()) == METHODS[mix]
    ours = load_adapter(base(), run / "adapter")
    trained = logits(ours)
    torch.testing.assert_close(logits(plain_peft(run / "adapter")), trained, rtol=1e-5, atol=1e-5)
    with without_adapter(ours):
        torch.testing.assert_close(logits(ours), logits(base()), rtol=0, atol=0)
    assert torch.equal(logits(ours), trained), "and they are on again"
    for method in METHODS[mix]:
        alone = shutil.copytree(run / "adapter", run.parent / f"without-{method}")
        shutil.rmtree(alone / "beside" / method)
        assert (logits(load_adapter(base(), alone)) - trained).abs().max() > 1e-4, f"{method} has learned something"


def test_file_of_each_adapter_is_one_that_plain_peft_opens_alone(mix: str, run: Path) -> None:
    names = [set(load_file(path)) for path in run.glob("adapter/**/adapter_model.safetensors")]
    assert sum(map(len, names)) == len(set().union(*names)), "each tensor is in one file"
    peft.PeftModel.from_pretrained(base(), run / "adapter")
    for path in (run / "adapter/beside").iterdir():
        if path.name != "bottleneck":
            peft.PeftModel.from_pretrained(base(), path)


def test_stopped_run_ends_with_the_same_bytes(mix: str, run: Path) -> None:
    with pytest.raises(Interrupted):
        train(document(mix, run={"dir": "other", "save_every": 2}), progress=Stopper(at=3))
    train("other", resume=True)
    assert contents(Path("other/adapter")) == contents(run / "adapter")


def test_merge_takes_all_of_them(mix: str, run: Path) -> None:
    if mix == "mix and match":
        with pytest.raises(RecipeError, match="prefix tuning cannot be merged"):
            peftlab.merge(run, progress=SilentProgress())
        return
    report = peftlab.merge(run, output="merged", progress=SilentProgress())
    layers = report["targets"]["original"]["layers"]
    assert report["verified"] and layers["by_formula"] == 14 and layers["unchecked"] == 0
    merged = load_model(find_pretrained("merged"), auto_class="AutoModelForCausalLM", device="cpu")
    torch.testing.assert_close(logits(merged), logits(load_adapter(base(), run / "adapter")), rtol=1e-4, atol=1e-4)


def test_lost_adapter_is_found(mix: str, run: Path) -> None:
    shutil.rmtree(run / "adapter/beside" / METHODS[mix][0])
    with pytest.raises(ArtifactError, match=rf"lacks the adapter of {METHODS[mix][0]} that was trained beside it"):
        peftlab.evaluate(run, progress=SilentProgress())


def test_other_folders_are_left_alone(here: Path, trained: Any) -> None:
    run = Path(shutil.copytree(trained(document("lora"), write_data) / "run", "copied"))
    (run / "adapter/beside/.ipynb_checkpoints").mkdir()
    open_target(find_target(run), SilentProgress())


def test_damaged_file_is_named(here: Path, trained: Any) -> None:
    run = shutil.copytree(trained(document("lora"), write_data) / "run", "damaged")
    file = Path(run, "adapter/beside/ia3/adapter_model.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ArtifactError, match=r"beside/ia3/adapter_model.safetensors is damaged"):
        open_target(find_target(Path(run)), SilentProgress())


def test_learning_rates_of_their_own(here: Path) -> None:
    assembly = Assembly(load_recipe(document("lora")))
    model, _, _ = trainable(assembly, assembly.model())
    factors = rate_factors(model, lr=1e-2)
    assert factors and set(factors.values()) == {0.1} and all(".gate_proj." in name for name in factors)
    moved = " ".join(n for n, p in model.named_parameters() if p.requires_grad)
    assert all(kind in moved for kind in (".lora_A.", ".ia3_l.", ".oft_R."))
    oft = [n for n, p in model.named_parameters() if "oft_" in n and p.requires_grad]
    assert oft and all(".layers.0." in name for name in oft), "layers limits it"


def test_method_that_needs_dense_weights_is_refused_on_others(here: Path) -> None:
    adapter = {"rank": 4, "beside": [{"method": "hra", "targets": ["q_proj"]}]}
    with pytest.raises(RecipeError, match=r"adapter.beside.0.method: HRA does not work on nf4 weights"):
        train(recipe(model={"quantize": "nf4"}) | {"adapter": adapter})


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_quantized_base(storage: str, here: Path) -> None:
    run = train(document("lora", model={"quantize": storage}))
    assert run.summary["reopened"]["kl_mean"] < 1e-6
    assert peftlab.merge("run", progress=SilentProgress())["verified"]


def test_classifier_keeps_its_head_in_the_main_file(here: Path) -> None:
    adapter = {"rank": 4, "beside": [{"method": "ia3", "targets": ["key"]}]}
    run = train(recipe("seq_cls") | {"adapter": adapter})
    assert run.summary["reopened"]["kl_mean"] < 1e-9
    assert any("classifier" in name for name in load_file("run/adapter/adapter_model.safetensors"))
    assert all("ia3" in name for name in load_file("run/adapter/beside/ia3/adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("adapter", "message", "key"),
    [
        ({"beside": [{"method": "lora", "targets": ["q_proj"]}]}, "there is one lora already; adapter.patterns gives", "0.method"),
        ({"beside": [{"method": "vera", "targets": ["q_proj"]}]}, "vera cannot be trained beside another method", "0.method"),
        ({"beside": [{"method": "gralora", "targets": ["q_proj"]}]}, "cannot tell the tensors of gralora from those of lora", "0.method"),
        ({"beside": [{"method": "ia3"}]}, "missing: it says which modules this adapter changes", "0.targets"),
        ({"beside": [{"method": "ia3", "targets": ["nothing"]}]}, "nothing", "0.targets"),
        ({"beside": [{"method": "ia3", "targets": ["q_proj"], "rank": 4}]}, "has no effect for ia3; remove it", "0.rank"),
        ({"beside": [{"method": "ia3", "targets": ["q_proj"], "r": 4}]}, "unknown key", "0.r"),
        ({"beside": [{"method": "oft", "targets": ["q_proj"], "oft_blok_size": 4}]}, "did you mean `oft_block_size`", "oft_blok_size"),
        (
            {"beside": [{"method": "ia3", "targets": ["q_proj"]}, {"method": "oft", "targets": ["q_proj"]}]},
            "has an adapter of ia3 already",
            "1.targets",
        ),
        ({"beside": [{"method": "bottleneck", "style": "parallel"}]}, "has both the main adapter and one of bottleneck", "0.targets"),
        ({"method": "none", "beside": [{"method": "ia3", "targets": ["q_proj"]}]}, "is not for adapter.method: none", "beside"),
        ({"tokens": ["<a>"], "beside": [{"method": "ia3", "targets": ["q_proj"]}]}, "is not for an adapter with others beside", "tokens"),
        (
            {"method": "oft", "beside": [{"method": "lora", "targets": ["q_proj"], "init_lora_weights": "pissa"}]},
            "pissa looks at training rows or changes the weights, which only the main adapter can",
            "0.init_lora_weights",
        ),
    ],
)  # fmt: skip
def test_mistake_is_one_message(adapter: dict[str, Any], message: str, key: str, here: Path) -> None:
    with pytest.raises(RecipeError) as error:
        peftlab.check(recipe() | {"adapter": adapter}, progress=SilentProgress())
    assert message in str(error.value) and key in f"{error.value.key} {error.value}"


def test_what_takes_one_method_only_says_so(here: Path, trained: Any) -> None:
    run = shutil.copytree(trained(document("lora"), write_data) / "run", here / "run")
    with pytest.raises(
        RecipeError,
        match=r"has adapters of several methods \(ia3, oft beside it\); this command takes an adapter of one",
    ):
        peftlab.shrink_adapter(run, "small")
    with pytest.raises(RecipeError, match=r"adapter.start continues an adapter of one method"):
        train(recipe(run={"dir": "next"}) | {"adapter": {"start": str(run)}})


def test_beside_that_cannot_be_merged_is_refused_before_training(here: Path) -> None:
    document = recipe(run={"merge": "original"}) | {
        "adapter": {"targets": ["q_proj"], "beside": [{"method": "bottleneck"}]}
    }
    with pytest.raises(RecipeError, match=r"run.merge: bottleneck adapters cannot be merged"):
        peftlab.check(document, progress=SilentProgress())


def test_loraplus_is_for_a_lora_beside_too(here: Path) -> None:
    assembly = Assembly(load_recipe(document("oft", train={"loraplus_lr_ratio": 4.0})))
    model, _, _ = trainable(assembly, assembly.model())
    factors = rate_factors(model, 1e-2, 4.0)
    assert factors and all("q_proj.lora_B" in name for name in factors)


def test_opening_prints_no_warning_of_peft(here: Path, trained: Any) -> None:
    run = trained(document("lora"), write_data) / "run"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Already found")
        load_adapter(
            load_model(find_pretrained("tiny:llama"), auto_class="AutoModelForCausalLM", device="cpu"), run / "adapter"
        )
