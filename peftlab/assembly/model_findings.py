"""What a model's config and its tokenizer say about each other, found without weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peftlab.adapters import (
    check_adapter,
    experts_text,
    fitting_sizes,
    is_convolution,
    is_grouped,
    owners,
    planned_modules,
    planned_parameters,
    reach_notes,
    try_injection,
)
from peftlab.assembly.adapter import mixed_of
from peftlab.assembly.mixed import check_mixed
from peftlab.data import Finding
from peftlab.errors import RecipeError, listed
from peftlab.models import (
    UNLIMITED,
    decoder_start,
    end_ids,
    has_class,
    length_limit,
    linear_widths,
    load_config,
    misreads_nf4,
    reads_grids,
    reads_later_tokens,
    reconciled_ids,
    starts_with_last,
)
from peftlab.specs.methods import METHODS
from peftlab.specs.task_spec import TaskSpec

if TYPE_CHECKING:
    from peftlab.assembly.assembly import Assembly

_PADDING = {
    "left": "pads rows on the left, because the head of this family reads the last position",
    "none": "runs only rows of the same length together, because this family reads padding; that is slower",
}


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


def reads_ids(config: Any, spec: TaskSpec) -> bool:
    """Whether a model of this config finds positions by ids in its config: the head of a decoder skips the padding id, and
    an encoder-decoder reads at the end of text."""
    return spec.reader == "tokenizer" and (spec.reads_whole_rows or bool(getattr(config, "is_encoder_decoder", False)))


def model_findings(assembly: Assembly) -> list[Finding]:
    """Notes on how the weights are stored, on what the adapter leaves out, and for texts on padding, ids, ends of text and the
    limit. Raises: RecipeError if the adapter's targets match nothing."""
    texts = _of_texts(assembly) if assembly.spec.reader == "tokenizer" else ()
    return [*_of_weights(assembly), *texts]


# Families that compute with the weights of their layers directly.
_READS_WEIGHTS = ("mamba", "falcon_mamba", "rwkv")


def _check_quantized(assembly: Assembly) -> None:
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


