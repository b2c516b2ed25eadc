"""The witness of a run: it is written from memory, and what opens the files later is compared with it (contract C13)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftlab
from peftlab.assembly import prepare as prepare_module
from peftlab.assembly.witness import WITNESS_NAME
from peftlab.errors import ArtifactError, Interrupted, VerificationError
from peftlab.training.progress import SilentProgress
from tests.family_examples import write_family
from tests.run_examples import Stopper, write_data
from tests.run_examples import recipe as run_recipe

_WORDS = {"good": "pos", "fine": "pos", "bad": "neg", "poor": "neg"}


def write_rows(folder: Path) -> None:
    rows = [{"text": f"{word} film {i}", "label": label} for i in range(8) for word, label in _WORDS.items()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(family: str, **sections: Any) -> dict[str, Any]:
    images = family == "ResNetConfig"
    document: dict[str, Any] = {
        "task": "image_cls" if images else "seq_cls",
        "model": {"name": "model"},
        "data": {"train": "sklearn:digits" if images else "rows.jsonl", "eval_rows": 8},
        "train": {"max_steps": 4, "batch_size": 4, "lr": 1e-2},
        "eval": {"before": False},
        "run": {"dir": "run"},
    }
    for name, values in sections.items():
        document[name] = {**document.get(name, {}), **values}
    return document


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    return tmp_path


def train(family: str, **sections: Any) -> Any:
    if not Path("model").exists():
        write_family(Path("model"), family, "image_cls" if family == "ResNetConfig" else "seq_cls")
    return peftlab.train(recipe(family, **sections), progress=SilentProgress())


def scores() -> list[float]:
    return [peftlab.evaluate("run", progress=SilentProgress())["metrics"]["loss"] for _ in range(2)]


# Heads with layers of their own, and poolers, that the files of a base model lack.
@pytest.mark.parametrize("family", ["RobertaConfig", "DistilBertConfig", "DebertaV2Config", "ModernBertConfig"])
@pytest.mark.parametrize("targets", ["all-linear", "few"])
def test_new_modules_are_trained_and_saved(here: Path, family: str, targets: str) -> None:
    few = {
        "RobertaConfig": ["query"],
        "DistilBertConfig": ["q_lin"],
        "DebertaV2Config": ["query_proj"],
        "ModernBertConfig": ["Wqkv"],
    }
    run = train(family, adapter={"targets": few[family] if targets == "few" else "all-linear"}, run={"save_every": 2})
    whole = {
        "RobertaConfig": "classifier",
        "DistilBertConfig": "pre_classifier",
        "DebertaV2Config": "pooler",
        "ModernBertConfig": "head",
    }
    assert whole[family] in run.summary["adapter"]["whole"]
    stored = load_file("run/adapter/adapter_model.safetensors")
    assert any(f".{whole[family]}." in name for name in stored)
    assert stored.keys() == load_file("run/checkpoints/step-00000002/adapter_model.safetensors").keys()
    assert scores() == [run.summary["after"]["loss"]] * 2
    assert run.summary["reopened"]["kl_max"] < 1e-9
    assert peftlab.merge("run", progress=SilentProgress())["verified"]


def test_new_pooler_is_trained_and_saved(here: Path) -> None:
    """BERT as published for masked language modelling has no pooler."""
    from transformers import AutoModel

    write_family(Path("model"), "BertConfig", "seq_cls")
    AutoModel.from_pretrained("model", add_pooling_layer=False).save_pretrained("model")
    run = train("BertConfig", adapter={"targets": ["query", "value"]})
    assert run.summary["adapter"]["whole"] == ["bert.pooler", "classifier"]
    assert scores() == [run.summary["after"]["loss"]] * 2


def test_head_for_other_classes_is_replaced_and_trained(here: Path) -> None:
    write_family(Path("model"), "RobertaConfig", "seq_cls", num_labels=5)
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained("model").save_pretrained("model")
    run = train("RobertaConfig")
    assert "classifier" in run.summary["adapter"]["whole"]
    assert scores() == [run.summary["after"]["loss"]] * 2


def test_run_that_does_not_save_a_new_module_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deliberate fault: the new head layer is not among the trained modules."""
    monkeypatch.setattr(prepare_module, "new_weights", lambda model: frozenset())
    with pytest.raises(VerificationError, match="do not give the outputs of the model that was trained: mean KL"):
        train("ModernBertConfig", adapter={"targets": ["Wqkv"]})
    assert json.loads(Path("run/run.json").read_text())["status"] == "trained"


