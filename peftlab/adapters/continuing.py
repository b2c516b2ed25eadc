"""Begins a new adapter with the weights of a saved one, after checking that both are the same adapter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftlab.adapters.adapter_files import ADAPTER_FILES, check_adapter_files, load_tensors, state_of, unused_tensors
from peftlab.adapters.full import WEIGHTS_FILE, load_values
from peftlab.adapters.initial import changes_weights
from peftlab.adapters.state import method_of
from peftlab.errors import ArtifactError, RecipeError
from peftlab.specs.method_spec import MethodSpec
from peftlab.specs.methods import METHODS

# Fields of a configuration that say where an adapter is, which its tensors show, or that act in training only.
_FREE = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "peft_type", "inference_mode"),
        *("task_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "layers"),
        *("modules_to_save", "target_parameters", "trainable_token_indices", "runtime_config", "fan_in_fan_out"),
        *("megatron_config", "megatron_core", "tokenizer_name_or_path", "token_dim", "num_transformer_submodules"),
        *("num_attention_heads", "num_layers", "hidden_size", "encoder_hidden_size", "ensure_weight_tying"),
        *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "arrow_config", "adapters"),
        *("tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
        *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs"),
    )
)
# First factors that come from the training rows and change the base weights: a file does not say what they were.
_LOST_BASE = ("corda", "lora_ga")


def check_same_adapter(config: Any, folder: Path) -> None:
    """Compares the configuration of a new adapter with that of the saved one that it continues.

    Args: config: result of ``check_adapter``. Raises: RecipeError that names every setting that differs; ArtifactError for files
        that are damaged, or that say nothing without the training that wrote them.
    """
    check_adapter_files(folder)
    own, method = _fields(config), _method(config)
    stored = json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    if (theirs := str(stored["peft_type"]).lower()) != method:
        raise RecipeError(
            f"expected {theirs}, the method of the adapter in {folder}; found {method}", key="adapter.method"
        )
    spec = METHODS[method]
    if str(stored.get("init_lora_weights")).startswith(_LOST_BASE):
        raise ArtifactError(
            f"the adapter in {folder} belongs to weights that {stored['init_lora_weights']} changed by rows of its training, and "
            "its files do not have them; convert it to a plain LoRA first",
            key="adapter.start",
        )
    if spec.files_lack and not (folder / WEIGHTS_FILE).is_file():
        raise ArtifactError(
            f"the files of {spec.label} in {folder} are for inference: {spec.files_lack}; name a checkpoint, such as "
            "RUN/checkpoints/step-00000100, which run.save_every writes",
            key="adapter.start",
        )
    if not spec.own_options:
        from peft import PeftConfig

        stored = PeftConfig.from_pretrained(str(folder)).to_dict()
    wrong = {
        _key(spec, name): (stored[name], value)
        for name, value in own.items()
        if name in stored and _counts(name, method) and _plain(name, stored[name]) != _plain(name, value)
    }
    if wrong:
        found = "; ".join(f"{key}: expected {expected}, found {value}" for key, (expected, value) in wrong.items())
        raise RecipeError(
            f"the adapter in {folder} is not the one that this recipe describes: {found}; leave these keys out",
            key=next(iter(wrong)),
        )


def continue_from(model: Any, folder: Path) -> None:
    """Gives the adapter of ``model``, which has just been injected, the weights of the saved one in ``folder``: an adapter's files,
    or a checkpoint. Raises: ArtifactError if their tensors differ in names or shapes."""
    if (folder / WEIGHTS_FILE).is_file():
        load_values(model, folder)
        return
    from safetensors.torch import load_file

    stored, own = load_file(str(folder / ADAPTER_FILES[1])), state_of(model)
    if problem := _difference(model, own, stored):
        raise ArtifactError(
            f"the adapter in {folder} has other tensors than this recipe: {problem}", key="adapter.start"
        )
    load_tensors(model, stored)
    for name, value in state_of(model).items():
        if not torch.equal(value.detach().cpu(), stored[name].to(value.dtype)):
            raise ArtifactError(
                f"training cannot go on from the files in {folder}: {name} follows from values that they do not have; name a "
                "checkpoint of its run",
                key="adapter.start",
            )


def _difference(model: nn.Module, own: Mapping[str, Any], stored: Mapping[str, Any]) -> str | None:
    """The first difference in names or shapes; None without one."""
    absent = sorted(own.keys() - stored.keys())
    unused = unused_tensors(model, stored.keys() - own.keys())
    shapes = [n for n in own if n in stored and own[n].shape != stored[n].shape]
    if shapes:
        name = shapes[0]
        return (
            f"{name} is {list(stored[name].shape)} in the file, and {list(own[name].shape)} here ({len(shapes)} differ)"
        )
    if absent:
        return f"{len(absent)} are missing in the file, such as {absent[0]} (adapter.targets, modules_to_save)"
    if unused:
        return f"{len(unused)} of the file have no place here, such as {unused[0]} (adapter.targets, modules_to_save)"
    return None


def _fields(config: Any) -> dict[str, Any]:
    return dict(config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config))


def _method(config: Any) -> str:
    return method_of(config) if hasattr(config, "peft_type") else "bottleneck"


def _counts(name: str, method: str) -> bool:
    """Whether a field says what the tensors of an adapter mean; AdaLoRA keeps the ranks that it has found in rank_pattern."""
    return name not in _FREE and "dropout" not in name and (method, name) != ("adalora", "rank_pattern")


def _plain(name: str, value: Any) -> Any:
    """A value to compare: an initial value counts only if it changes the base weights, or the method."""
    if name == "init_lora_weights":
        return value if changes_weights(value) or value == "loftq" else True
    if name.startswith("init_") and name != "init_r":
        return value if isinstance(value, str) else True
    if isinstance(value, set | tuple | list):
        return sorted(map(str, value))
    return value or None


def _key(spec: MethodSpec, name: str) -> str:
    ours = {theirs: ours for ours, theirs in spec.keys.items()}
    return f"adapter.{ours.get(name, name)}"
