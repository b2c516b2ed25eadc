"""Writes and loads adapters in PEFT's format, and checks that they are complete and fit the model."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.adapters.beside import (
    beside,
    folders_beside,
    keep_bottlenecks,
    load_beside,
    load_tensors_beside,
    refuse_beside,
    save_beside,
    tensors_of_main,
)
from peftlab.adapters.initial import as_plain_lora
from peftlab.adapters.mixture import after_mixing, before_mixing, is_mixture, mixture_state, save_mixed, saved_places
from peftlab.adapters.state import method_of
from peftlab.errors import ArtifactError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def save_adapter(model: Any, folder: Path, *, to_go_on: bool = False) -> None:
    """Writes the adapter in PEFT's own format: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args: to_go_on: write the values that training goes on with, even if they fit only weights that the adapter changed.

    PEFT writes lists from sets, whose order changes between processes; they are sorted, so equal runs give equal files.
    """
    live = model.peft_config["default"]
    ranks = getattr(live, "rank_pattern", None)
    model.save_pretrained(
        str(folder),
        safe_serialization=True,
        **({"state_dict": tensors_of_main(model, model.state_dict())} if beside(model) else {}),
        selected_adapters=["default"],  # a teacher's adapter may be loaded too
        save_embedding_layers=False,  # a trained matrix is in the adapter already, and the base has the others
    )
    if ranks is not None:
        live.rank_pattern = ranks  # PEFT renames AdaLoRA's for the file, also in the model that goes on
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    changes = {} if to_go_on else _save_as_plain(model, folder / ADAPTER_FILES[1])
    if is_mixture(model):
        _write_tensors(mixture_state(model), folder / ADAPTER_FILES[1])
        changes = {} if to_go_on else save_mixed(model, folder)
    sort_config(folder / "adapter_config.json", changes)
    for path in save_beside(model, folder):
        sort_config(path)


def sort_config(path: Path, changes: Mapping[str, Any] | None = None) -> None:
    """Sorts the keys and the lists of names in an adapter's config, with ``changes`` in it, so that equal adapters have equal
    files."""
    config = {**json.loads(path.read_text()), **(changes or {})}
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _save_as_plain(model: Any, path: Path) -> dict[str, Any]:
    """Writes an adapter that changed the base weights as one for the weights as they were; returns the changes of its config."""
    from safetensors.torch import load_file

    if not getattr(model, "first_factors", None):
        return {}
    state, changes = as_plain_lora(model, load_file(str(path)))
    _write_tensors(state, path)
    return changes


def _write_tensors(state: Mapping[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    values = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(values, str(path), metadata={"format": "pt"})


def load_adapter(model: nn.Module, folder: Path, *, trainable: bool = False, kernels: str = "auto") -> Any:
    """``model`` with a saved adapter, after checking that every tensor was used; ``kernels`` as in ``inject``.

    Raises: ArtifactError if files are missing, damaged, or made for another model.
    """
    from peft import LoraConfig, PeftConfig, PeftModel
    from safetensors import SafetensorError

    from peftlab.adapters import fused

    check_adapter_files(folder)
    if _is_bottleneck(folder):
        from peftlab.adapters.bottleneck import load_bottlenecks

        return load_bottlenecks(model, folder, trainable=trainable)
    config = PeftConfig.from_pretrained(str(folder))
    if isinstance(config, LoraConfig):
        fused.register(config)
    if is_mixture(config):
        config.adapters = saved_places(folder) or config.adapters
        if absent := [place for place in config.adapters.values() if not Path(place).is_dir()]:
            raise ArtifactError(f"{folder} mixes adapters that are missing: {', '.join(absent)}; put them back")
        before_mixing(model)
    bottlenecks = next((path for path in folders_beside(folder) if _is_bottleneck(path)), None)
    if bottlenecks is not None:  # found in the model's own blocks, which the main adapter would change
        from peftlab.adapters.bottleneck import load_bottlenecks

        stored = load_bottlenecks(model, bottlenecks, trainable=trainable).peft_config["default"]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            warnings.filterwarnings("ignore", message="Unsupported layer type")  # norms, whose sizes PEFT asks
            peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, config=config)
    except SafetensorError as error:
        raise ArtifactError(f"{folder / ADAPTER_FILES[1]} is damaged: {error}; restore it from a checkpoint") from error
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        missing = str(error.args[0]) if isinstance(error, KeyError) and error.args else None
        raise ArtifactError(_unfit(model, folder, str(error), missing=missing)) from error
    if is_mixture(config):
        after_mixing(peft_model, [Path(place).name for place in config.adapters.values()])
    if bottlenecks is not None:
        keep_bottlenecks(peft_model, stored)
    _check_complete(peft_model, folder, model)
    _check_values(peft_model, folder)
    load_beside(peft_model, folder, trainable=trainable)
    fused.set_kernels(peft_model, kernels)
    return peft_model


def add_adapter(model: Any, folder: Path, *, name: str) -> None:
    """Loads a saved adapter next to the one that ``model`` trains, frozen and not active.

    Raises: ArtifactError if files are missing, damaged, or made for another model.
    """
    check_adapter_files(folder)
    refuse_beside(folder, "they cannot be loaded next to another adapter")
    active = model.active_adapter
    try:
        result = model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
    except ArtifactError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        raise ArtifactError(_unfit(model.get_base_model(), folder, str(error))) from error
    if lost := _unread(result):
        raise _lost(folder, lost, model)
    model.set_adapter(active)
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name:
            parameter.requires_grad_(False)


def load_adapter_weights(model: Any, folder: Path) -> None:
    """Loads saved adapter tensors into a model with the same adapter. Raises: RuntimeError for another adapter."""
    from safetensors.torch import load_file

    stored = load_file(str(folder / "adapter_model.safetensors"))
    if stored.keys() != state_of(model).keys():
        raise RuntimeError("other tensors")
    load_tensors(model, stored)
    for path in folders_beside(folder):
        load_tensors_beside(model, path.name, load_file(str(path / "adapter_model.safetensors")))


def state_of(model: Any) -> dict[str, Any]:
    """The tensors of an adapter by their names in its file."""
    from peft import get_peft_model_state_dict

    from peftlab.adapters.bottleneck import BottleneckModel, bottleneck_state

    if isinstance(model, BottleneckModel):
        return bottleneck_state(model)
    if is_mixture(model):
        return mixture_state(model)
    return tensors_of_main(model, get_peft_model_state_dict(model, save_embedding_layers=False))


def load_tensors(model: Any, stored: dict[str, Any]) -> None:
    """Copies the tensors of an adapter's file into a model with the same adapter. Raises: RuntimeError for another adapter."""
    from peft import set_peft_model_state_dict

    from peftlab.adapters.bottleneck import BottleneckModel, load_bottleneck_state

    if isinstance(model, BottleneckModel):
        load_bottleneck_state(model, stored)
        return
    result: Any = set_peft_model_state_dict(model, stored)
    if lost := _unread(result):
        raise RuntimeError(f"unread tensors, such as {lost[0]}")


