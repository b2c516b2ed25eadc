"""The files of bottlenecks: sorted, equal for equal runs, refused if damaged or made for another model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftlab.adapters import add_adapter, load_adapter, load_trained, save_adapter, save_trained
from peftlab.adapters.bottleneck import (
    BottleneckModel,
    add_bottlenecks,
    bottleneck_state,
    load_bottleneck_state,
    load_bottlenecks,
)
from peftlab.errors import ArtifactError
from tests.adapters.bottleneck_examples import adapted, config_of, filled, logits, make
from tests.family_examples import CLASSIFIERS, make_config, make_model


def test_bottleneck_files_are_sorted_and_equal_for_equal_runs(tmp_path: Path) -> None:
    names = ("adapter_config.json", "adapter_model.safetensors")
    for folder in ("a", "b"):
        save_adapter(adapted(scaling="learned", layers=(1,)), tmp_path / folder)
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    adapted(scaling="learned", layers=(1,)).save_pretrained(str(tmp_path / "c"))
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "c" / n).read_bytes() for n in names)
    settings = json.loads((tmp_path / "a" / names[0]).read_text())
    assert list(settings) == sorted(settings)
    assert settings == {
        "base_model_name_or_path": None,
        "dropout": 0.0,
        "inference_mode": True,
        "layers": [1],
        "modules_to_save": None,
        "non_linearity": "swish",
        "peft_type": "BOTTLENECK",
        "reduction_factor": 4,
        "scaling": "learned",
        "style": "houlsby",
        "task_type": None,
    }
    assert "base_model.model.bert.encoder.layer.1.output.dropout.bottleneck.scaling" in load_file(
        tmp_path / "a" / names[1]
    )


def test_bottleneck_state_is_copied_into_another_model() -> None:
    model, other = adapted(), filled(adapted(), seed=5)
    state = {name: value.clone() for name, value in bottleneck_state(model).items()}
    load_bottleneck_state(other, state)
    assert torch.equal(logits(other), logits(model))
    name = next(iter(state))
    for wrong in ({}, {**state, "more": state[name]}, {**state, name: torch.zeros(1)}):
        with pytest.raises(RuntimeError):
            load_bottleneck_state(other, wrong)
    assert torch.equal(logits(other), logits(model))


def _edited(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        settings = json.loads(path.read_text()) | values
        path.write_text(json.dumps({k: v for k, v in settings.items() if v != "absent"}))

    return edit


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


def _cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "expected .*safetensors; it is missing"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json is damaged"),
        (_cut, "adapter_model.safetensors is damaged"),
        (_edited(peft_type="LORA"), "expected an adapter of BOTTLENECK in .*, found one of LORA"),
        (_edited(style="absent"), "is damaged: it lacks 'style'"),
        (_edited(non_linearity="rellu"), "is damaged: adapter.non_linearity: .*'rellu'"),
        (_edited(layers=[7]), r"made for another model \(unknown\), not for BertFor.*found 7"),
        (_edited(style="pfeiffer"), r"\d+ tensors do not match, such as base_model.*the (file|model)"),
        (_edited(reduction_factor=8), r"down.weight is \[8, 32\] in the file and \[4, 32\] in the model"),
        (_tensors(lambda t: t.pop(next(iter(sorted(t))))), r"1 tensors do not match, .*\(in the model but not in the file"),
        (_tensors(lambda t: t.update(more=torch.ones(1))), r"such as more \(in the file but not in the model\)"),
    ],
)  # fmt: skip
def test_load_bottlenecks_refuses_damaged_files(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    adapted().save_pretrained(str(tmp_path))
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_bottlenecks(make("BertConfig"), tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_load_bottlenecks_refuses_another_model(tmp_path: Path) -> None:
    adapted().save_pretrained(str(tmp_path))
    with pytest.raises(ArtifactError, match=r"not for BertFor.*is \[8, 32\] in the file and \[4, 16\] in the model"):
        load_bottlenecks(
            make_model(make_config("BertConfig", _narrow()), "AutoModelForSequenceClassification"), tmp_path
        )
    with pytest.raises(ArtifactError, match=r"not for LlamaFor.*tensors do not match"):
        load_bottlenecks(make("LlamaConfig"), tmp_path)


def _narrow() -> dict[str, dict[str, Any]]:
    return {"BertConfig": {**CLASSIFIERS["BertConfig"], "hidden_size": 16}}


def test_bottleneck_files_are_loaded_by_the_functions_for_every_adapter(tmp_path: Path) -> None:
    model = adapted()
    save_trained(model, tmp_path / "checkpoint")
    again = load_adapter(make("BertConfig"), tmp_path / "checkpoint")
    assert isinstance(again, BottleneckModel) and torch.equal(logits(again), logits(model))
    resumed = filled(adapted(), seed=5)
    load_trained(resumed, tmp_path / "checkpoint")
    assert torch.equal(logits(resumed), logits(model))
    with pytest.raises(ArtifactError, match="belongs to a run with another adapter"):
        load_trained(adapted(style="pfeiffer"), tmp_path / "checkpoint")
    narrow = make_model(make_config("BertConfig", _narrow()), "AutoModelForSequenceClassification")
    other = add_bottlenecks(narrow, config_of("houlsby"))
    with pytest.raises(ArtifactError, match=r"for another model .*\[8, 32\] in the file and \[4, 16\] in the model"):
        add_adapter(other, tmp_path / "checkpoint", name="second")


def test_load_bottlenecks_to_train_on(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(str(tmp_path))
    again = load_bottlenecks(make("BertConfig"), tmp_path, trainable=True)
    assert isinstance(again, BottleneckModel)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
