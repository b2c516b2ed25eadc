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
    # Blocks longer than the texts: the model turns to full attention at the first short one, for good.
    "BigBirdConfig": {**_SIZES, "block_size": 16, "num_random_blocks": 1},
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
    "ConvNextV2Config": {**_IMAGE, "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
    "Dinov2Config": {k: v for k, v in _VIT.items() if k != "intermediate_size"},
    "BeitConfig": _VIT,
    "Swinv2Config": {
        **_IMAGE,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 2,
    },
    "MobileNetV1Config": {**_IMAGE, "image_size": 32, "depth_multiplier": 0.25, "min_depth": 8},
    "MobileNetV2Config": {**_IMAGE, "image_size": 32, "depth_multiplier": 0.25, "min_depth": 8},
    "BitConfig": {
        "num_channels": 1,
        "embedding_size": 32,
        "hidden_sizes": [32, 64],
        "depths": [1, 1],
        "num_groups": 8,
    },
    "PoolFormerConfig": {
        "num_channels": 1,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "num_encoder_blocks": 2,
        "patch_sizes": [3, 3],
        "strides": [2, 2],
        "padding": [1, 1],
    },
    "SegformerConfig": {
        "num_channels": 1,
        "image_size": 32,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "num_encoder_blocks": 2,
        "num_attention_heads": [2, 2],
        "sr_ratios": [2, 1],
        "patch_sizes": [3, 3],
        "strides": [2, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 16,
    },
}
_OF_64 = {"image_size": 64, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
_BEIT = {
    **_OF_64,
    "patch_size": 16,
    "num_hidden_layers": 4,
    "out_indices": [1, 2, 3, 4],
    "pool_scales": [1, 2],
    "use_auxiliary_head": False,
}
SEGMENTERS: dict[str, dict[str, Any]] = {
    "SegformerConfig": {
        "image_size": 64,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "num_encoder_blocks": 2,
        "num_attention_heads": [2, 2],
        "sr_ratios": [2, 1],
        "patch_sizes": [3, 3],
        "strides": [2, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 16,
        "classifier_dropout_prob": 0.0,
    },
    "BeitConfig": _BEIT,
    "Data2VecVisionConfig": _BEIT,
    "DPTConfig": {
        **_OF_64,
        "patch_size": 16,
        "num_hidden_layers": 4,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [16, 16, 32, 32],
        "fusion_hidden_size": 16,
        "use_auxiliary_head": False,
    },
    "UperNetConfig": {"hidden_size": 16, "pool_scales": [1, 2], "use_auxiliary_head": False},
    "MobileViTConfig": {
        "image_size": 64,
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
        "aspp_out_channels": 16,
        "atrous_rates": [1, 2, 3],
    },
    "MobileViTV2Config": {
        "image_size": 64,
        "width_multiplier": 0.25,
        "aspp_out_channels": 16,
        "atrous_rates": [1, 2, 3],
    },
    "MobileNetV2Config": {"image_size": 64, "depth_multiplier": 0.25, "min_depth": 8},
}
_NO_START = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TRANSLATORS: dict[str, dict[str, Any]] = {
    "T5Config": {**_T5, "decoder_start_token_id": 0},
    "MT5Config": {**_T5, "decoder_start_token_id": 0},
    "UMT5Config": {**_T5, "decoder_start_token_id": 0},
    "LongT5Config": {**_T5, "decoder_start_token_id": 0, "local_radius": 127},
    "BartConfig": _BART,
    "MBartConfig": _BART,
    "MarianConfig": {**_BART, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "forced_eos_token_id": 2},
    "PegasusConfig": {**_BART, "decoder_start_token_id": 0},
    "PegasusXConfig": {**_BART, "decoder_start_token_id": 0, "block_size": 16, "num_global_tokens": 4},
    "BigBirdPegasusConfig": {**_BART, "block_size": 4, "num_random_blocks": 1, "attention_type": "original_full"},
    "M2M100Config": {**_BART, **_NO_START},
    "NllbMoeConfig": {**_BART, **_NO_START, "num_experts": 2, "expert_capacity": 64},
    "LEDConfig": {
        **{k: v for k, v in _BART.items() if k != "max_position_embeddings"},
        "max_encoder_position_embeddings": 128,
        "max_decoder_position_embeddings": 64,
        "attention_window": 8,
    },
    "BlenderbotConfig": {**_BART, **_NO_START},
    "BlenderbotSmallConfig": {**_BART, **_NO_START},
    "MvpConfig": _BART,
    "PLBartConfig": _BART,
    "ProphetNetConfig": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4, "max_position_embeddings": 128,
    },
}  # fmt: skip
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
# Those with a head for a class per token, and one of each kind without it.
_NO_TAGS = ("GPTJConfig", "Starcoder2Config", "MBartConfig", "ReformerConfig")
TAGGERS: dict[str, dict[str, Any]] = {name: values for name, values in CLASSIFIERS.items() if name not in _NO_TAGS}
# Classifiers that transformers (5.23) has no question answering for; and Funnel, whose tiny model with its decoder turns the
# rounding of a merge (1e-5 of the change of a layer) into other answers.
_NO_QUESTIONS = {
    "GemmaConfig", "Gemma2Config", "Gemma3TextConfig", "PhiConfig", "Phi3Config", "GPTBigCodeConfig", "StableLmConfig",
    "Starcoder2Config", "EsmConfig", "FunnelConfig",
}  # fmt: skip
READERS_OF_QUESTIONS = {n: v for n, v in CLASSIFIERS.items() if n not in _NO_QUESTIONS - {"Gemma2Config"}} | {
    "SmolLM3Config": WRITERS["SmolLM3Config"],
    "Qwen2MoeConfig": WRITERS["Qwen2MoeConfig"],
    "Qwen3MoeConfig": WRITERS["Qwen3MoeConfig"],
}
_BACKBONE = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
_DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 6,
}
_RT_DETR = {
    "use_timm_backbone": False,
    "backbone": None,
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 24, 32],
    "encoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_in_channels": [32, 32, 32],
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "num_queries": 6,
    "num_denoising": 0,
}
FINDERS_OF_OBJECTS: dict[str, dict[str, Any]] = {
    "YolosConfig": {
        "image_size": [64, 64],
        "patch_size": 16,
        "num_detection_tokens": 6,
        **{k: v for k, v in _SIZES.items() if k not in ("vocab_size", "max_position_embeddings")},
    },
    "DetrConfig": _DETR,
    "TableTransformerConfig": _DETR,
    "ConditionalDetrConfig": _DETR,
    "DeformableDetrConfig": {**_DETR, "num_feature_levels": 2},
    "RTDetrConfig": _RT_DETR,
}
# Families whose tokenizers end every text, because their head reads there.
_WITH_END = ("T5", "MT5", "Bart", "MBart", *(name.removesuffix("Config") for name in TRANSLATORS))
# One entry per task in each: its auto class, its families, and whether they are published with the task's head.
AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq_cls": "AutoModelForSequenceClassification",
    "token_cls": "AutoModelForTokenClassification",
    "reranking": "AutoModelForSequenceClassification",
    "embedding": "AutoModel",
    "image_cls": "AutoModelForImageClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "extractive_qa": "AutoModelForQuestionAnswering",
    "object_detection": "AutoModelForObjectDetection",
    "image_segmentation": "AutoModelForSemanticSegmentation",
}
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "causal_lm": WRITERS,
    "masked_lm": FILLERS,
    "seq_cls": CLASSIFIERS,
    "token_cls": TAGGERS,
    "extractive_qa": READERS_OF_QUESTIONS,
    "object_detection": FINDERS_OF_OBJECTS,
    "image_segmentation": SEGMENTERS,
    "image_cls": READERS_OF_IMAGES,
    "seq2seq": TRANSLATORS,
    "reranking": CLASSIFIERS,
    "embedding": CLASSIFIERS,
}
WITH_HEAD = ("causal_lm", "masked_lm", "seq2seq", "object_detection", "image_segmentation")
# Tasks of images whose published models have a head for other classes.
OTHER_CLASSES = ("object_detection", "image_segmentation")
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

    if name in ("T5Config", "MT5Config") and task != "seq2seq":
        values = {"decoder_start_token_id": 0, **values}
    config = make_config(name, FAMILIES[task], **values)
    model = make_model(config, AUTO_CLASSES[task] if task in WITH_HEAD else "AutoModel")
    generator = torch.Generator().manual_seed(1)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("running_mean"):  # as of a trained model
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    model.save_pretrained(folder)
    if task in OTHER_CLASSES:
        tiny_image_processor(64, 3).save_pretrained(folder)
        return
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
        single="$A <|im_end|>",
        pair="$A <|im_end|> $B <|im_end|>",
        special_tokens=[("<|im_end|>", tokenizer.eos_token_id)],
    )