def _unread(result: Any) -> list[str]:
    """Names of the LoRA tensors that PEFT has not read; a module that is trained in full it reads under another name too."""
    return [name for name in getattr(result, "unexpected_keys", ()) if ".lora_" in name]


def lost_tensors(model: Any) -> list[str]:
    """Names of the tensors of an adapter's file that PEFT would not read into ``model``, whose adapter it is; may be on the
    meta device. PEFT (0.21) renames tensors by the patterns that transformers has for old checkpoints of a family."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    if method_of(model.peft_config["default"]) != "lora":  # it renames those of LoRA only
        return []
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
        result: Any = set_peft_model_state_dict(model, state)
    return [name for name in result.missing_keys if ".lora_" in name] if result.unexpected_keys else []


def check_adapter_files(folder: Path) -> None:
    """Raises ArtifactError unless ``folder`` contains a readable adapter in safetensors format, and so do those beside it."""
    from safetensors import SafetensorError, safe_open

    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            pickled = (folder / "adapter_model.bin").exists()
            problem = (
                "found adapter_model.bin, a pickle, which can run code when loaded" if pickled else "it is missing"
            )
            raise ArtifactError(f"expected {folder / name}; {problem}")
    try:
        config = json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
        if not isinstance(config, dict) or "peft_type" not in config:
            raise ValueError("it has no peft_type")
    except ValueError as error:
        raise ArtifactError(f"{folder / ADAPTER_FILES[0]} is damaged: {error}; restore it from a checkpoint") from error
    try:
        with safe_open(str(folder / ADAPTER_FILES[1]), framework="pt") as tensors:
            names = list(tensors.keys())
    except SafetensorError as error:
        raise ArtifactError(f"{folder / ADAPTER_FILES[1]} is damaged: {error}; restore it from a checkpoint") from error
    if not names:
        raise ArtifactError(f"{folder / ADAPTER_FILES[1]} contains no tensors")
    for path in folders_beside(folder):
        check_adapter_files(path)


def brought_parameters(folder: Path) -> set[str]:
    """Names, in the base model, of the parameters that an adapter's files contain in full, such as a task head."""
    from safetensors import safe_open

    with safe_open(str(folder / ADAPTER_FILES[1]), framework="pt") as tensors:
        return {name.removeprefix("base_model.model.") for name in tensors.keys()}  # noqa: SIM118  (no mapping)


