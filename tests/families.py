"""Tiny random models of the families that people bring, saved as transformers folders beside the tiny tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftlab.models.tiny import tiny_tokenizer

_TOKENS = {"vocab_size": 260, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_IMAGES = {"image_size": 8, "num_channels": 1}


@dataclass(frozen=True)
class Family:
    """A tiny model. ``model_type``: its name in transformers; ``options``: values of its config.

    headless: saved as the body alone, without a task head, as base models are published.
    """

    name: str
    task: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    headless: bool = False

    def write(self, folder: Path) -> Path:
        """Writes the model and its tokenizer or image processor; returns ``folder``."""
        import transformers

        auto = {
            "causal_lm": "AutoModelForCausalLM",
            "seq_cls": "AutoModelForSequenceClassification",
            "image_cls": "AutoModelForImageClassification",
            "embedding": "AutoModel",
        }[self.task]
        tokens = {} if self.task == "image_cls" else _TOKENS
        config = transformers.AutoConfig.for_model(self.model_type, **{**tokens, **self.options})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, "AutoModel" if self.headless else auto).from_config(config)
        with torch.no_grad():  # distinct statistics, as a trained model has
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_(generator=torch.Generator().manual_seed(1))
        model.save_pretrained(folder)
        if self.task == "image_cls":
            size = {"height": 8, "width": 8}
            transformers.ViTImageProcessor(
                size=size, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
            ).save_pretrained(folder)
        else:
            tiny_tokenizer().save_pretrained(folder)
        return folder


def _causal(name: str, model_type: str, **options: Any) -> Family:
    return Family(name, "causal_lm", model_type, options)


def _classifier(name: str, model_type: str, *, headless: bool = True, **options: Any) -> Family:
    return Family(name, "seq_cls", model_type, options, headless)


def _images(name: str, model_type: str, **options: Any) -> Family:
    return Family(name, "image_cls", model_type, {**_IMAGES, **options}, headless=True)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _causal("llama", "llama", **_GROUPED),
        _causal("mistral", "mistral", **_GROUPED),
        _causal("qwen2", "qwen2", **_SIZES, num_key_value_heads=2),
        _causal("qwen3", "qwen3", **_GROUPED),
        _causal("gemma", "gemma", **_GROUPED),
        _causal("gemma2", "gemma2", **_GROUPED),
        _causal("gemma3", "gemma3_text", **_GROUPED),
        _causal("phi", "phi", **_SIZES),
        _causal("phi3", "phi3", **_SIZES, num_key_value_heads=2),
        _causal("olmo2", "olmo2", **_SIZES),
        _causal("smollm3", "smollm3", **_SIZES, num_key_value_heads=2),
        _causal("granite", "granite", **_SIZES),
        _causal("cohere", "cohere", **_SIZES),
        _causal("stablelm", "stablelm", **_SIZES, num_key_value_heads=4),
        _causal("starcoder2", "starcoder2", **_SIZES, num_key_value_heads=2),
        _causal("gpt2", "gpt2", **_GPT),
        _causal(
            "gpt-neo",
            "gpt_neo",
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=128,
        ),
        _causal("gpt-j", "gptj", **_GPT, rotary_dim=4),
        _causal("gpt-neox", "gpt_neox", **_SIZES),
        _causal(
            "opt",
            "opt",
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
        ),
        _causal("bloom", "bloom", hidden_size=32, n_layer=2, n_head=4),
        _causal("falcon", "falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        _causal("mpt", "mpt", d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
        _causal("mixtral", "mixtral", **_GROUPED, **_EXPERTS),
        _causal(
            "qwen2-moe",
            "qwen2_moe",
            **_SIZES,
            num_key_value_heads=2,
            **_QWEN_EXPERTS,
            shared_expert_intermediate_size=32,
        ),
        _causal("qwen3-moe", "qwen3_moe", **_GROUPED, **_QWEN_EXPERTS),
        _causal("olmoe", "olmoe", **_SIZES, num_experts=4, num_experts_per_tok=2),
        _causal("granite-moe", "granitemoe", **_SIZES, **_EXPERTS),
        _causal("mamba", "mamba", hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4),
        _classifier("bert", "bert", **_SIZES, **_STILL),
        _classifier("roberta", "roberta", **_SIZES, **_STILL),
        _classifier("xlm-roberta", "xlm-roberta", **_SIZES, **_STILL),
        _classifier("electra", "electra", **_SIZES, **_STILL, embedding_size=32),
        _classifier("mpnet", "mpnet", **_SIZES, **_STILL),
        _classifier(
            "distilbert", "distilbert", dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=128
        ),
        _classifier(
            "deberta-v3",
            "deberta-v2",
            **_SIZES,
            **_STILL,
            relative_attention=True,
            position_buckets=16,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type="p2c|c2p",
            pooler_hidden_size=32,
        ),
        _classifier("albert", "albert", **_SIZES, **_STILL, embedding_size=16),
        _classifier("modernbert", "modernbert", **_SIZES),
        _classifier("xlnet", "xlnet", d_model=32, n_layer=2, n_head=4, d_inner=64),
        _classifier(
            "squeezebert",
            "squeezebert",
            **_SIZES,
            **_STILL,
            embedding_size=32,
            q_groups=4,
            k_groups=4,
            v_groups=4,
            post_attention_groups=1,
            intermediate_groups=4,
            output_groups=4,
        ),
        _classifier("bart", "bart", **_ENCODER_DECODER),
        _classifier("t5", "t5", **_T5),
        _classifier("llama-cls", "llama", **_GROUPED),
        _classifier("gpt2-cls", "gpt2", **_GPT),
        _images(
            "vit", "vit", **{k: v for k, v in _SIZES.items() if k != "max_position_embeddings"}, patch_size=4, **_STILL
        ),
        _images(
            "deit",
            "deit",
            **{k: v for k, v in _SIZES.items() if k != "max_position_embeddings"},
            patch_size=4,
            **_STILL,
        ),
        _images("resnet", "resnet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"),
        _images("convnext", "convnext", hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, patch_size=2),
        _images("swin", "swin", embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, patch_size=2),
    )
}