def make_config(name: str, families: dict[str, dict[str, Any]] = CLASSIFIERS, **values: Any) -> Any:
    import transformers

    values = families[name] | values
    if families is FINDERS_OF_OBJECTS and name != "YolosConfig":
        values = {"backbone_config": _backbone(name), **values}
    if name == "UperNetConfig":
        stages = {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
        backbone = transformers.ResNetConfig(**stages, out_features=["stage1", "stage2", "stage3", "stage4"])
        values = {"backbone_config": backbone, **values}
    config = getattr(transformers, name)(**values)
    config.architectures = config.architectures or []  # transformers (5.23) reads it for Funnel
    return config


def _backbone(name: str) -> Any:
    import transformers

    if name == "RTDetrConfig":
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
        return transformers.RTDetrResNetConfig(**sizes, out_features=["stage2", "stage3", "stage4"])
    return transformers.ResNetConfig(**_BACKBONE, out_features=["stage1", "stage2"])


def make_model(config: Any, auto_class: str) -> Any:
    """Weights of 0.2 instead of 0.02, so that an output depends on every input by more than rounding."""
    import torch
    import transformers

    if hasattr(config, "initializer_range"):
        config.initializer_range = 0.2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, auto_class).from_config(config).eval()


def language_tokenizer(family: str) -> Any:
    """The tokenizer of mbart, mbart50 or nllb with the pieces ``▁``, ``a`` and ``b``."""
    import transformers

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    if family == "nllb":
        return transformers.NllbTokenizer(vocab={p: i for i, p in enumerate([*special, "▁", "a", "b"])}, merges=[])
    pieces = [*((p, 0.0) for p in special), ("▁", -1.0), ("a", -2.0), ("b", -2.0)]
    return {"mbart": transformers.MBartTokenizer, "mbart50": transformers.MBart50Tokenizer}[family](vocab=pieces)