def _of_weights(assembly: Assembly) -> Iterator[Finding]:
    if (stored := assembly.stored) != "none":
        yield Finding(
            "stored",
            f"the weights are stored in {stored} by bitsandbytes; they stay so, and a merge writes their dequantized values",
            "model.name",
        )
    _check_quantized(assembly)
    if not assembly.method.adapts:
        return
    adapter, skeleton, method = assembly.recipe.adapter, assembly.skeleton(), assembly.method.name
    config = check_adapter(skeleton, method, **assembly.adapter_places, **assembly.adapter_options)
    check_mixed(mixed_of(assembly.recipe), assembly)
    if not (assembly.method.own_options or adapter.tokens or mixed_of(assembly.recipe)):
        # Which modules of a head are new, and so no targets, is known with the weights; without a type none is a target.
        places = (
            assembly.adapter_places
            | {"modules_to_save": ()}
            | ({"peft_type": None} if assembly.spec.reads_whole_rows else {})
        )
        try_injection(assembly.skeleton(), method, **places, **assembly.adapter_options)
    if (start := assembly.start) is not None:
        start.check(config, assembly)
        going_on = f"continues the adapter in {start.folder}"
        yield Finding("start", f"{going_on}. {start.as_plain}".rstrip(". "), "adapter.start")
    quantized = assembly.storage != "none"
    for name in (method, *(other.method for other in adapter.beside)) if quantized else ():
        if METHODS[name].storages is None:
            text = f"{METHODS[name].label} was not tried on {assembly.storage} weights"
            yield Finding(
                "untried", f"{text}; the run compares its layers with dequantized ones first", "adapter.method"
            )
    if not assembly.method.has_targets:
        return
    planned = planned_modules(skeleton, method=method, **assembly.adapter_places)
    if _ties_without_embeddings(skeleton):
        raise RecipeError(
            f"{skeleton.config.model_type} shares weights between its layers and has no token embeddings, and PEFT asks such a "
            "model for them; use adapter.method=none",
            key="adapter.method",
        )
    if getattr(load_config(assembly.pretrained), "tf_padding", False) and any(
        is_convolution(skeleton.get_submodule(name)) for name in planned
    ):
        raise RecipeError(
            f"{skeleton.config.model_type} asks its convolutions how to pad (tf_padding), and PEFT's layers around them do not say; "
            "use adapter.method=none",
            key="adapter.targets",
        )
    given = {assembly.method.keys.get(k, k): v for k, v in assembly.adapter_options.items() if v is not None}
    if assembly.spec.predicts == "vectors" and planned and all("pooler" in name.split(".") for name in planned):
        raise RecipeError(
            f"adapter.targets reaches {listed(planned)} only, which has no part in a vector; name other layers",
            key="adapter.targets",
        )
    for line in fitting_sizes(skeleton, assembly.method, planned, given)[1]:
        yield Finding("sizes", line, "adapter.method")
    if grouped := [name for name in planned if is_grouped(skeleton.get_submodule(name))]:
        found = f"{len(grouped)} of the {len(planned)} adapted layers are grouped convolutions ({grouped[0]})"
        if assembly.recipe.run.merge != "none":
            raise RecipeError(
                f"{found}, which PEFT cannot merge; leave them out of adapter.targets, or set run.merge=none",
                key="run.merge",
            )
        yield Finding("reach", f"{found}, which PEFT cannot merge", "adapter.targets")
    if parameters := planned_parameters(skeleton, given.get("target_parameters"), **assembly.adapter_places):
        planned += owners(parameters)
        shapes = [(name, skeleton.get_parameter(name).shape) for name in parameters]
        if text := experts_text(shapes, quantized=quantized):
            yield Finding("reach", f"the adapter changes {text}", "adapter.target_parameters")
    everywhere = planned_modules(skeleton, method=method, **assembly.adapter_places | {"layers": None, "freeze": []})
    for note in reach_notes(skeleton, planned, targets=adapter.targets, quantized=quantized, everywhere=everywhere):
        yield Finding("reach", note, "adapter.targets")


def _ties_without_embeddings(model: Any) -> bool:
    """Whether PEFT (0.21) fails on a model: it looks for what is tied to the input embeddings."""
    if not getattr(model, "_tied_weights_keys", None):
        return False
    try:
        model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return True
    return False


def _of_texts(assembly: Assembly) -> Iterator[Finding]:
    config, tokenizer = load_config(assembly.pretrained), assembly.reader
    if tokenizer.padding_note is not None:
        yield Finding("padding_token", tokenizer.padding_note, "model.name")
    if reads_ids(config, assembly.spec):
        for name, (now, then) in reconciled_ids(config, tokenizer).items():
            has = f"is {now}" if now is not None else "is not set"
            yield Finding(
                "config_ids",
                f"{name} of the model's config {has}; peftlab sets it to {then}, the tokenizer's. To open the adapter with PEFT "
                f"alone, set model.config.{name} = {then} first",
                "model.name",
            )
    if (way := assembly.task.padding) != "right":
        yield Finding("padding", f"{config.model_type}: peftlab {_PADDING[way]}", "model.name")
    if assembly.spec.generates and (ordinary := end_ids(assembly.pretrained, tokenizer)[1]):
        names = [tokenizer.convert_ids_to_tokens(i) for i in ordinary[:3]]
        found = f"no special token of the tokenizer but {', '.join(map(repr, filter(None, names)))}"
        yield Finding(
            "config_ids",
            f"eos_token_id of the model's config ({', '.join(map(str, ordinary[:3]))}) is "
            f"{found if any(names) else 'no token of the tokenizer'}, so it does not end an answer; {tokenizer.eos_token!r} does",
            "model.name",
        )
    limit = length_limit(assembly.pretrained, tokenizer)
    if limit.note is not None and assembly.recipe.data.max_length is None:
        longest = f"at most {limit.tokens:,} tokens" if limit.tokens < UNLIMITED else "texts of any length"
        yield Finding("length_limit", f"the model reads {longest}: {limit.note}", "data.max_length")
