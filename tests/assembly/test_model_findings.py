"""Model and tokenizer are reconciled: found by ``check`` without weights, done in training, kept in merged models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import peftlab
from peftlab.assembly.families import check_family, check_layers
from peftlab.errors import RecipeError
from peftlab.training.progress import SilentProgress
from tests.family_examples import make_config, make_model, write_family

END = "<|im_end|>"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_of: Callable[[str], Any]) -> Callable[..., None]:
    """Writes the data and a model with a tokenizer that may end its texts."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": " ".join(["word"] * (1 + i % 5)) + " x" * (i % 3), "label": "ab"[i % 2]} for i in range(24)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(config: Any, auto_class: str = "AutoModel", *, ended: bool = True, pad: bool = True) -> None:
        from tokenizers.processors import TemplateProcessing

        tokenizer = tokenizer_of("tiny:llama")
        if ended:
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"$A {END}", special_tokens=[(END, 2)]
            )
        make_model(config, auto_class).save_pretrained("model")
        tokenizer.save_pretrained("model")
        if not pad:
            file = Path("model/tokenizer_config.json")
            file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "pad_token"}))

    return write


def recipe(task: str = "seq_cls", **adapter: Any) -> dict[str, Any]:
    return {
        "task": task,
        "model": {"name": "model"},
        "adapter": adapter or {"targets": "all-linear"},
        "data": {"train": "rows.jsonl"} | ({"columns": {"text": "text"}} if task == "causal_lm" else {}),
        "train": {"max_steps": 3, "lr": 0.01},
        "run": {"dir": "run", "device": "cpu"},
    }


def notes(document: dict[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for finding in peftlab.check(document, progress=SilentProgress())["findings"]:
        if finding["data"] == "model":
            found.setdefault(finding["kind"], []).append(finding["message"])
    return found


def test_check_names_the_padding_of_a_decoder_without_one(folder: Callable[..., None]) -> None:
    folder(make_config("LlamaConfig"), pad=False)
    found = notes(recipe())
    assert found["padding_token"] == [
        "the tokenizer has no padding token: batches are padded with '<|pad|>' (id 0), a special token for padding"
    ]
    assert found["config_ids"] == [
        "pad_token_id of the model's config is not set; peftlab sets it to 0, the tokenizer's. To open the adapter with PEFT "
        "alone, set model.config.pad_token_id = 0 first"
    ]


def test_check_names_padding_and_limit_of_xlnet(folder: Callable[..., None]) -> None:
    folder(make_config("XLNetConfig"))
    found = notes(recipe())
    assert found["padding"] == [
        "xlnet: peftlab pads rows on the left, because the head of this family reads the last position"
    ]
    assert found["length_limit"] == [
        "the model reads at most 512 tokens: its tokenizer says so (model_max_length); the model's positions have no limit"
    ]


def test_check_has_no_notes_on_a_model_that_fits_its_tokenizer(folder: Callable[..., None]) -> None:
    folder(make_config("LlamaConfig", pad_token_id=0))
    assert notes(recipe() | {"data": {"train": "rows.jsonl", "max_length": 64}}) == {}


@pytest.mark.parametrize(
    ("name", "task", "ended", "says"),
    [
        (
            "BartConfig",
            "seq_cls",
            False,
            "the classification head of bart reads the end of text, which the tokenizer does not",
        ),
        ("BertConfig", "causal_lm", True, "bert reads the tokens after the one that it predicts"),
        ("XLNetConfig", "causal_lm", True, "xlnet reads the tokens after the one that it predicts"),
        ("ReformerConfig", "seq_cls", True, "reformer trains only on rows whose length is a multiple of its chunks"),
    ],
)
def test_check_refuses_a_family_that_cannot_do_the_task(
    folder: Callable[..., None], name: str, task: str, ended: bool, says: str
) -> None:
    folder(make_config(name), ended=ended)
    with pytest.raises(RecipeError, match=says):
        notes(recipe(task))


def test_grouped_convolutions_cannot_be_merged(folder: Callable[..., None]) -> None:
    folder(make_config("SqueezeBertConfig", pad_token_id=0))
    document = recipe(targets=["query", "value"])
    layer = "transformer.encoder.layers.0.attention.query"
    said = f"4 of the 4 adapted layers are grouped convolutions ({layer}), which PEFT cannot merge"
    assert said in notes(document)["reach"]
    document["run"] |= {"merge": "original"}
    with pytest.raises(RecipeError, match=r"4 of the 4 adapted layers are grouped .*, or set run\.merge=none") as info:
        notes(document)
    assert info.value.key == "run.merge"


def test_packing_without_a_limit_needs_max_length(folder: Callable[..., None]) -> None:
    folder(make_config("BloomConfig"), "AutoModelForCausalLM")
    file = Path("model/tokenizer_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": -1}))
    document = recipe("causal_lm")
    document["data"] |= {"packing": True}
    with pytest.raises(RecipeError, match="model has no limit of its own, so packing needs"):
        notes(document)
    document["data"] |= {"max_length": 64}
    assert notes(document) == {}


