"""Adapters of plain PEFT, as people bring them: what PEFT loads is loaded, and what does not fit is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from peftlab.adapters import inject, load_adapter, save_adapter
from peftlab.errors import ArtifactError
from peftlab.models import find_pretrained, load_model, new_weights

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
IDS = torch.arange(4, 20)[None]


def base(**options: Any) -> Any:
    return load_model(find_pretrained("tiny:llama"), auto_class="AutoModelForCausalLM", device="cpu", **options)


def moved(model: Any) -> Any:
    """The model with other values in everything that is trained."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def brought(folder: Path, model: Any = None, *, save_embedding_layers: Any = "auto", **options: Any) -> Any:
    """An adapter that plain PEFT trained and saved."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **options)
    adapted = moved(peft.get_peft_model(base() if model is None else model, config))
    adapted.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return adapted


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": None},
    ],
    ids=lambda o: "+".join(o["modules_to_save"] or ["lora"]),
)
def test_adapters_of_plain_peft_load(tmp_path: Path, options: Any, embeddings: bool) -> None:
    adapted = brought(tmp_path, save_embedding_layers=embeddings, **options)
    torch.testing.assert_close(logits(load_adapter(base(), tmp_path).eval()), logits(adapted))


def test_saved_adapter_has_each_matrix_once(tmp_path: Path) -> None:
    model = inject(
        base(), "lora", peft_type="CAUSAL_LM", targets=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]
    )
    save_adapter(moved(model), tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    large = sorted(n for n, t in stored.items() if 260 in t.shape)
    assert large == ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"]
    torch.testing.assert_close(logits(load_adapter(base(), tmp_path).eval()), logits(model))
    plain = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(logits(plain), logits(model))


@pytest.mark.parametrize("options", [{"modules_to_save": ["embed_tokens"]}, {"save_embedding_layers": True}])
def test_adapter_with_a_resized_vocabulary_names_the_key(tmp_path: Path, options: Any) -> None:
    resized = base()
    resized.resize_token_embeddings(263)
    adapted = brought(tmp_path, resized, **options)
    with pytest.raises(
        ArtifactError, match=r"a vocabulary of 263 rows \((model.embed_tokens|lm_head).weight\), and tiny:llama has 260"
    ) as info:
        load_adapter(base(), tmp_path)
    assert str(info.value).endswith("model.resize_token_embeddings=263")
    torch.testing.assert_close(
        logits(load_adapter(base(resize_token_embeddings=263), tmp_path).eval()), logits(adapted), **CLOSE
    )


def test_resized_embeddings_count_as_new(tmp_path: Path) -> None:
    model = base(resize_token_embeddings=263)
    assert new_weights(model) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert len(model.get_input_embeddings().weight) == 263
    assert new_weights(base(resize_token_embeddings=260)) == frozenset()


def test_adapter_for_other_layers_is_refused(tmp_path: Path) -> None:
    brought(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, name: torch.zeros(4, 64)}, path, metadata={"format": "pt"})
    with pytest.raises(
        ArtifactError, match=r"1 tensors do not match, such as .*layers\.7.* \(in the file but not in the model\)"
    ):
        load_adapter(base(), tmp_path)
    first = next(iter(tensors))
    save_file({n: t for n, t in tensors.items() if n != first}, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"\(in the model but not in the file\)"):
        load_adapter(base(), tmp_path)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_adapters_of_plain_peft_load_on_quantized_weights(
    tmp_path: Path, quantize: str, tiny: Callable[..., Any]
) -> None:
    adapted = brought(tmp_path, base(quantize=quantize), modules_to_save=["lm_head"], save_embedding_layers=True)
    torch.testing.assert_close(logits(load_adapter(base(quantize=quantize), tmp_path).eval()), logits(adapted))


def test_adapter_of_another_rank_or_without_its_head_is_named(tmp_path: Path) -> None:
    def classifier() -> Any:
        return load_model(find_pretrained("tiny:bert"), auto_class="AutoModelForSequenceClassification", device="cpu")

    save_adapter(inject(classifier(), "lora", targets=["query"], peft_type="SEQ_CLS"), tmp_path)
    config, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config.write_text(config.read_text().replace('"r": 8', '"r": 4'))
    with pytest.raises(ArtifactError, match=r"made for another model .*size mismatch for .*query\.lora_A"):
        load_adapter(classifier(), tmp_path)
    config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    save_file({k: v for k, v in load_file(file).items() if "lora_" in k}, file, metadata={"format": "pt"})
    with pytest.raises(
        ArtifactError, match=r"has no tensor 'base_model\.model\.classifier\.\w+', which tiny:bert needs"
    ):
        load_adapter(classifier(), tmp_path)


def test_adapter_that_peft_does_not_read_in_full_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a family whose old checkpoints have other names, which PEFT gives to the tensors of its adapters."""
    import peft.utils.transformers_weight_conversion as conversion

    save_adapter(moved(inject(base(), "lora", targets=["q_proj"], peft_type="CAUSAL_LM")), tmp_path / "a")
    load_adapter(base(), tmp_path / "a")

    def renamed(*, adapter_state_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {name.replace("layers.1", "layers..1"): value for name, value in adapter_state_dict.items()}

    monkeypatch.setattr(conversion, "convert_peft_adapter_state_dict_for_transformers", renamed)
    with pytest.raises(ArtifactError, match=r"without 2 of its tensors, such as .*layers\.1\."):
        load_adapter(base(), tmp_path / "a")