def test_eval_and_merge_compare_with_the_witness(here: Path) -> None:
    train("RobertaConfig")
    path = Path("run/adapter/adapter_model.safetensors")
    tensors = load_file(path)
    name = next(n for n in tensors if "classifier.dense.weight" in n)
    save_file({**tensors, name: torch.randn_like(tensors[name])}, path, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="the files in run/adapter do not give the outputs"):
        peftlab.evaluate("run", progress=SilentProgress())
    with pytest.raises(VerificationError, match="mean KL"):
        peftlab.merge("run", progress=SilentProgress())
    assert not Path("run/merged").exists()
    Path("run", WITNESS_NAME).write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"witness.safetensors is damaged: .*; remove it"):
        peftlab.evaluate("run", progress=SilentProgress())


def test_texts_of_a_single_token_have_a_witness(here: Path) -> None:
    """A masked language model predicts the first token too."""
    (here / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n' * 6)
    document = recipe("", model={"name": "tiny:bert"}, data={"eval_rows": 4}) | {"task": "masked_lm"}
    assert peftlab.train(document, progress=SilentProgress()).summary["reopened"]["num_positions"] == 4


def test_frozen_statistics_stay(here: Path) -> None:
    run = train(
        "ResNetConfig", adapter={"targets": ["convolution"]}, eval={"before": False, "every": 2}, run={"save_every": 2}
    )
    base = load_file("model/model.safetensors")
    assert scores() == [run.summary["after"]["loss"]] * 2
    assert peftlab.merge("run", progress=SilentProgress())["verified"]
    merged = load_file("run/merged/model.safetensors")
    statistics = [n for n in base if n.endswith("running_mean")]
    assert statistics and all(torch.equal(merged[f"resnet.{n}"], base[n]) for n in statistics)


@pytest.mark.parametrize("batch_norm", ["frozen", "trained"])
def test_statistics_of_a_trained_model_resume_exactly(here: Path, batch_norm: str) -> None:
    sections: dict[str, Any] = {
        "adapter": {"method": "none"},
        "train": {"max_steps": 4, "batch_size": 4, "batch_norm": batch_norm},
    }
    whole = train("ResNetConfig", **sections, run={"save_every": 2})
    document = recipe("ResNetConfig", **sections, run={"save_every": 2, "dir": "other"})
    with pytest.raises(Interrupted):
        peftlab.train(document, progress=Stopper(at=3))
    peftlab.train("other", resume=True, progress=SilentProgress())
    one, two = (load_file(f"{folder}/model/model.safetensors") for folder in ("run", "other"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    statistics = [n for n in one if n.endswith("running_mean")]
    base = load_file("model/model.safetensors")
    same = [torch.equal(one[n], base[n.removeprefix("resnet.")]) for n in statistics]
    assert all(same) if batch_norm == "frozen" else not any(same)
    assert whole.summary["reopened"]["kl_max"] < 1e-9
    assert scores() == [pytest.approx(whole.summary["after"]["loss"], rel=1e-6)] * 2


def test_buffers_that_an_adapter_cannot_contain_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftlab.training.parity.train_mode", lambda model: model.train())
    with pytest.raises(
        VerificationError, match=r"training changes 18 buffers of frozen modules, such as resnet\..*running_mean"
    ):
        train("ResNetConfig", adapter={"targets": ["convolution"]})
    assert not Path("run").exists()


def test_checkpoint_from_before_the_end_is_no_fault(here: Path) -> None:
    write_data(here)
    peftlab.train(run_recipe(run={"save_every": 1, "keep": 9}), progress=SilentProgress())
    checkpoint = min(Path("run/checkpoints").iterdir())
    losses = [peftlab.evaluate(f, progress=SilentProgress())["metrics"]["loss"] for f in (checkpoint, "run")]
    assert losses[0] != losses[1]