@pytest.mark.parametrize(
    ("name", "values", "padding", "ids"),
    [
        ("LlamaConfig", {}, "right", {"pad_token_id": 0}),
        ("LlamaConfig", {"pad_token_id": 3}, "right", {"pad_token_id": 0}),
        ("T5Config", {}, "right", {"eos_token_id": 2, "decoder_start_token_id": 0}),
        ("FNetConfig", {}, "none", {"pad_token_id": 0}),
    ],
)
def test_classifier_scores_the_same_after_training_in_eval_and_merged(
    folder: Callable[..., None], name: str, values: dict[str, Any], padding: str, ids: dict[str, int]
) -> None:
    folder(make_config(name, **values))
    targets = {"LlamaConfig": ["q_proj"], "T5Config": ["q"], "FNetConfig": ["intermediate.dense"]}[name]
    head = {"modules_to_save": ["classification_head"]} if name == "T5Config" else {}
    run = peftlab.train(recipe(targets=targets, **head), progress=SilentProgress())
    summary = json.loads(Path("run/run.json").read_text())
    assert summary["padding"] == padding
    after = summary["after"]["loss"]
    assert peftlab.evaluate(run.folder, progress=SilentProgress())["metrics"]["loss"] == pytest.approx(after, rel=1e-5)
    assert peftlab.merge(run.folder, progress=SilentProgress())["verified"]
    config = json.loads(Path("run/merged/config.json").read_text())
    assert {key: config[key] for key in ids} == ids
    texts = ["a", "word word word word x x x x x", "so so"]
    together = [p["probability"] for p in peftlab.predict("run/merged", texts, progress=SilentProgress())]
    alone = [next(peftlab.predict("run/merged", [t], progress=SilentProgress()))["probability"] for t in texts]
    assert together == pytest.approx(alone, abs=1e-6)


