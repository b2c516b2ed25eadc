"""Bottlenecks of the package ``adapters`` 1.3.0, with the weights and outputs to compare with.

It needs transformers 4.57, older than ours, so it has an environment of its own. In it,

    python -m tests.conformance.bottleneck_peers

writes the file that ``tests/adapters/test_bottleneck_reference.py`` reads without the package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RECORDED = Path(__file__).parents[1] / "adapters" / "bottlenecks_of_adapters.safetensors"
SETTINGS: dict[str, dict[str, Any]] = {
    "houlsby": {"reduction_factor": 4, "non_linearity": "swish", "scaling": 1.0},
    "pfeiffer": {"reduction_factor": 4, "non_linearity": "relu", "scaling": 1.0},
    "parallel": {"reduction_factor": 4, "non_linearity": "relu", "scaling": 4.0},
}
_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_BERT = {"vocab_size": 40, "max_position_embeddings": 16, **_SIZES}
_BART = {
    "vocab_size": 40, "d_model": 16, "max_position_embeddings": 16, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": _BERT,
    "Roberta": _BERT,
    "Albert": {**_BERT, "embedding_size": 8},
    "DebertaV2": {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DistilBert": {
        "vocab_size": 40, "max_position_embeddings": 16, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2,
    },
    "GPT2": {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "Llama": _BERT,
    "T5": {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    "Bart": _BART,
    "MBart": _BART,
    "ViT": {**_SIZES, "image_size": 8, "patch_size": 4, "num_channels": 1},
}  # fmt: skip


def base_of(family: str) -> Any:
    """A model of the installed transformers with random weights."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = getattr(transformers, f"{family}Model")(config).eval()
    fill(model.named_parameters(), seed=0, size=0.2)
    return model


def inputs_of(model: Any) -> dict[str, Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
    ids = torch.arange(12).view(2, 6) + 3
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {})


def fill(parameters: Any, *, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in parameters:
        parameter.data = size * torch.randn(parameter.shape, generator=generator)


def with_theirs(model: Any, style: str) -> dict[str, Tensor]:
    """Puts an adapter of the package into ``model``; returns its random weights by name."""
    import adapters

    kinds = {
        "houlsby": adapters.DoubleSeqBnConfig,
        "pfeiffer": adapters.SeqBnConfig,
        "parallel": adapters.ParBnConfig,
    }
    adapters.init(model)
    model.add_adapter("recorded", config=kinds[style](**SETTINGS[style]))
    model.train_adapter("recorded")
    model.eval()
    weights = [(name, p) for name, p in model.named_parameters() if ".adapters.recorded." in name]
    fill(weights, seed=1, size=0.3)
    return dict(weights)


def record(path: Path) -> None:
    """Writes BERT's base weights, and for each style the adapter's weights and the output."""
    import adapters
    import transformers
    from safetensors.torch import save_file

    base = base_of("Bert")
    inputs = inputs_of(base)
    tensors = {f"base.{name}": value for name, value in base.state_dict().items()} | inputs
    for style in SETTINGS:
        model = base_of("Bert")
        tensors |= {f"{style}.{name}": weight.detach() for name, weight in with_theirs(model, style).items()}
        with torch.no_grad():
            tensors[f"{style}.output"] = model(**inputs)[0]
    notes = {
        "adapters": adapters.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "config": json.dumps(FAMILIES["Bert"]),
        "styles": json.dumps(SETTINGS),
    }
    save_file({name: value.contiguous() for name, value in tensors.items()}, str(path), metadata=notes)


if __name__ == "__main__":
    record(RECORDED)
