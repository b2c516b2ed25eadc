"""Step checkpoints: everything a run needs to resume, without pickles, published by one rename.

step-00000040/
  adapter_config.json, adapter_model.safetensors    PEFT's format, with an adapter
  trained.safetensors                               without one, and for methods that PEFT's files do not resume
  optimizer.safetensors                             state of every trained parameter, by name
  rng.safetensors                                   torch generators as bytes
  state.json                                        step, best value, Python and NumPy generators, plan
  manifest.json                                     sha256 of the files above, written last
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peftlab.adapters import load_state, save_state, state_files
from peftlab.errors import ArtifactError
from peftlab.training.optimizers import restore_state, state_tensors


@dataclass(frozen=True)
class RngState:
    """The states of all random generators that a step may use."""

    torch_cpu: torch.Tensor
    torch_cuda: list[torch.Tensor]
    python: Any
    numpy: Any

    @classmethod
    def capture(cls) -> RngState:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(torch.get_rng_state(), cuda, random.getstate(), np.random.get_state())

    def restore(self) -> None:
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.torch_cuda)
        random.setstate(self.python)
        np.random.set_state(self.numpy)


def save_checkpoint(
    root: Path,
    *,
    step: int,
    model: Any,
    optimizer: torch.optim.Optimizer,
    rng: RngState,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Writes ``root/step-XXXXXXXX`` and removes all but the newest ``keep``.

    Args:
        step: number of optimizer steps done. state: JSON values of the loop (best metric, plan fingerprint, ...).
    """
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{step:08d}"
    partial = root / f".partial-{step:08d}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_state(model, partial)
        save_file(_optimizer_tensors(model, optimizer), str(partial / "optimizer.safetensors"))
        generators = {"torch_cpu": rng.torch_cpu} | {f"torch_cuda_{i}": t for i, t in enumerate(rng.torch_cuda)}
        save_file(generators, str(partial / "rng.safetensors"))
        numpy_state = [v.tolist() if isinstance(v, np.ndarray) else v for v in rng.numpy]
        document = {**state, "step": step, "rng_python": rng.python, "rng_numpy": numpy_state}
        (partial / "state.json").write_text(json.dumps(document))
        _publish(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in list_checkpoints(root)[:-keep]:
        shutil.rmtree(old)
    return final


def _publish(partial: Path, final: Path) -> None:
    """Adds hashes, syncs the files to disk and renames the folder, so that a torn save never looks like a checkpoint."""
    files = sorted(p for p in partial.rglob("*") if p.is_file())
    hashes = {p.relative_to(partial).as_posix(): _sha256(p) for p in files}
    (partial / "manifest.json").write_text(json.dumps(hashes, indent=1))
    for path in [*files, partial / "manifest.json"]:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)


def list_checkpoints(root: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return sorted(p for p in root.glob("step-*") if (p / "manifest.json").is_file())


def check_checkpoint(folder: Path, *, trained: Sequence[str] = ()) -> None:
    """Raises ArtifactError if a file of the checkpoint is missing or does not match its recorded hash.

    Args: trained: names of the files with trained weights.
    """
    earlier = [p.name for p in list_checkpoints(folder.parent) if p.name < folder.name]
    remedy = f"; remove this folder to resume from {earlier[-1]}" if earlier else "; there is no earlier checkpoint"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"checkpoint {folder} has no readable manifest.json ({error}){remedy}") from error
    expected = {*trained, "optimizer.safetensors", "rng.safetensors", "state.json"}
    if not isinstance(manifest, dict) or not expected <= set(manifest):
        raise ArtifactError(f"checkpoint {folder} has an incomplete manifest.json{remedy}")
    for name, digest in manifest.items():
        if not (folder / name).is_file():
            raise ArtifactError(f"checkpoint {folder} is damaged: {name} is missing{remedy}")
        if _sha256(folder / name) != digest:
            raise ArtifactError(f"checkpoint {folder} is damaged: {name} does not match its recorded hash{remedy}")


def load_checkpoint(folder: Path, *, model: Any, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], RngState]:
    """Loads weights and optimizer state; returns the loop's state (with ``step``) and the random generators.

    Raises: ArtifactError if the checkpoint is damaged or belongs to another model.
    """
    check_checkpoint(folder, trained=state_files(model))
    load_state(model, folder)
    _load_optimizer(model, optimizer, load_file(str(folder / "optimizer.safetensors")), folder)
    state = json.loads((folder / "state.json").read_text())
    generators = load_file(str(folder / "rng.safetensors"))
    version, words, gauss = state.pop("rng_python")
    name, keys, *rest = state.pop("rng_numpy")
    rng = RngState(
        torch_cpu=generators.pop("torch_cpu"),
        torch_cuda=[generators[f"torch_cuda_{i}"] for i in range(len(generators))],
        python=(version, tuple(words), gauss),
        numpy=(name, np.array(keys, dtype=np.uint32), *rest),
    )
    return state, rng


def _trained_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, str]:
    """Names of the parameters that the optimizer trains; a method may have frozen some of them for now."""
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    return {p: name for name, p in model.named_parameters() if p in trained}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = _trained_names(model, optimizer)
    return {
        f"{names[parameter]}/{key}": value
        for parameter in optimizer.state
        for key, value in state_tensors(optimizer, parameter).items()
    }


def _load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], folder: Path
) -> None:
    names = _trained_names(model, optimizer)
    by_parameter: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        by_parameter.setdefault(name, {})[entry] = value
    if not set(by_parameter) <= set(names.values()):
        raise ArtifactError(f"checkpoint {folder} has different trained parameters than this run; start a new run")
    for parameter, name in names.items():
        if name in by_parameter:  # else it never had a gradient
            restore_state(optimizer, parameter, by_parameter[name])


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
