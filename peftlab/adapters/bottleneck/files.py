"""Writes and loads bottlenecks: PEFT's two files, with tensors named as PEFT names those of its own adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.adapters.adapter_files import ADAPTER_FILES, check_adapter_files
from peftlab.adapters.bottleneck.config import BottleneckConfig
from peftlab.adapters.bottleneck.layer import BottleneckLayer
from peftlab.adapters.bottleneck.model import BottleneckModel, BottleneckType, StoredConfig
from peftlab.errors import ArtifactError, RecipeError, listed

_SETTINGS = tuple(BottleneckConfig.__dataclass_fields__)


def bottleneck_state(model: BottleneckModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """The tensors of an adapter by their names in its file, detached: its bottlenecks and the modules trained in full."""
    from peft.utils import ModulesToSaveWrapper

    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, BottleneckLayer) and adapter_name in module.bottleneck:
            own = module.bottleneck[adapter_name].state_dict()
            state |= {f"{name}.bottleneck.{key}": value for key, value in own.items()}
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            own = module.modules_to_save[adapter_name].state_dict()
            state |= {f"{name}.{key}": value for key, value in own.items()}
    return state


def load_bottleneck_state(model: BottleneckModel, tensors: Mapping[str, Tensor], adapter_name: str = "default") -> None:
    """Copies the tensors of ``bottleneck_state`` into an adapter. Raises: RuntimeError, with nothing copied, unless names and
    shapes are equal."""
    own = bottleneck_state(model, adapter_name)
    if difference := _difference(own, tensors):
        raise RuntimeError(difference)
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


def save_bottlenecks(model: BottleneckModel, folder: Path, *, adapter_name: str = "default") -> None:
    """Writes the adapter's settings and tensors; equal adapters give equal bytes."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in bottleneck_state(model, adapter_name).items()}
    save_file(state, str(folder / ADAPTER_FILES[1]), metadata={"format": "pt"})
    write_config(model.peft_config[adapter_name], folder)


def write_config(stored: StoredConfig, folder: Path) -> None:
    """Writes the settings of an adapter."""
    settings = stored.to_dict() | {"inference_mode": True}
    (folder / ADAPTER_FILES[0]).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_bottlenecks(model: nn.Module, folder: Path, *, trainable: bool = False) -> BottleneckModel:
    """``model`` with the saved bottlenecks in it; frozen unless ``trainable``.

    Raises: ArtifactError if files are missing, damaged, of another method, or made for another model.
    """
    stored, tensors = _read(folder)
    stored.inference_mode = not trainable
    try:
        adapted = BottleneckModel(model, stored)
    except RecipeError as error:  # the recipe is the file here
        raise _unfit(model, folder, stored, str(error)) from error
    _fill(adapted, folder, stored, tensors, "default")
    return adapted


def load_next(adapted: BottleneckModel, folder: Path, adapter_name: str) -> None:
    """Adds a saved adapter to a model that has one, frozen and not active. Raises: ArtifactError; ValueError for an adapter
    at other places."""
    stored, tensors = _read(folder)
    adapted.add_adapter(adapter_name, stored)
    _fill(adapted, folder, stored, tensors, adapter_name)


def _fill(
    adapted: BottleneckModel, folder: Path, stored: StoredConfig, tensors: dict[str, Tensor], adapter_name: str
) -> None:
    try:
        load_bottleneck_state(adapted, tensors, adapter_name)
    except RuntimeError as error:
        raise _unfit(adapted.get_base_model(), folder, stored, str(error)) from error


def _read(folder: Path) -> tuple[StoredConfig, dict[str, Tensor]]:
    """The settings and the tensors of a folder. Raises: ArtifactError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_adapter_files(folder)
    path = folder / ADAPTER_FILES[0]
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if values["peft_type"] != BottleneckType.BOTTLENECK.value:
        raise ArtifactError(f"expected an adapter of BOTTLENECK in {folder}, found one of {values['peft_type']}")
    if absent := [name for name in _SETTINGS if name not in values]:
        raise ArtifactError(f"{path} is damaged: it lacks {listed(absent)}; restore it from a checkpoint")
    try:
        config = BottleneckConfig(**{name: values[name] for name in _SETTINGS})
    except RecipeError as error:
        raise ArtifactError(f"{path} is damaged: {error.key}: {error}; restore it from a checkpoint") from error
    try:
        tensors = load_file(str(folder / ADAPTER_FILES[1]))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{folder / ADAPTER_FILES[1]} is damaged: {error}; restore it from a checkpoint") from error
    stored = StoredConfig(
        config, values.get("task_type"), values.get("base_model_name_or_path"), values.get("modules_to_save")
    )
    return stored, tensors


def _difference(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str | None:
    """What differs in names or shapes; None if nothing does."""
    if odd := sorted(own.keys() ^ tensors.keys()):
        side = "in the file but not in the model" if odd[0] in tensors else "in the model but not in the file"
        return f"{len(odd)} tensors do not match, such as {odd[0]} ({side})"
    for name, value in own.items():
        if value.shape != tensors[name].shape:
            return f"{name} is {list(tensors[name].shape)} in the file and {list(value.shape)} in the model"
    return None


def _unfit(model: nn.Module, folder: Path, stored: StoredConfig, detail: str) -> ArtifactError:
    name = getattr(model, "name_or_path", "") or type(model).__name__
    return ArtifactError(
        f"the adapter in {folder} was made for another model ({stored.base_model_name_or_path or 'unknown'}), not for "
        f"{name}: {detail}"
    )
