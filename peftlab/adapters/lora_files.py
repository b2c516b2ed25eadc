"""Writes plain LoRA adapters from factors, with a rank per module and scaling 1."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftlab.adapters.adapter_files import ADAPTER_FILES, sort_config
from peftlab.adapters.updates import Update

# Settings of LoRA that describe another update than B A, or modules by another rule than their names.
_PLAIN: dict[str, Any] = {
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "inference_mode": True,
}


def lora_tensors(update: Update, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """The tensors of a LoRA file for one module whose update is ``left @ right`` with scaling 1. left: [N, R]. right: [R, K]."""
    if update.layout == "embedding":
        tensors = {"lora_embedding_A": left.T, "lora_embedding_B": right.T}
    elif update.layout == "conv":
        ones = (1,) * (len(update.extent) - 1)
        tensors = {
            "lora_A.weight": right.reshape(len(right), *update.extent),
            "lora_B.weight": left.reshape(*left.shape, *ones),
        }
    else:
        tensors = {"lora_A.weight": right, "lora_B.weight": left}
    return {f"{update.path}.{name}": t.float().cpu().contiguous() for name, t in tensors.items()}


def write_lora(
    folder: Path,
    tensors: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    *,
    config: Any,
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``, which plain PEFT loads.

    alpha equals the rank of each module, so its scaling is 1. Modules are named in full.

    Args:
        tensors: of ``lora_tensors``. ranks: rank by name of the module in the base model; modules of rank 0 are left out.
        config: PEFT's configuration of the source, of any method. others: tensors to keep, such as a task head.
    """
    from safetensors.torch import save_file

    kept = {name: rank for name, rank in ranks.items() if rank}
    usual = Counter(kept.values()).most_common(1)[0][0]
    pattern = {name: rank for name, rank in kept.items() if rank != usual}
    plain = _lora_config(config)
    for key, value in _PLAIN.items():
        setattr(plain, key, value)
    plain.r, plain.lora_alpha = usual, usual
    plain.rank_pattern, plain.alpha_pattern = dict(pattern), dict(pattern)
    plain.target_modules = set(kept)
    folder.mkdir(parents=True, exist_ok=True)
    plain.save_pretrained(str(folder))
    sort_config(folder / ADAPTER_FILES[0])
    everything = {**(others or {}), **tensors}
    save_file({name: everything[name] for name in sorted(everything)}, str(folder / ADAPTER_FILES[1]), {"format": "pt"})


def _lora_config(config: Any) -> Any:
    """A LoraConfig with what ``config`` says about the model, the task and what is trained in full."""
    from peft import LoraConfig

    if type(config) is LoraConfig:
        return copy.deepcopy(config)
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        modules_to_save=getattr(config, "modules_to_save", None),
    )


def other_tensors(folder: Path, method: str) -> dict[str, Tensor]:
    """What an adapter's file holds beside the tensors of its method: modules and token rows that are trained in full."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from safetensors.torch import load_file

    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(method)]
    return {name: t for name, t in load_file(str(folder / ADAPTER_FILES[1])).items() if prefix not in name}


def num_stored(folder: Path) -> int:
    """The number of parameters in an adapter's file."""
    from safetensors import safe_open

    with safe_open(str(folder / ADAPTER_FILES[1]), framework="pt") as file:
        return sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118  (no mapping)
