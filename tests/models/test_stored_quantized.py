"""Bases that are stored quantized by bitsandbytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import peftlab
from peftlab.errors import RecipeError
from peftlab.models import find_pretrained, load_model, stored_as
from peftlab.training.progress import SilentProgress
from tests.run_examples import recipe, write_data

STORAGES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    return tmp_path


def write_stored(folder: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from peftlab.models.tiny import tiny_config, tiny_tokenizer

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("tiny:llama")).save_pretrained(folder / "plain")
    config = BitsAndBytesConfig(**STORAGES[kind])
    model = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(folder / "stored")
    tiny_tokenizer().save_pretrained(folder / "stored")


@pytest.mark.parametrize("kind", STORAGES)
def test_stored_base_is_trained_and_merged_into_its_dequantized_weights(here: Path, kind: str) -> None:
    write_stored(here, kind)
    storage = "int8" if kind == "int8" else "nf4"
    document = recipe(model={"name": "stored"}, eval={"before": False})
    findings = peftlab.check(document, progress=SilentProgress())["findings"]
    assert f"the weights are stored in {storage} by bitsandbytes" in next(
        f["message"] for f in findings if f["kind"] == "stored"
    )
    run = peftlab.train(document, progress=SilentProgress())
    assert peftlab.evaluate("run", progress=SilentProgress())["metrics"]["loss"] == pytest.approx(
        run.summary["after"]["loss"]
    )
    report = peftlab.merge("run", progress=SilentProgress())
    assert report["verified"] and list(report["targets"]) == ["dequantized"]
    assert "quantization_config" not in json.loads(Path("run/merged/config.json").read_text())
    with pytest.raises(
        RecipeError, match=rf"into dequantized \(the base of this run is stored in {storage}\), found 'original'"
    ):
        peftlab.merge("run", base="original", replace=True, progress=SilentProgress())


def test_stored_base_in_another_quantization_is_refused(here: Path) -> None:
    write_stored(here, "nf4")
    for changes, key in (
        ({"model": {"name": "stored", "quantize": "int8"}}, "model.quantize"),
        ({"model": {"name": "stored"}, "adapter": {"method": "none"}}, "adapter.method"),
    ):
        document = recipe(**changes)
        if key == "adapter.method":
            document["adapter"] = {"method": "none"}
        with pytest.raises(RecipeError, match="stored in nf4") as info:
            peftlab.check(document, progress=SilentProgress())
        assert info.value.key == key


def test_dequantized_weights_of_a_stored_base_are_those_that_it_computes_with(here: Path) -> None:
    write_stored(here, "nf4")
    options: dict[str, Any] = {"auto_class": "AutoModelForCausalLM", "device": "cpu"}
    stored = load_model(find_pretrained("stored"), quantize="nf4", compute_dtype="float32", **options)
    plain = load_model(find_pretrained("stored"), quantize="none", dtype="float32", **options)
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(stored(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_another_quantization_is_named(here: Path) -> None:
    write_stored(here, "nf4")
    path = Path("stored/config.json")
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    path.write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"stored quantized by gptq; peftlab reads bitsandbytes' 4 and 8 bits"):
        stored_as(find_pretrained("stored"))