def test_two_texts_need_an_end_where_an_encoder_decoder_reads(tokenizer_of: Callable[[str], Any]) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import T5Config

    from peftlab.specs.tasks import spec_of

    tokenizer, spec = tokenizer_of("tiny:bert"), spec_of("seq_cls", ("score", "pair"))
    end = [("<|im_end|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|im_end|>", special_tokens=end)
    check_family(T5Config(), tokenizer, spec)
    with pytest.raises(RecipeError, match="which the tokenizer does not write after two texts"):
        check_family(T5Config(), tokenizer, spec, pairs=True)


def test_check_refuses_layers_whose_adapter_peft_renames(folder: Callable[..., None]) -> None:
    from transformers import LagunaConfig

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = LagunaConfig(
        vocab_size=260, num_hidden_layers=2, **sizes, **experts, shared_expert_intermediate_size=32, eos_token_id=2
    )
    folder(config, "AutoModelForCausalLM")
    with pytest.raises(
        RecipeError, match=r"PEFT renames 6 tensors.* 'model\.layers\.1\.mlp\.shared_experts\.down_proj'"
    ):
        peftlab.check(recipe("causal_lm"), progress=SilentProgress())
    assert peftlab.check(recipe("causal_lm", targets=["q_proj", "v_proj"]), progress=SilentProgress())["ok"]


def test_layer_that_is_one_weight_with_another_is_refused() -> None:
    import torch
    from transformers import NeoMMEConfig, NeoMMEForMaskedLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.device("meta"):
        model = NeoMMEForMaskedLM(NeoMMEConfig(vocab_size=260, num_hidden_layers=2, head_dim=16, **sizes))
    check_layers(model, ["model.layers.0.mlp.up_proj"])
    with pytest.raises(RecipeError, match=r"embedding_projection and unembedding_projection of neomme are one weight"):
        check_layers(model, ["model.embed_tokens.embedding_projection"])


def encoder_decoder(start: int) -> Any:
    from transformers import BertConfig, EncoderDecoderConfig

    sizes = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    encoder, decoder = BertConfig(**sizes), BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    encoder.initializer_range = decoder.initializer_range = 0.2
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = start, 0, 2
    return config


def translation() -> dict[str, Any]:
    document = recipe("seq2seq")
    document["data"] = {"train": "rows.jsonl", "columns": {"source": "text", "target": "label"}}
    return {**document, "train": {"max_steps": 2, "lr": 0.01}, "eval": {"before": False, "metrics": ["loss"]}}


def test_start_that_an_encoder_decoder_masks_is_refused(folder: Callable[..., None]) -> None:
    folder(encoder_decoder(start=0), "AutoModelForSeq2SeqLM")
    with pytest.raises(RecipeError, match="decoder_start_token_id is its padding token"):
        peftlab.check(translation(), progress=SilentProgress())


def test_two_models_as_encoder_and_decoder_are_merged(folder: Callable[..., None]) -> None:
    """The head is tied to the embeddings of the decoder, and those of the model are the encoder's."""
    folder(encoder_decoder(start=1), "AutoModelForSeq2SeqLM")
    peftlab.train(translation(), progress=SilentProgress())
    assert peftlab.merge("run", progress=SilentProgress())["verified"]


def test_check_refuses_a_model_that_ignores_the_attention_mask(folder: Callable[..., None]) -> None:
    from transformers import CpmAntConfig

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 64, "num_hidden_layers": 1}
    folder(CpmAntConfig(vocab_size=260, **sizes), "AutoModelForCausalLM")
    with pytest.raises(RecipeError, match="cpmant finds the padding"):
        peftlab.check(recipe("causal_lm"), progress=SilentProgress())


@pytest.mark.parametrize(
    ("family", "task", "method", "problem"),
    [
        ("ResNetConfig", "image_cls", "bottleneck", "has no list of equal blocks with attention"),
        (
            "DeformableDetrConfig",
            "object_detection",
            "ia3",
            "has no token embeddings, and PEFT asks such a model for them",
        ),
        ("DeformableDetrConfig", "object_detection", "bottleneck", "the head of deformable_detr is a list of layers"),
        ("DeformableDetrConfig", "object_detection", "none", None),
        ("RTDetrConfig", "object_detection", "bottleneck", None),
    ],
)
def test_check_knows_what_a_reader_of_images_can_be_adapted_with(
    folder: Callable[..., None], family: str, task: str, method: str, problem: str | None
) -> None:
    write_family(Path("images"), family, task)
    document = recipe(task, method=method) | {"model": {"name": "images"}, "train": {"max_steps": 2}}
    document["data"] = {"train": "shapes:24" if task == "object_detection" else "sklearn:digits", "eval_rows": 8}
    if problem is None:
        assert peftlab.check(document, progress=SilentProgress())["ok"]
        return
    with pytest.raises(RecipeError, match=problem):
        peftlab.check(document, progress=SilentProgress())


def test_blocks_of_a_bare_decoder_are_no_head() -> None:
    model = make_model(make_config("LlamaConfig"), "AutoModel")
    assert model.base_model is model
    check_layers(model, [], "bottleneck")
