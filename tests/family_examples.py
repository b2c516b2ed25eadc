"""Tiny random models of many families, by the name of their config class in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 260  # that of tiny:llama's tokenizer: <|pad|> is 0, <|im_end|>, the end of text, is 2
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
}
_NO_FFN = {k: v for k, v in _SIZES.items() if k != "intermediate_size"}
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
_XLM = {"vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128}
_DISTIL = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
_MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

# Decoders as published: most have no padding id.
DECODERS: dict[str, dict[str, Any]] = {
    "LlamaConfig": _GROUPED,
    "Qwen2Config": _GROUPED,
    "Qwen3Config": {**_GROUPED, "head_dim": 8},
    "MistralConfig": _GROUPED,
    "MixtralConfig": {**_GROUPED, "num_local_experts": 2},
    "GemmaConfig": {**_GROUPED, "head_dim": 8},
    "Gemma2Config": {**_GROUPED, "head_dim": 8},
    "Gemma3TextConfig": {**_GROUPED, "head_dim": 8},
    "PhiConfig": _SIZES,
    "Phi3Config": {**_GROUPED, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "GPT2Config": {**_GPT, "bos_token_id": 1, "eos_token_id": 2},
    "GPTBigCodeConfig": {**_GPT, "bos_token_id": 1, "eos_token_id": 2},
    "GPTNeoConfig": {**_NO_FFN, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "GPTNeoXConfig": _SIZES,
    "GPTJConfig": {**_GPT, "rotary_dim": 4},
    "OPTConfig": {**_NO_FFN, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "BloomConfig": _BLOOM,
    "FalconConfig": _NO_FFN,
    "MptConfig": {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "StableLmConfig": _GROUPED,
    "Starcoder2Config": _GROUPED,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WRITERS: dict[str, dict[str, Any]] = DECODERS | {
    "SmolLM3Config": {**_GROUPED, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "Olmo2Config": _GROUPED,
    "CohereConfig": {**_GROUPED, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "Qwen2MoeConfig": {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 32},
    "Qwen3MoeConfig": {**_GROUPED, **_EXPERTS, "head_dim": 8},
    "OlmoeConfig": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoeConfig": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "MambaConfig": _MAMBA,
    "RwkvConfig": {k: v for k, v in _MAMBA.items() if k != "state_size"} | {"context_length": 128},
    "GraniteConfig": _GROUPED,
    "OlmoConfig": _GROUPED,
    "Olmo3Config": {**_GROUPED, **_SLIDING},
    "Cohere2Config": {**_GROUPED, **_SLIDING, **_IDS},
    "Exaone4Config": {**_GROUPED, **_SLIDING, **_IDS},
    "GlmConfig": {**_GROUPED, **_IDS, "head_dim": 8},
    "Glm4Config": {**_GROUPED, **_IDS, "head_dim": 8},
    "NemotronConfig": {**_GROUPED, **_IDS, "head_dim": 8},
    "Ernie4_5Config": {**_GROUPED, **_IDS, "head_dim": 8},
    "HunYuanDenseV1Config": {**_GROUPED, **_IDS, "head_dim": 8},
    "ModernBertDecoderConfig": {**_SIZES, **_IDS, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
    "PhimoeConfig": {**_GROUPED, **_IDS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOssConfig": {**_GROUPED, **_SLIDING, **_IDS, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Llama4TextConfig": {**_GROUPED, **_IDS, "head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 64},
    "DeepseekV3Config": {
        **_SIZES, **_IDS, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1,
    },
    "FalconMambaConfig": {**_MAMBA, **_IDS},
    "Lfm2Config": {**_GROUPED, **_IDS, "layer_types": ["conv", "full_attention"]},
}  # fmt: skip
CLASSIFIERS: dict[str, dict[str, Any]] = DECODERS | {
    "BertConfig": _SIZES,
    "DistilBertConfig": _DISTIL,
    "RobertaConfig": _SIZES,
    "XLMRobertaConfig": _SIZES,
    "CamembertConfig": _SIZES,
    "MPNetConfig": _SIZES,
    "LongformerConfig": {**_SIZES, "attention_window": 8},
    "BigBirdConfig": {**_SIZES, "block_size": 4, "num_random_blocks": 1},
    "ElectraConfig": {**_SIZES, "embedding_size": 32},
    "DebertaConfig": {**_SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DebertaV2Config": {**_SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "AlbertConfig": {**_SIZES, "embedding_size": 16},
    "MobileBertConfig": {**_SIZES, "embedding_size": 16, "intra_bottleneck_size": 32},
    "SqueezeBertConfig": {**_SIZES, "embedding_size": 32},
    "RoFormerConfig": _SIZES,
    "ModernBertConfig": {**_SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
                         "sep_token_id": 2, "local_attention": 8},
    "FunnelConfig": {"vocab_size": VOCABULARY, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64},
    "XLNetConfig": {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "XLMConfig": _XLM,
    "T5Config": _T5,
    "MT5Config": _T5,
    "BartConfig": _BART,
    "MBartConfig": _BART,
    "ConvBertConfig": {**_SIZES, "embedding_size": 32},
    "FNetConfig": {k: v for k, v in _SIZES.items() if k != "num_attention_heads"},
    "YosoConfig": _SIZES,
    "NystromformerConfig": {**_SIZES, "num_landmarks": 64, "segment_means_seq_len": 64},
    "FlaubertConfig": _XLM,
    "XLMRobertaXLConfig": _SIZES,
    "ErnieConfig": _SIZES,
    "RemBertConfig": {**_SIZES, "input_embedding_size": 16, "output_embedding_size": 16},
    "EsmConfig": {**_SIZES, "pad_token_id": 1, "mask_token_id": 3},
    "ReformerConfig": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "attention_head_size": 8, "num_attention_heads": 4,
        "feed_forward_size": 64, "attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16], "max_position_embeddings": 128, "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8, "num_buckets": 2, "is_decoder": False,
        "hash_seed": 0,
    },
    "MegatronBertConfig": _SIZES,
    "RoCBertConfig": _SIZES,
    "RobertaPreLayerNormConfig": {**_SIZES, **_IDS},
    "Data2VecTextConfig": {**_SIZES, **_IDS},
    "NomicBertConfig": {**_SIZES, **_IDS},
    "EuroBertConfig": {**_SIZES, **_IDS, "num_key_value_heads": 4},
    "CanineConfig": {**{k: v for k, v in _SIZES.items() if k != "vocab_size"}, **_IDS},
    "OpenAIGPTConfig": _GPT,
    "CTRLConfig": {**_GPT, "dff": 64},
}  # fmt: skip


_IMAGE = {"image_size": 8, "num_channels": 1}
_VIT = {
    **_IMAGE,
    "patch_size": 4,
    **{k: v for k, v in _SIZES.items() if k not in ("vocab_size", "max_position_embeddings")},
}
READERS_OF_IMAGES: dict[str, dict[str, Any]] = {
    "ViTConfig": _VIT,
    "DeiTConfig": _VIT,
    "SwinConfig": {**_IMAGE, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    "ResNetConfig": {
        "num_channels": 1,
        "embedding_size": 16,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "layer_type": "basic",
    },
    "RegNetConfig": {
        "num_channels": 1,
        "embedding_size": 16,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "groups_width": 8,
    },
    "EfficientNetConfig": {
        **_IMAGE,
        "image_size": 32,
        "width_coefficient": 0.25,
        "depth_coefficient": 0.3,
        "hidden_dim": 320,
    },
    "ConvNextConfig": {**_IMAGE, "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
    "Dinov2Config": {**{k: v for k, v in _VIT.items() if k != "intermediate_size"}, "mlp_ratio": 2},
    "MobileNetV2Config": {**_IMAGE, "image_size": 32, "depth_multiplier": 0.25},
}
# Families with a head that fills in masked tokens. BART and mBART read the masked text and write it.
FILLERS: dict[str, dict[str, Any]] = {
    f"{name}Config": CLASSIFIERS[f"{name}Config"]
    for name in (
        "Bert", "DistilBert", "Roberta", "XLMRoberta", "Camembert", "MPNet", "Longformer", "BigBird", "Electra", "Deberta",
        "DebertaV2", "Albert", "MobileBert", "SqueezeBert", "RoFormer", "ModernBert", "Funnel", "XLM", "Flaubert", "Bart",
        "MBart", "ConvBert", "FNet", "Yoso", "Nystromformer", "XLMRobertaXL", "Ernie", "RemBert", "Esm", "Reformer",
        "MegatronBert", "RoCBert", "RobertaPreLayerNorm", "Data2VecText", "NomicBert", "EuroBert",
    )
}  # fmt: skip
# Families whose tokenizers end every text, because their head reads there.
_WITH_END = ("T5", "MT5", "Bart", "MBart")
# One entry per task in each: its auto class, its families, and whether they are published with the task's head.
AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq_cls": "AutoModelForSequenceClassification",
    "image_cls": "AutoModelForImageClassification",
}
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "causal_lm": WRITERS,
    "masked_lm": FILLERS,
    "seq_cls": CLASSIFIERS,
    "image_cls": READERS_OF_IMAGES,
}
WITH_HEAD = ("causal_lm", "masked_lm")
# Sizes that are, or lead to, the input features of linear layers.
_WIDTHS = {
    "hidden_size", "n_embd", "d_model", "dim", "emb_dim", "word_embed_proj_dim", "embedding_size", "intra_bottleneck_size",
    "input_embedding_size", "output_embedding_size", "moe_intermediate_size", "shared_expert_intermediate_size", "head_dim",
    "d_kv", "d_head", "embed_dim", "hidden_sizes", "q_lora_rank", "kv_lora_rank", "v_head_dim",
}  # fmt: skip


def wide_values(name: str, task: str) -> dict[str, Any]:
    """Values of a config that make the input features of its linear layers multiples of 64, the block size of NF4."""
    widths = {key: value for key, value in FAMILIES[task][name].items() if key in _WIDTHS}
    return {key: [4 * v for v in value] if isinstance(value, list) else 4 * value for key, value in widths.items()}


def write_family(folder: Path, name: str, task: str, **values: Any) -> None:
    """Writes a model as published, with its tokenizer or image processor: without a head for classes.

    Args: name: of a config class above. values: of the config.
    """
    import torch

    from peftlab.models.image_reader import tiny_image_processor
    from peftlab.models.tiny import tiny_tokenizer

    if name in ("T5Config", "MT5Config"):
        values = {"decoder_start_token_id": 0, **values}
    model = make_model(
        make_config(name, FAMILIES[task], **values), AUTO_CLASSES[task] if task in WITH_HEAD else "AutoModel"
    )
    generator = torch.Generator().manual_seed(1)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("running_mean"):  # as of a trained model
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    model.save_pretrained(folder)
    if task == "image_cls":
        processor, size = tiny_image_processor(), getattr(model.config, "image_size", 8)
        processor.size = {"height": size, "width": size}
        processor.save_pretrained(folder)
        return
    tokenizer = tiny_tokenizer()
    if task == "masked_lm":
        tokenizer.mask_token = "<|im_start|>"
    if name.removesuffix("Config") in _WITH_END:
        end_every_text(tokenizer)
    tokenizer.save_pretrained(folder)


def end_every_text(tokenizer: Any) -> None:
    """Lets the tiny tokenizer end every text with its end of text, as those of T5 and BART do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
    )


def make_config(name: str, families: dict[str, dict[str, Any]] = CLASSIFIERS, **values: Any) -> Any:
    import transformers

    config = getattr(transformers, name)(**{**families[name], **values})
    config.architectures = config.architectures or []  # transformers (5.23) reads it for Funnel
    return config


def make_model(config: Any, auto_class: str) -> Any:
    """Weights of 0.2 instead of 0.02, so that an output depends on every input by more than rounding."""
    import torch
    import transformers

    if hasattr(config, "initializer_range"):
        config.initializer_range = 0.2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, auto_class).from_config(config).eval()
