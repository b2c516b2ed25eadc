"""Loads backbones: on the right device, frozen, optionally quantized by bitsandbytes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from peftlab.errors import ArtifactError, RecipeError
from peftlab.models.config import check_stored, load_skeleton, stored_as
from peftlab.models.dtypes import resolve_dtype, resolve_precision
from peftlab.models.load_errors import load_errors, quiet
from peftlab.models.presets import build_preset
from peftlab.models.pretrained import Pretrained
from peftlab.models.tiny import tiny_config
from peftlab.specs.heads import head_modules

# Output layers stay in full precision: they have few parameters and the loss is most sensitive to them.
_NOT_QUANTIZED = ["lm_head", "embed_out", "classifier", "score", "pooler.dense"]
# Layers whose input the family casts to the dtype of their weight, by type of model; quantized ones have none that fits.
_CAST_TO = {"longt5": ["wo"], "switch_transformers": ["wo"]}
_NEW = "new_weights"  # the attribute of a loaded model that names its new parameters


def load_model(
    pretrained: Pretrained,
    *,
    auto_class: str,
    device: str,
    quantize: str = "none",
    double_quant: bool = True,
    compute_dtype: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    resize_token_embeddings: int | None = None,
    whole: bool = False,
    brought: Collection[str] = (),
    **model_kwargs: Any,
) -> Any:
    """The frozen backbone on ``device``, in eval mode; no parameter requires a gradient. ``new_weights`` names the parameters
    that its files lack.

    Args:
        auto_class: name of a transformers auto class, such as ``AutoModelForCausalLM``.
        quantize: ``none``, ``nf4`` or ``int8``: storage of the linear weights except output layers. For files that are stored
            quantized: as they are stored, or ``none`` for their dequantized weights.
        resize_token_embeddings: number of rows of embeddings and head; new ones are the mean of the others.
        whole: refuse a model without a task head in its files, or with a head of another size, instead of adding a new one.
            brought: names of parameters that an adapter supplies, which may be missing.
        model_kwargs: passed to the config (``num_labels``, ``id2label``, ...).
    Raises: RecipeError, ArtifactError, ResourceError.
    """
    import transformers

    torch_dtype = resolve_dtype(dtype, device)
    kwargs: dict[str, Any] = {"dtype": torch_dtype, **model_kwargs}
    if attention != "auto":
        kwargs["attn_implementation"] = attention
    stored, compute = stored_as(pretrained), resolve_precision(compute_dtype, device)
    if stored != "none":
        check_stored(pretrained, stored, quantize)
        kwargs["device_map"] = {"": device}
    elif quantize != "none":
        skeleton = load_skeleton(pretrained, auto_class=auto_class, **model_kwargs)
        num_labels = model_kwargs.get("num_labels", 0)
        kwargs["quantization_config"] = quantization_of(skeleton, quantize, double_quant, compute, num_labels)
        kwargs["device_map"] = {"": device}
    auto = getattr(transformers, auto_class)
    with quiet(), load_errors(pretrained, "model"):
        if pretrained.source.kind == "tiny":
            model = _tiny_model(pretrained, auto, kwargs)
        elif pretrained.source.kind == "shape":
            model = build_preset(pretrained.source.path, auto, device=device, **kwargs)
        else:
            model, loading = auto.from_pretrained(
                pretrained.location,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **pretrained.hub_kwargs,
                **kwargs,
            )
            new = _new_weights(pretrained, model, loading, whole=whole, brought=brought)
            setattr(model, _NEW, new)
    if resize_token_embeddings is not None:
        _resize(model, resize_token_embeddings)
    if stored != "none" and quantize == "none":
        model = _dequantized(model, torch_dtype)
    if quantize == "none":
        model.to(device)
    elif quantize == "nf4":
        _keep_storage_layout(model, compute)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, with the adapter's layers in it; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def num_parameters(model: Any) -> int:
    """The number of weights of a model before quantization: bitsandbytes packs two NF4 weights into one byte."""
    count = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count += parameter.numel() if state is None else int(np.prod(state.shape))
    return count


def new_weights(model: Any) -> frozenset[str]:
    """Names of the parameters that the files of a loaded model lack, or hold for a head of another size: transformers drew
    them at random."""
    names: frozenset[str] = getattr(base_model(model), _NEW, frozenset())
    return names


def _new_weights(
    pretrained: Pretrained, model: Any, loading: Any, *, whole: bool, brought: Collection[str]
) -> frozenset[str]:
    """The names for ``new_weights``. Raises: ArtifactError if they belong to the body, RecipeError for a head with ``whole``."""
    sizes = {name: (tuple(stored), tuple(wanted)) for name, stored, wanted in loading["mismatched_keys"]}
    new = (set(loading["missing_keys"]) & set(model.state_dict())) | set(sizes)
    heads = tuple(f"{name}." for name in head_modules(model))
    is_base = model.base_model is model and not heads
    absent = sorted(new - set(brought))
    if whole and absent and not is_base:
        raise RecipeError(
            f"{pretrained.source.name!r} has no head for this task ({', '.join(absent[:3])} would be random): "
            "train it for the task first, and use the run folder or the merged model",
            key="model.name",
        )
    inner = "" if model.base_model is model else f"{model.base_model_prefix}."
    writes = "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__
    other_classes = {name for name, shapes in sizes.items() if _is_class_head(*shapes, model.config.num_labels)}
    body = (n for n in new if n.startswith(inner) and not n.startswith(heads) and "pooler" not in n)
    lost = sorted(n for n in (new if writes else body) if n not in other_classes)
    if not lost:
        return frozenset(new)
    if lost[0] in sizes:
        stored, wanted = sizes[lost[0]]
        problem = f"do not fit its config.json: {lost[0]} has the shape {list(stored)}, and the config asks for {list(wanted)}"
    else:
        problem = f"are incomplete: {len(lost)} tensors are missing, such as {lost[0]}"
    raise ArtifactError(f"the weights of {pretrained.source.name!r} {problem}; copy them again", key="model.name")


def _class_layers(model: Any, num_labels: int) -> list[str]:
    """Names of the linear layers with an output per class, which RT-DETR has in its body; new ones are trained in full."""
    from torch import nn

    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name, module in linear if num_labels and module.out_features in (num_labels, num_labels + 1)]


def _is_class_head(stored: tuple[int, ...], wanted: tuple[int, ...], num_labels: int) -> bool:
    """Whether shapes differ in the number of classes only: some detectors have their heads inside the body."""
    return stored[1:] == wanted[1:] and wanted[0] in (num_labels, num_labels + 1)


def _resize(model: Any, rows: int) -> None:
    """Resizes embeddings and head to ``rows``; both count as new. Raises: RecipeError for a model without a vocabulary."""
    with quiet():
        try:
            ends = [model.get_input_embeddings(), model.get_output_embeddings()]
            if len(ends[0].weight) == rows:
                return
            model.resize_token_embeddings(rows)
        except (NotImplementedError, AttributeError) as error:
            raise RecipeError(
                f"{type(model).__name__} has no vocabulary to resize", key="model.resize_token_embeddings"
            ) from error
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {f"{name}.weight" for name, module in model.named_modules() if any(module is end for end in ends)}
    setattr(model, _NEW, new_weights(model) | names)


def _dequantized(model: Any, dtype: Any) -> Any:
    """A model that was stored quantized, with plain linear layers. transformers (5.23) would reverse its reading of quantized
    tensors when it saves such a model, and cannot."""
    with quiet():
        model = model.dequantize(dtype)
    conversions = getattr(model, "_weight_conversions", None) or []
    kept = [c for c in conversions if not any("Bnb" in type(op).__name__ for op in getattr(c, "operations", ()))]
    model._weight_conversions = kept or None
    return model


def _keep_storage_layout(model: Any, compute_dtype: Any) -> None:
    """Sets the dtype of the products, for which stored weights have their own value, and stops bitsandbytes (0.50) from
    repacking NF4 weights in place at the first forward in eval mode on a CPU.

    The packed layout has no backward and dequantizes to garbage, so a model that is evaluated first could then
    neither be trained nor merged.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype, module.compute_type_is_set = compute_dtype, True


