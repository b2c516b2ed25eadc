"""Families of models that cannot do what a recipe asks, whatever their weights: refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from peftlab.adapters import is_convolution
from peftlab.adapters.bottleneck import check_blocks
from peftlab.errors import RecipeError
from peftlab.models import (
    decoder_start,
    has_class,
    linear_widths,
    load_config,
    misreads_nf4,
    reads_grids,
    reads_later_tokens,
    starts_with_last,
)
from peftlab.specs.task_spec import TaskSpec

if TYPE_CHECKING:
    from peftlab.assembly.assembly import Assembly


def check_family(config: Any, tokenizer: Any, spec: TaskSpec, *, pairs: bool = False) -> None:
    """Raises RecipeError if models of this config cannot do the task with this tokenizer, whatever their weights.

    Args: pairs: whether a row has two texts.
    """
    if spec.predicts == "spans" and getattr(config, "pad_index", tokenizer.pad_token_id) != tokenizer.pad_token_id:
        raise RecipeError(
            f"{config.model_type} takes the id {config.pad_index} for padding, also inside a text, and the padding token of the "
            f"tokenizer is {tokenizer.pad_token_id}; use the model's own tokenizer",
            key="model.name",
        )
    separator = getattr(config, "sep_token_id", None)
    if spec.predicts == "spans" and config.model_type == "longformer":
        found = tokenizer("a", "b", verbose=False)["input_ids"].count(separator)
        if found != 3:
            raise RecipeError(
                f"longformer finds the question by three separators (id {separator}) around it and its context, and the "
                f"tokenizer writes {found}; use the model's own tokenizer",
                key="model.name",
            )
    if spec.reads_source:
        _check_encoder_decoder(config)
    elif spec.predicts == "tokens" and spec.generates and reads_later_tokens(config):
        raise RecipeError(
            f"{config.model_type} reads the tokens after the one that it predicts, so it is no causal language model; use a "
            "model for causal language modelling, or set is_decoder to true in its config.json",
            key="model.name",
        )
    if config.model_type == "cpmant":
        raise RecipeError(
            "cpmant finds the padding of a batch by the id 0 and on the left only, and ignores the attention mask; use another "
            "language model",
            key="model.name",
        )
    if config.model_type == "reformer":
        raise RecipeError(
            "reformer trains only on rows whose length is a multiple of its chunks, and texts differ in length; use a model "
            "of another family that reads long texts, such as longformer or big_bird",
            key="model.name",
        )
    if spec.predicts == "vectors" and getattr(config, "is_encoder_decoder", False):
        raise RecipeError(
            f"{config.model_type} is an encoder with a decoder, whose states at the tokens of a text are no vectors of it; use an "
            "encoder, such as bert, or a causal language model with model.pooling: last",
            key="model.name",
        )
    if not has_class(config, spec.auto_class):
        raise RecipeError(
            f"transformers has no {config.model_type} model for task: {spec.name} ({spec.auto_class}); use a model of another "
            "family",
            key="model.name",
        )
    if spec.reads_whole_rows and getattr(config, "is_encoder_decoder", False):
        eos = tokenizer.eos_token_id
        row = ("a", "b") if pairs else ("a",)
        if eos is None or eos not in tokenizer(*row, verbose=False)["input_ids"]:
            raise RecipeError(
                f"the classification head of {config.model_type} reads the end of text, which the tokenizer does not write "
                f"after {'two texts' if pairs else 'a text'}; use a tokenizer that ends every text with its eos_token",
                key="model.name",
            )


# Why encoder-decoders of a family cannot be trained on a source and a target.
_REFUSED = {
    "prophetnet": "predicts several tokens at each position, and its loss is that of all of them",
    "xlm-prophetnet": "predicts several tokens at each position, and its loss is that of all of them",
    "fsmt": "has two vocabularies, and its head is part of its decoder",
}


def _check_encoder_decoder(config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    kind = config.model_type
    if kind not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES or hasattr(config, "audio_config"):
        raise RecipeError(
            f"{kind} has no decoder that writes a text from another text; use an encoder-decoder such as t5, bart, mbart, "
            "marian or pegasus, or task: causal_lm with a language model",
            key="model.name",
        )
    if kind in _REFUSED:
        raise RecipeError(f"{kind} {_REFUSED[kind]}; use another family, such as t5 or bart", key="model.name")
    if not starts_with_last(config) and decoder_start(config) is None:
        raise RecipeError(
            "its config.json has no decoder_start_token_id, the token that stands before each target; set it as the model was "
            "trained (T5, Marian, Pegasus: the padding token; BART: the end of text)",
            key="model.name",
        )
    if kind == "encoder-decoder" and decoder_start(config) == config.pad_token_id:
        raise RecipeError(
            f"its decoder_start_token_id is its padding token (id {config.pad_token_id}), which {kind} masks when it trains and "
            "reads when it writes; set it to another token, as the model was trained",
            key="model.name",
        )


def reads_ids(config: Any, spec: TaskSpec) -> bool:
    """Whether a model of this config finds positions by ids in its config: the head of a decoder skips the padding id, and
    an encoder-decoder reads at the end of text."""
    return spec.reader == "tokenizer" and (spec.reads_whole_rows or bool(getattr(config, "is_encoder_decoder", False)))


# Families that compute with the weights of their layers directly.
_READS_WEIGHTS = ("mamba", "falcon_mamba", "rwkv")


def check_storage(assembly: Assembly) -> None:
    """Raises RecipeError if the family, or this machine's bitsandbytes, would read the quantized weights wrongly."""
    config = load_config(assembly.pretrained)
    kind = config.model_type
    if assembly.storage == "int8" and getattr(config, "attention_type", None) == "block_sparse":
        raise RecipeError(
            f"{kind} changes from sparse to full attention at short rows, and its int8 outputs are others then; set "
            "attention_type to original_full in its config.json, or model.quantize=nf4",
            key="model.quantize",
        )
    if assembly.storage != "none" and kind in _READS_WEIGHTS:
        raise RecipeError(
            f"{kind} computes with the weights of its layers as they are stored, so they cannot be quantized; set "
            "model.quantize=none",
            key="model.quantize",
        )
    # The latent attention of DeepSeek and its kin.
    if assembly.storage == "int8" and any(hasattr(module, "expand_kv") for module in assembly.skeleton().modules()):
        raise RecipeError(
            f"{kind} expands its keys and values in four dimensions, which bitsandbytes' int8 layers do not read; use "
            "model.quantize=nf4",
            key="model.quantize",
        )
    if (
        assembly.storage == "int8"
        and assembly.spec.reader == "image processor"
        and reads_grids(assembly.skeleton(), assembly.reader.shape)
    ):
        raise RecipeError(
            f"{kind} keeps images as grids of positions, which bitsandbytes' int8 layers do not read; use model.quantize=nf4",
            key="model.quantize",
        )
    if assembly.storage != "nf4" or assembly.device != "cpu":
        return
    if (width := next((w for w in linear_widths(assembly.skeleton()) if misreads_nf4(w)), None)) is not None:
        raise RecipeError(
            f"bitsandbytes reads NF4 weights with {width:,} input features wrongly on a CPU; use model.quantize=int8 or a GPU",
            key="model.quantize",
        )


