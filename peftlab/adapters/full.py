"""Training a model's own weights without an adapter, and the files of what is trained, adapter or weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftlab.adapters.adapter_files import ADAPTER_FILES, check_adapter_files, load_adapter_weights, save_adapter
from peftlab.adapters.inject import AdapterReport
from peftlab.adapters.state import saved_buffers
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


def trained_files(model: Any) -> tuple[str, ...]:
    """Names of the files that ``save_trained`` writes."""
    return ADAPTER_FILES if _is_adapted(model) else (WEIGHTS_FILE,)


def save_trained(model: Any, folder: Path) -> None:
    """Writes the trained part of ``model``: its adapter in PEFT's format, or else its trained weights and buffers by name."""
    if _is_adapted(model):
        save_adapter(model, folder)
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


def _is_adapted(model: Any) -> bool:
    return hasattr(model, "peft_config")
