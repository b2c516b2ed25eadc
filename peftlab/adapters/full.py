"""Training a model's own weights without an adapter, and the files of what is trained, adapter or weights: those that inference
needs, and those that training needs to go on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftlab.adapters.adapter_files import ADAPTER_FILES, check_adapter_files, load_adapter_weights, save_adapter
from peftlab.adapters.beside import beside
from peftlab.adapters.inject import AdapterReport
from peftlab.adapters.schedule import load_schedule_state, schedule_state
from peftlab.adapters.state import method_of, saved_buffers
from peftlab.adapters.target_modules import match_ending
from peftlab.errors import ArtifactError, RecipeError

WEIGHTS_FILE = "trained.safetensors"


def train_all(model: nn.Module, *, freeze: Sequence[str] = ()) -> AdapterReport:
    """Makes every floating-point weight of ``model`` trainable except those of the modules in ``freeze``; the report counts
    both.

    Args: freeze: module name endings, such as ``embeddings``.
    Raises: RecipeError if a name matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_modules() if name]
    for ending in freeze:
        match_ending(ending, names, "adapter.freeze")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    kinds: dict[str, int] = {}
    for name, module in model.named_modules():
        if any(name == ending or name.endswith("." + ending) for ending in freeze):
            module.requires_grad_(False)
    for module in model.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            kinds[type(module).__name__] = kinds.get(type(module).__name__, 0) + 1
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trained:
        raise RecipeError("every weight is frozen, so nothing would be trained", key="adapter.freeze")
    return AdapterReport(sum(kinds.values()), trained, sum(p.numel() for p in model.parameters()), kinds)


def state_files(model: Any) -> tuple[str, ...]:
    """Names of the files that ``save_state`` writes."""
    if not _is_adapted(model):
        return (WEIGHTS_FILE,)
    return ADAPTER_FILES if _is_whole(model) else (*ADAPTER_FILES, WEIGHTS_FILE)


def save_state(model: Any, folder: Path) -> None:
    """Writes what training needs to go on: the files of ``save_trained``, and all values by name where PEFT's files contain only
    what inference needs, such as the rows that a small network gave, but not the network."""
    from safetensors.torch import save_file

    save_trained(model, folder, to_go_on=True)
    if _is_adapted(model) and not _is_whole(model):
        state = {f"value/{n}": t for n, t in _adapter_values(model).items()}
        state |= {f"schedule/{n}": t for n, t in schedule_state(model).items()}
        frozen = [n for n, p in model.named_parameters() if n in _adapter_values(model) and not p.requires_grad]
        metadata = {"format": "pt", "frozen": json.dumps(frozen)}
        tensors = {n: t.detach().cpu().contiguous().clone() for n, t in state.items()}
        save_file(tensors, str(folder / WEIGHTS_FILE), metadata=metadata)


def load_state(model: Any, folder: Path) -> None:
    """Loads the files of ``save_state`` into a model that trains the same weights. Raises: ArtifactError if it does not."""
    if not _is_adapted(model) or _is_whole(model):
        load_trained(model, folder)
        return
    values, frozen, schedule = _read_values(model, folder)
    for name, value in _adapter_values(model).items():
        value.data.copy_(values[name])
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.requires_grad_(name not in frozen)
    load_schedule_state(model, schedule)


def load_values(model: Any, folder: Path) -> None:
    """Loads the values of the adapter in a checkpoint of a method that PEFT's files do not resume, and nothing of its schedule.
    Raises: ArtifactError if the checkpoint is of another adapter."""
    values, _, _ = _read_values(model, folder)
    for name, value in _adapter_values(model).items():
        value.data.copy_(values[name])


def _read_values(model: Any, folder: Path) -> tuple[dict[str, Tensor], set[str], dict[str, Tensor]]:
    """The values by name, the names of frozen parameters, and the state of the schedule."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(folder / WEIGHTS_FILE), framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            frozen = set(json.loads((file.metadata() or {})["frozen"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"{folder / WEIGHTS_FILE} cannot be read: {error}") from error
    values = {n.removeprefix("value/"): t for n, t in stored.items() if n.startswith("value/")}
    own = _adapter_values(model)
    if {n: t.shape for n, t in values.items()} != {n: t.shape for n, t in own.items()}:
        raise ArtifactError(f"{folder} belongs to a run with another adapter; start a new run")
    return values, frozen, {n.removeprefix("schedule/"): t for n, t in stored.items() if n.startswith("schedule/")}


def save_trained(model: Any, folder: Path, *, to_go_on: bool = False) -> None:
    """Writes the trained part of ``model``: its adapter in PEFT's format, or else its trained weights and buffers by name.

    Args: to_go_on: see ``save_adapter``.
    """
    if _is_adapted(model):
        save_adapter(model, folder, to_go_on=to_go_on)
        return
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in _trained_state(model).items()}
    save_file(weights, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})


def load_trained(model: Any, folder: Path) -> None:
    """Loads the files of ``save_trained`` into a model that trains the same weights. Raises: ArtifactError if it does not."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if _is_adapted(model):
        check_adapter_files(folder)
        try:
            load_adapter_weights(model, folder)
        except RuntimeError as error:
            raise ArtifactError(f"{folder} belongs to a run with another adapter; start a new run") from error
        return
    try:
        stored = load_file(str(folder / WEIGHTS_FILE))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{folder / WEIGHTS_FILE} cannot be read: {error}") from error
    trained = _trained_state(model)
    if {n: t.shape for n, t in stored.items()} != {n: p.shape for n, p in trained.items()}:
        raise ArtifactError(f"{folder} belongs to a run with other trained weights; start a new run")
    for name, value in trained.items():
        value.data.copy_(stored[name])


def _trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights, and the buffers that training may change, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | saved_buffers(model)


def _adapter_values(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, those of the adapter that its method froze for now, and the adapter's buffers, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad or _is_own(n, layers)}
    return parameters | {n: b for n, b in saved_buffers(model).items() if _is_own(n, layers)}


def _is_own(name: str, layers: tuple[str, ...]) -> bool:
    """Whether a value belongs to an adapter's layer, and not to the layer that it adapts."""
    return name.startswith(layers) and ".base_layer." not in name and ".original_module." not in name


def _is_whole(model: Any) -> bool:
    """Whether PEFT's files contain all that training changes."""
    return method_of(model.peft_config["default"]) == "lora" and not beside(model)


def _is_adapted(model: Any) -> bool:
    return hasattr(model, "peft_config")