def _is_bottleneck(folder: Path) -> bool:
    """Whether checked files contain an adapter of ours that PEFT does not know."""
    return bool(json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8"))["peft_type"] == "BOTTLENECK")


def _unfit(model: Any, folder: Path, error: str, *, missing: str | None = None) -> str:
    """The message for an adapter that PEFT cannot load into ``model``. Args: missing: a tensor that PEFT did not find."""
    from safetensors import safe_open

    if missing is not None:
        return (
            f"{folder / ADAPTER_FILES[1]} has no tensor {missing!r}, which {_name(model)} needs; it is damaged, or was made "
            f"for another model ({made_for(folder) or 'unknown'})"
        )
    unfit = {_plain(name) for name in re.findall(r"size mismatch for (\S+):", error)}
    rows = [m.weight for m in _vocabulary_modules(model)]
    with safe_open(str(folder / ADAPTER_FILES[1]), framework="pt") as tensors:
        stored = [(name, tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118  (no mapping)
    for name, shape in stored:
        wide = [w for w in rows if len(shape) == 2 and w.shape[1] == shape[1] and ".lora_" not in name]
        if wide and all(len(w) != shape[0] for w in wide) and _plain(name) in unfit:
            return (
                f"the adapter in {folder} was trained with a vocabulary of {shape[0]:,} rows ({_plain(name)}), and "
                f"{_name(model)} has {len(wide[0]):,}; resize it: model.resize_token_embeddings={shape[0]}"
            )
    lines = error.strip().splitlines()
    detail = next((line.strip() for line in lines if "size mismatch" in line), lines[0] if lines else "")
    return f"the adapter in {folder} was made for another model ({made_for(folder) or 'unknown'}), not for {_name(model)}: {detail}"


def _vocabulary_modules(model: Any) -> list[Any]:
    """The input embeddings and the output head, without wrappers of PEFT."""
    try:
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (NotImplementedError, AttributeError):
        return []
    plain = [getattr(m, "original_module", getattr(m, "base_layer", m)) for m in ends if m is not None]
    return [m for m in plain if hasattr(m, "weight")]


def _check_complete(model: Any, folder: Path, base: nn.Module) -> None:
    """Raises ArtifactError for parts of the adapter without tensors, and for tensors that PEFT did not use: it only warns, but
    they mean another model. Matrices of the base itself, such as resized embeddings, are loaded and are no fault."""
    from safetensors import safe_open

    with safe_open(str(folder / ADAPTER_FILES[1]), framework="pt") as tensors:
        saved = set(tensors.keys())
    expected = set(state_of(model))
    if odd := sorted((expected - saved) | set(unused_tensors(model, saved - expected))):
        side = "in the file but not in the model" if odd[0] in saved else "in the model but not in the file"
        raise ArtifactError(
            f"the adapter in {folder} was made for another model ({made_for(folder) or 'unknown'}), not for {_name(base)}: "
            f"{len(odd)} tensors do not match, such as {odd[0]} ({side})"
        )


def _check_values(model: Any, folder: Path) -> None:
    """Raises ArtifactError unless the adapter has the values in its file: PEFT passes over names that it has renamed."""
    from safetensors import safe_open

    now = state_of(model)
    with safe_open(str(folder / ADAPTER_FILES[1]), framework="pt") as tensors:
        saved = now.keys() & set(tensors.keys())
        lost = [name for name in sorted(saved) if not _same_values(now[name], tensors.get_tensor(name))]
    if lost:
        raise _lost(folder, lost, model)


def _same_values(value: Tensor, stored: Tensor) -> bool:
    return value.shape == stored.shape and torch.equal(value.detach().cpu(), stored.to(value.dtype))


def _lost(folder: Path, names: Sequence[str], model: Any) -> ArtifactError:
    return ArtifactError(
        f"PEFT opens the adapter in {folder} without {len(names)} of its tensors, such as {names[0]}, in "
        f"{type(model.get_base_model()).__name__}; train with other adapter.targets"
    )


def unused_tensors(model: Any, names: Collection[str]) -> list[str]:
    """Those ``names`` of tensors in a file, beside the adapter's own, that are no matrices of the base either; sorted."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(model.peft_config["default"].peft_type, "lora_")
    modules = {_plain(f"{name}.") for name, _ in model.named_modules()}
    return sorted(n for n in names if f".{prefix}" in n or _plain(f"{n.rpartition('.')[0]}.") not in modules)


def _plain(name: str) -> str:
    """A name without the parts that PEFT's wrappers add."""
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join(p for p in parts if p not in ("modules_to_save", "default", "original_module", "base_layer"))


def made_for(folder: Path) -> str | None:
    """The base model that an adapter's config names; None if it names none."""
    return json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8")).get("base_model_name_or_path") or None


def _name(model: nn.Module) -> str:
    return str(getattr(model, "name_or_path", "") or type(model).__name__)