def _tiny_model(pretrained: Pretrained, auto: Any, kwargs: dict[str, Any]) -> Any:
    """A tiny model with fixed random weights; quantizing needs a checkpoint to load, so it goes through one."""
    import tempfile

    import torch
    from safetensors.torch import save_file

    load = {
        k: kwargs.pop(k) for k in ("dtype", "quantization_config", "device_map", "attn_implementation") if k in kwargs
    }
    config = tiny_config(pretrained.source.path, **kwargs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config)
    with tempfile.TemporaryDirectory() as folder:
        # save_pretrained writes on the first rank only; each rank has its own folder.
        config.save_pretrained(folder)
        weights = {
            name: weight.clone() for name, weight in model.state_dict().items()
        }  # a tied weight under both names
        save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
        model = auto.from_pretrained(folder, **load)
    model.config.name_or_path = model.name_or_path = pretrained.source.path
    return model


def quantization_of(skeleton: Any, quantize: str, double_quant: bool, compute_dtype: Any, num_labels: int) -> Any:
    """transformers' configuration of a quantization, with the layers of ``skeleton`` that stay as they are. Args: num_labels: of a
    classifier, else 0."""
    from transformers import BitsAndBytesConfig

    kept = [*_NOT_QUANTIZED, *head_modules(skeleton), *_CAST_TO.get(skeleton.config.model_type, ())]
    kept += _class_layers(skeleton, num_labels)
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=kept,
    )
