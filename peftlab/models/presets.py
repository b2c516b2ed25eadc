"""Models of published shapes with random weights, ``shape:NAME``: for benchmarks and memory tests, without a hub."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tempfile
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from peftlab.errors import RecipeError
from peftlab.models.tiny import tiny_tokenizer
from peftlab.paths import cache_root

PREFIX = "shape:"
_STD = 0.02
# Part of the fingerprint: increased when the same configuration gets other weights.
_DRAW = 1

_LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
_LLAMA_3_2 = {
    **_LLAMA_3,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
}
_QWEN3 = {
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}

# transformers config class and values, as in the config.json published with each model.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": (  # meta-llama/Meta-Llama-3-8B
        "LlamaConfig",
        {
            **_LLAMA_3,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": False,
        },
    ),
    "llama-3.2-1b": (  # meta-llama/Llama-3.2-1B
        "LlamaConfig",
        {
            **_LLAMA_3_2,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "head_dim": 64,
        },
    ),
    "llama-3.2-3b": (  # meta-llama/Llama-3.2-3B
        "LlamaConfig",
        {
            **_LLAMA_3_2,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "head_dim": 128,
        },
    ),
    "qwen3-0.6b": (  # Qwen/Qwen3-0.6B
        "Qwen3Config",
        {
            **_QWEN3,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-4b": (  # Qwen/Qwen3-4B
        "Qwen3Config",
        {
            **_QWEN3,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-8b": (  # Qwen/Qwen3-8B
        "Qwen3Config",
        {
            **_QWEN3,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "tie_word_embeddings": False,
        },
    ),
    "mistral-7b": (  # mistralai/Mistral-7B-v0.3
        "MistralConfig",
        {
            "vocab_size": 32768,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
    ),
    "gemma-2-2b": (  # google/gemma-2-2b
        "Gemma2Config",
        {
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
        },
    ),
    "smollm2-135m": (  # HuggingFaceTB/SmolLM2-135M
        "LlamaConfig",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "tie_word_embeddings": True,
        },
    ),
}


def check_preset(name: str) -> None:
    """Raises: RecipeError if there is no preset ``shape:NAME``."""
    short = name.removeprefix(PREFIX)
    if short in PRESETS:
        return
    near = difflib.get_close_matches(short.lower(), PRESETS, n=1, cutoff=0.5)
    hint = f"; did you mean {PREFIX + near[0]!r}?" if near else "."
    raise RecipeError(f"unknown shape {name!r}{hint} There are {', '.join(PRESETS)}", key="model.name")


def preset_fingerprint(name: str) -> str:
    """sha256 over the name and its configuration. They determine the weights, so no gigabytes need hashing."""
    short = name.removeprefix(PREFIX)
    return hashlib.sha256(json.dumps([short, PRESETS[short], _DRAW], sort_keys=True).encode()).hexdigest()


def preset_config(name: str, **kwargs: Any) -> Any:
    """The transformers config, with the special tokens of ``preset_tokenizer``."""
    import transformers

    class_name, values = PRESETS[name.removeprefix(PREFIX)]
    return getattr(transformers, class_name)(
        **values, pad_token_id=0, bos_token_id=1, eos_token_id=2, dtype="bfloat16", **kwargs
    )


def preset_tokenizer(name: str) -> Any:
    """The byte-level tokenizer of the tiny models, with the model's maximum length."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = PRESETS[name.removeprefix(PREFIX)][1]["max_position_embeddings"]
    return tokenizer


