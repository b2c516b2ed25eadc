"""The configuration of a model, and what it determines without weights: labels, modules and shapes."""

from __future__ import annotations

import contextlib
from typing import Any

from peftlab.errors import RecipeError
from peftlab.models.load_errors import load_errors, quiet
from peftlab.models.pretrained import Pretrained
from peftlab.models.tiny import tiny_config
from peftlab.specs.heads import head_modules


def load_config(pretrained: Pretrained, **kwargs: Any) -> Any:
    """The model's config, with ``kwargs`` set in it. Raises: RecipeError."""
    from transformers import AutoConfig

    if pretrained.source.kind == "tiny":
        return tiny_config(pretrained.source.path, **kwargs)
    with quiet(), load_errors(pretrained, "config"):
        return AutoConfig.from_pretrained(pretrained.location, **pretrained.hub_kwargs, **kwargs)


def stored_as(pretrained: Pretrained) -> str:
    """How a model's files store its linear weights, as a value of model.quantize: ``none``, ``nf4`` (for fp4 as well) or
    ``int8``.

    Raises: RecipeError for another quantization.
    """
    if pretrained.source.kind in ("tiny", "shape", "gguf"):
        return "none"
    config = load_config(pretrained)
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return "none"
    values = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(values.get("quant_method", "an unnamed method"))
    if method == "bitsandbytes" and (values.get("load_in_8bit") or values.get("load_in_4bit")):
        return "int8" if values.get("load_in_8bit") else "nf4"
    raise RecipeError(
        f"the weights of {pretrained.source.name!r} are stored quantized by {method}; peftlab reads bitsandbytes' 4 and 8 bits, "
        "and weights in 16 or 32 bits: name the model that it was made from",
        key="model.name",
    )


def check_stored(pretrained: Pretrained, stored: str, wanted: str) -> None:
    """Raises RecipeError if weights that are stored quantized are wanted in another quantization."""
    if stored != "none" and wanted not in ("none", stored):
        raise RecipeError(
            f"{pretrained.source.name} is stored in {stored} already; remove quantize: {wanted}", key="model.quantize"
        )


def label_names(pretrained: Pretrained) -> list[str]:
    """Class names in a classifier's config, by index; transformers' default LABEL_0, LABEL_1 if unnamed."""
    named = load_config(pretrained).id2label
    return [str(named[i]) for i in sorted(named)]


def load_skeleton(pretrained: Pretrained, *, auto_class: str, **model_kwargs: Any) -> Any:
    """The model without weights, on the meta device: its modules and shapes. Arguments and errors as ``load_model``."""
    import torch
    import transformers

    with quiet(), load_errors(pretrained, "model"), torch.device("meta"):
        options = {"trust_remote_code": True} if pretrained.trust_remote_code else {}
        return getattr(transformers, auto_class).from_config(load_config(pretrained, **model_kwargs), **options)


def linear_widths(skeleton: Any) -> list[int]:
    """The numbers of input features of the linear layers in a model's body, ascending."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    heads = [skeleton.get_submodule(name) for name in head_modules(skeleton)]
    body = [m for m in skeleton.base_model.modules() if not any(m is head for head in heads)]
    widths = {m.in_features for m in body if isinstance(m, nn.Linear)}
    return sorted(widths | {m.nx for m in body if isinstance(m, Conv1D)})


def end_ids(pretrained: Pretrained, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids at which the model's generation config ends a text: those that are special or added tokens of ``tokenizer``,
    and the others, which are no ends in its vocabulary, as in a config whose default ids were never set."""
    from transformers import GenerationConfig

    ids: Any = None
    if pretrained.source.kind not in ("tiny", "shape"):
        with contextlib.suppress(OSError, ValueError), quiet():
            ids = GenerationConfig.from_pretrained(pretrained.location, **pretrained.hub_kwargs).eos_token_id
    if ids is None:
        ids = getattr(load_config(pretrained).get_text_config(), "eos_token_id", None)
    listed = [ids] if isinstance(ids, int) else list(ids or [])
    known = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return [i for i in listed if i in known], [i for i in listed if i not in known]


def has_class(config: Any, auto_class: str) -> bool:
    """Whether transformers, or the model's own code, has a model of this config for an auto class."""
    import transformers

    own = getattr(config, "auto_map", None) or {}
    return auto_class in own or type(config) in getattr(transformers, auto_class)._model_mapping


def is_causal(config: Any) -> bool:
    """Whether a token of models of this config sees only those before it; that is so for decoders."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    if config.is_encoder_decoder or reads_later_tokens(config):
        return False
    # T5's classes without a decoder write a config that is no encoder-decoder's.
    return config.model_type not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES or getattr(config, "is_decoder", False)


# Their decoder starts with the last token of the target, which is a language.
_STARTS_WITH_LAST = {"mbart", "plbart"}


def decoder_start(config: Any) -> int | None:
    """The token before each target of an encoder-decoder; None: the last token of the target."""
    return None if config.model_type in _STARTS_WITH_LAST else getattr(config, "decoder_start_token_id", None)


def starts_with_last(config: Any) -> bool:
    """Whether the decoder starts with the last token of the target."""
    return config.model_type in _STARTS_WITH_LAST


def token_types(config: Any, tokenizer: Any) -> int:
    """The number of types of tokens, such as those of a question and of its context, that a model of this config reads and its
    tokenizer writes; 0 if one of them knows none."""
    if "token_type_ids" not in tokenizer.model_input_names:
        return 0
    count = 3 if config.model_type == "xlnet" else getattr(config, "type_vocab_size", None) or 0
    return count if count > 1 else 0


def reads_later_tokens(config: Any) -> bool:
    """Whether the language model of this config is no causal one: an encoder such as BERT without ``is_decoder``."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if config.model_type == "xlnet" or (config.model_type == "bert-generation" and not config.is_decoder):
        return True
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.is_encoder_decoder:
        return False
    return not (getattr(config, "is_decoder", False) or getattr(config, "causal", False))