def check_layers(model: Any, planned: Sequence[str], method: str = "lora") -> None:
    """Raises RecipeError if the method, or PEFT (0.21), cannot put adapters on the layers of a model of this family.

    Args: model: may be on the meta device. planned: names of the layers to adapt; empty for a method that finds its places.
    """
    kind = model.config.model_type
    if method == "bottleneck":
        check_blocks(model)
        body = model.base_model
        if body is not model and any(isinstance(h, nn.ModuleList) for h in model.children() if h is not body):
            raise RecipeError(
                f"the head of {kind} is a list of layers, which PEFT cannot train in full beside bottlenecks; use "
                "adapter.method=none",
                key="adapter.method",
            )
    if planned and _ties_without_embeddings(model):
        raise RecipeError(
            f"{kind} shares weights between its layers and has no token embeddings, and PEFT asks such a model for them; use "
            "adapter.method=none",
            key="adapter.method",
        )
    if (shared := next(shared_weights(model, planned), None)) is not None:
        raise RecipeError(
            f"{shared[0]} and {shared[1]} of {kind} are one weight, which a merge would change in both; leave it out of "
            "adapter.targets",
            key="adapter.targets",
        )
    if getattr(model.config, "tf_padding", False) and any(
        is_convolution(model.get_submodule(name)) for name in planned
    ):
        raise RecipeError(
            f"{kind} asks its convolutions how to pad (tf_padding), and PEFT's layers around them do not say; use "
            "adapter.method=none",
            key="adapter.targets",
        )


def shared_weights(model: Any, planned: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields each layer of ``planned`` whose weight is also that of another layer, with the other; a head that is the input
    embeddings is none, because a merge gives it weights of its own."""
    ends = {id(end) for end in _ends(model)}
    owners: dict[int, list[tuple[str, Any]]] = {}
    for name, module in model.named_modules():
        if (weight := getattr(module, "weight", None)) is not None:
            owners.setdefault(id(weight), []).append((name, module))
    for name in planned:
        module = model.get_submodule(name)
        for other, owner in owners.get(id(getattr(module, "weight", None)), ()):
            if owner is not module and not ({id(owner), id(module)} <= ends):
                yield name, other


def _ends(model: Any) -> tuple[Any, ...]:
    try:
        return model.get_input_embeddings(), model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return ()


def _ties_without_embeddings(model: Any) -> bool:
    """Whether PEFT fails on a model: it looks for what is tied to the input embeddings."""
    if not getattr(model, "_tied_weights_keys", None):
        return False
    try:
        model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return True
    return False