def linear_shapes(name: str) -> list[tuple[int, int]]:
    """The distinct (out features, in features) of the linears in a preset's decoder, without its output layer."""
    values = PRESETS[name.removeprefix(PREFIX)][1]
    hidden, inner, num_heads = values["hidden_size"], values["intermediate_size"], values["num_attention_heads"]
    head = values.get("head_dim", hidden // num_heads)
    query, key = num_heads * head, values["num_key_value_heads"] * head
    shapes = [(query, hidden), (key, hidden), (hidden, query), (inner, hidden), (hidden, inner)]
    return list(dict.fromkeys(shapes))


def config_folder(name: str, fingerprint: str) -> Path:
    """A cache folder with only the preset's config.json, for code that reads a model's config from files."""
    folder = cache_root() / "shapes" / f"{name.removeprefix(PREFIX)}-{fingerprint[:16]}"
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
            preset_config(name).save_pretrained(partial)
            os.replace(Path(partial) / "config.json", folder / "config.json")
    return folder


def build_preset(
    name: str,
    auto: Any,
    *,
    device: str,
    dtype: Any,
    quantization_config: Any = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    **config_kwargs: Any,
) -> Any:
    """The model on ``device``, built tensor by tensor: at most one unquantized linear weight exists at a time.

    Linear and embedding weights are normal with std 0.02, norms neutral, biases 0. The values depend only on preset and
    parameter name: they are drawn on the CPU and rounded to bfloat16 as in published files, so every device, dtype and
    quantization starts from the same model.

    Args:
        auto: a transformers auto class.
        quantization_config, device_map, attn_implementation: as ``from_pretrained`` takes them.
        config_kwargs: added to the config (``num_labels``, ...).
    """
    import torch
    from torch import nn
    from transformers.quantizers import AutoHfQuantizer

    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"):
        model = auto.from_config(preset_config(name, **config_kwargs), dtype=dtype, **attention)
    quantizer = None
    if quantization_config is not None:  # the steps of from_pretrained, around our own loop
        quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
        quantizer.validate_environment(device_map=device_map)
        quantizer.preprocess_model(model=model, dtype=dtype, device_map=device_map)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for path, empty in list(model.named_parameters()):  # without a tied head
            owner, _, key = path.rpartition(".")
            module = model.get_submodule(owner)
            if key == "weight" and isinstance(module, nn.Linear | nn.Embedding):
                seed = f"{name}/{path}"
                parameter = _weight(model, path, empty.shape, dtype, device, seed=seed, quantizer=quantizer, pool=pool)
                parameter._is_hf_initialized = True  # transformers' own initialization then skips it
            else:
                parameter = nn.Parameter(torch.zeros(empty.shape, dtype=dtype, device=device), requires_grad=False)
            setattr(module, key, parameter)
    for path, buffer in list(model.named_buffers()):
        owner, _, key = path.rpartition(".")
        setattr(model.get_submodule(owner), key, torch.empty_like(buffer, device=device))
    model.tie_weights()
    model.initialize_weights()  # norms, and buffers that are in no file: rotary frequencies, Gemma's embedding scale
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    model.config.name_or_path = model.name_or_path = name
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    return model


def _weight(
    model: Any, path: str, shape: Any, dtype: Any, device: str, *, seed: str, quantizer: Any, pool: Executor
) -> Any:
    """The parameter for ``path``, quantized if the quantizer requires it."""
    from torch import nn

    value = random_weight(shape, dtype=dtype, device=device, seed=seed, pool=pool)
    if quantizer is None or not quantizer.param_needs_quantization(model, path):
        return nn.Parameter(value, requires_grad=False)
    return quantizer.get_quantize_ops().convert({path: value}, model=model, full_layer_name=path)[path]


def random_weight(shape: Any, *, dtype: Any, device: str, seed: str, pool: Executor, piece_size: int = 2**20) -> Any:
    """A tensor of ``shape`` with normal values of std 0.02, rounded to bfloat16, the same for the same ``seed``.

    ``piece_size`` elements come from one generator: pieces are drawn in parallel, and only these exist in float32.
    """
    import torch

    weight = torch.empty(shape, dtype=dtype)
    pieces = list(enumerate(weight.view(-1).split(piece_size)))

    def draw(numbered: tuple[int, Any]) -> None:
        number, piece = numbered
        digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))  # it takes 32 bits
        piece.copy_(torch.empty(piece.shape).normal_(0.0, _STD, generator=generator).bfloat16())

    for _ in pool.map(draw, pieces):
        pass
    return weight.to(device)
