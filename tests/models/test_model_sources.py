"""What a model name means, and the names and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peftlab.errors import ArtifactError, PeftlabError, RecipeError
from peftlab.models import find_pretrained, load_model, load_tokenizer
from peftlab.models import gguf as gguf_module
from peftlab.models.source import resolve_model


@pytest.fixture
def folder(tiny: Any, tokenizer_of: Any, tmp_path: Path) -> Path:
    """A tiny model saved as a user's local folder."""
    path = tmp_path / "llama"
    tiny("tiny:llama", adapter=False).save_pretrained(path)
    tokenizer_of("tiny:llama").save_pretrained(path)
    return path


def refused(name: str, error: type[PeftlabError], message: str, **options: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        resolve_model(name, **options)
    assert caught.value.key in ("model.name", "model.revision")
    assert type(caught.value) is error


def test_resolve_model_tells_kinds_of_names_apart() -> None:
    assert resolve_model("tiny:llama").kind == "tiny"
    hub = resolve_model("HuggingFaceTB/SmolLM2-135M", "main")
    assert (hub.kind, hub.path, hub.revision) == ("hub", "HuggingFaceTB/SmolLM2-135M", "main")
    assert resolve_model("gpt2").kind == "hub"


def test_resolve_model_accepts_a_local_folder(folder: Path) -> None:
    source = resolve_model(str(folder))
    assert (source.kind, source.path) == ("folder", str(folder))
    refused(str(folder), RecipeError, "a revision needs a hub model", revision="main")


def test_resolve_model_refuses_unknown_names(tmp_path: Path, folder: Path) -> None:
    refused("tiny:gpt", RecipeError, "there are tiny:llama, tiny:bert, tiny:t5, tiny:vit")
    refused(str(tmp_path / "lama"), RecipeError, "did you mean '.*llama'")
    refused("./no/such", RecipeError, "the folder no does not exist either")
    refused("model.gguf", RecipeError, "no such model file")
    refused("a b c", RecipeError, "no such model file")
    refused("tiny:llama", RecipeError, "a revision needs a hub model", revision="main")


def test_resolve_model_refuses_packages_without_the_model() -> None:
    refused("package:", RecipeError, "expected package:IMPORT_NAME/RELATIVE/PATH")
    refused("package:torch", RecipeError, "expected package:IMPORT_NAME/RELATIVE/PATH")
    refused("package:no_such_package/model", RecipeError, r"package 'no_such_package' \(from .*\) is not installed")
    refused("package:torch/no_such_thing", RecipeError, "has no 'no_such_thing'")
    refused("package:torch/optm", RecipeError, "did you mean 'optim'")


def test_resolve_model_refuses_folders_without_a_model(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), RecipeError, "has no config.json")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.lock.yaml").write_text("task: causal_lm")
    refused(str(run), RecipeError, "run folder: its merged model is in merged/")
    (folder / "model.safetensors").unlink()
    refused(str(folder), ArtifactError, "found no weights")
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    refused(str(folder), ArtifactError, r"only pickled weights \(pytorch_model.bin\), which can run code")


@pytest.mark.parametrize("name", ["w.bin", "w.pt", "w.pth", "w.ckpt", "w.pkl"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80")
    refused(str(tmp_path / name), ArtifactError, "pickled weight file, which can run code")


def test_resolve_model_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    refused(str(tmp_path / "model.onnx"), RecipeError, "expected a model folder or a .gguf file")


def test_pickles_beside_safetensors_are_not_read(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80 not even a pickle")
    load(str(folder))


def load(name: str, **options: Any) -> Any:
    return load_model(find_pretrained(name), auto_class="AutoModelForCausalLM", device="cpu", **options)


def test_load_model_reads_the_same_weights_from_a_folder(folder: Path, tiny: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(load(str(folder))(input_ids=ids).logits, tiny("tiny:llama", adapter=False)(input_ids=ids).logits)


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_damaged_safetensors_are_refused(folder: Path, damage: str) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-500], "header": b"\xff" * 40 + content[40:], "empty": b""}[damage])
    with pytest.raises(ArtifactError, match="damaged") as caught:
        load(str(folder))
    assert str(folder) in str(caught.value)


def test_damaged_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises((RecipeError, ArtifactError)):
        load(str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"the config of .* cannot be loaded"):
        load(str(folder))


def test_missing_tensors_are_an_error(folder: Path) -> None:
    """transformers fills missing tensors with random numbers and only warns."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(str(folder / "model.safetensors"))
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="q_proj"):
        load(str(folder))


def test_tensors_of_another_shape_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(PeftlabError):
        load(str(folder))


def test_load_tokenizer_refuses_a_missing_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(RecipeError, match=r"the tokenizer of .* cannot be loaded"):
        load_tokenizer(find_pretrained(str(folder)))


def test_load_tokenizer_reads_a_chat_template_file(tmp_path: Path) -> None:
    pretrained = find_pretrained("tiny:llama")
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert load_tokenizer(pretrained, chat_template=str(tmp_path / "t.jinja")).chat_template == "{{ messages }}"
    with pytest.raises(RecipeError, match="no such file") as caught:
        load_tokenizer(pretrained, chat_template=str(tmp_path / "u.jinja"))
    assert caught.value.key == "model.chat_template"


def test_find_pretrained_refuses_an_unknown_hub_model_offline() -> None:
    with pytest.raises(RecipeError, match="neither a local folder or file, nor in the hub's cache"):
        find_pretrained("no-such-org/no-such-model")


def test_fingerprint_follows_the_weights(folder: Path) -> None:
    before = find_pretrained(str(folder)).fingerprint
    assert before == find_pretrained(str(folder)).fingerprint
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert find_pretrained(str(folder)).fingerprint != before


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def test_gguf_with_other_content_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"<html>")
    with pytest.raises(ArtifactError, match="does not start with the GGUF magic bytes"):
        find_pretrained(str(tmp_path / "m.gguf"))
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\x00\x00\x00 cut off")
    with pytest.raises(ArtifactError, match=r"damaged or not supported|cannot be read"):
        find_pretrained(str(tmp_path / "m.gguf"))
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize("error", [RuntimeError("killed"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_gguf_conversion_that_fails_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")

    def half(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(gguf_module, "_convert", half)
    with pytest.raises(type(error)):
        find_pretrained(str(tmp_path / "m.gguf"))
    assert list(cache.iterdir()) == []


def test_gguf_conversion_happens_once_per_content(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def convert(gguf: Path, folder: Path) -> None:
        calls.append(folder.name)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf_module, "_convert", convert)
    (tmp_path / "m.gguf").write_bytes(b"GGUF 1")
    one = find_pretrained(str(tmp_path / "m.gguf"))
    assert find_pretrained(str(tmp_path / "m.gguf")).location == one.location
    assert len(calls) == 1
    (tmp_path / "m.gguf").write_bytes(b"GGUF 2")
    assert find_pretrained(str(tmp_path / "m.gguf")).location != one.location
    assert sorted(p.name for p in cache.iterdir()) == sorted(
        Path(x).name for x in (one.location, find_pretrained(str(tmp_path / "m.gguf")).location)
    )
