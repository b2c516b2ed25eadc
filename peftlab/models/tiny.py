"""Tiny random models and a byte-level tokenizer, built in memory for tests and small recipes."""

from __future__ import annotations

from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]


def tiny_tokenizer(name: str = "tiny:llama") -> Any:
    """A byte-level tokenizer with 260 entries (4 special ones) and a ChatML template: no files, no network. That of
    ``tiny:bert`` also masks, with the token that begins a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(_SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        model_max_length=512,
        **({"mask_token": "<|im_start|>"} if name == "tiny:bert" else {}),
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(name: str, **kwargs: Any) -> Any:
    """Config of ``tiny:llama`` (2 layers, hidden 64, tied head), ``tiny:bert`` (2 layers, hidden 64), ``tiny:t5`` (2 + 2
    layers, hidden 64, tied head), ``tiny:vit`` (2 layers, hidden 128, images of 8 x 8 pixels and one channel, in one
    patch), ``tiny:yolos`` (4 layers, hidden 96, images of 64 x 64 pixels in 64 patches, 10 queries), ``tiny:detr`` (a
    Deformable DETR on a small ResNet, images of 64 x 64 pixels, 12 queries), ``tiny:segformer`` (4 stages of one layer, 16 to
    64 wide, images of 64 x 64 pixels, logits of 16 x 16) or ``tiny:upernet`` (a UPerNet on a small ResNet, images of 64 x 64
    pixels)."""
    from transformers import (
        BertConfig,
        DeformableDetrConfig,
        LlamaConfig,
        ResNetConfig,
        SegformerConfig,
        T5Config,
        UperNetConfig,
        ViTConfig,
        YolosConfig,
    )

    if name == "tiny:vit":
        # One patch: with smaller ones the model learns digits more slowly, and students in the recipe digits-missing-class
        # do not learn the missing class (recall 0.5 with patches of 4, 0.9 with one patch).
        return ViTConfig(
            image_size=8,
            patch_size=8,
            num_channels=1,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **kwargs,
        )

    if name == "tiny:t5":
        return T5Config(
            vocab_size=260,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=2,
            **{"decoder_start_token_id": 0, **kwargs},
        )
    if name == "tiny:yolos":
        return YolosConfig(
            image_size=[64, 64],
            patch_size=8,
            num_detection_tokens=10,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            use_mid_position_embeddings=False,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **kwargs,
        )

    if name == "tiny:detr":
        # Of the families, Deformable DETR learns boxes from random weights in the fewest steps: minutes, not hours.
        stages: dict[str, Any] = {
            "embedding_size": 32,
            "hidden_sizes": [32, 48, 64],
            "depths": [1, 1, 1],
            "layer_type": "basic",
            "out_features": ["stage2", "stage3"],
        }
        values: dict[str, Any] = {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": ResNetConfig(**stages),
            "image_size": 64,
            "num_feature_levels": 2,
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "num_queries": 12,
            "dropout": 0.0,
        }
        return DeformableDetrConfig(**values, **kwargs)

    if name == "tiny:segformer":
        sizes: dict[str, Any] = {
            "image_size": 64,
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [16, 32, 48, 64],
            "num_attention_heads": [1, 2, 3, 4],
            "mlp_ratios": [2, 2, 2, 2],
            "strides": [4, 2, 2, 2],
            "decoder_hidden_size": 64,
            "classifier_dropout_prob": 0.0,
            "drop_path_rate": 0.0,
        }
        return SegformerConfig(**sizes, **kwargs)

    if name == "tiny:upernet":
        # With a SegFormer of this size, circles, squares and triangles are one class for four times as many steps.
        backbone: dict[str, Any] = {
            "embedding_size": 24,
            "hidden_sizes": [24, 32, 48],
            "depths": [1, 1, 1],
            "layer_type": "basic",
            "out_features": ["stage1", "stage2", "stage3"],
        }
        layout: dict[str, Any] = {
            "image_size": 64,
            "hidden_size": 32,
            "pool_scales": [2, 4],
            "use_auxiliary_head": False,
        }
        return UperNetConfig(backbone_config=ResNetConfig(**backbone), **layout, **kwargs)

    shared: dict[str, Any] = {
        "vocab_size": 260,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
    }
    if name == "tiny:bert":
        return BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shared, **kwargs)
    return LlamaConfig(
        num_key_value_heads=2, eos_token_id=2, bos_token_id=1, tie_word_embeddings=True, **shared, **kwargs
    )
