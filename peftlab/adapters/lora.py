"""LoRA through PEFT: plain values in, an injected model and a report of what is trained out."""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from peftlab.errors import ArtifactError, RecipeError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class AdapterReport:
    """What is adapted and how much is trained (counts of parameters and of modules)."""

    num_modules: int
    num_trained: int
    num_total: int
    kinds: dict[str, int]

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} x{count}" for name, count in sorted(self.kinds.items()))
        share = 100 * self.num_trained / self.num_total
        return f"{self.num_trained:,} of {self.num_total:,} parameters trained ({share:.2f} %) in {self.num_modules} modules: {kinds}"


def add_lora(
    model: nn.Module,
    *,
    peft_type: str | None,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    rslora: bool = False,
    dora: bool = False,
    bias: str = "none",
    modules_to_save: Sequence[str] = (),
    kernels: str = "auto",
) -> Any:
    """The model with LoRA injected by PEFT (a ``PeftModel``), only the adapter requiring gradients.

    Args:
        peft_type: PEFT task type, such as ``CAUSAL_LM``; None where PEFT knows none: the modules outside the body are the
            head then, which is trained in full, as PEFT does with the head of a sequence classifier.
        targets: ``all-linear``, module name endings, or one regular expression over full module names.
        kernels: auto, triton or reference; see ``fused.set_kernels``.
    Raises: RecipeError when a target or a module to save matches nothing.
    """
    from peft import LoraConfig, get_peft_model

    from peftlab.adapters import fused

    check_targets(model, targets)
    check_modules_to_save(model, modules_to_save)
    head = _head(model) if peft_type is None else []
    config = LoraConfig(
        task_type=peft_type,
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=rslora,
        use_dora=dora,
        bias=bias,
        modules_to_save=[*head, *(m for m in modules_to_save if m not in head)] or None,
        exclude_modules=_inside(head),
    )
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5 for an attribute under its old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        peft_model = get_peft_model(model, fused.register(config))
    fused.set_kernels(peft_model, kernels)
    return peft_model


def _head(model: nn.Module) -> list[str]:
    """Names of the modules with weights beside the body of a transformers model."""
    body: Any = model.base_model
    return [n for n, child in model.named_children() if child is not body and any(True for _ in child.parameters())]


def _inside(modules: Sequence[str]) -> str | None:
    """A regular expression for the names of ``modules`` and of all in them; None without any."""
    return rf"({'|'.join(map(re.escape, modules))})(\..*)?" if modules else None


def planned_modules(model: nn.Module, *, peft_type: str | None, targets: str | Sequence[str]) -> list[str]:
    """Full names of the modules of a model without adapters that ``targets`` stands for, by PEFT's own rules."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    config = LoraConfig(
        task_type=peft_type,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=_inside(_head(model)) if peft_type is None else None,
    )
    config = _maybe_include_all_linear_layers(config, model)
    return [
        name
        for name, module in model.named_modules()
        if _adaptable(module) and check_target_module_exists(config, name)
    ]


def report(model: Any) -> AdapterReport:
    """Counts over an injected model. Raises: RecipeError when nothing is trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    kinds: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            kinds[name.rsplit(".", 1)[-1]] = kinds.get(name.rsplit(".", 1)[-1], 0) + 1
    trained, total = model.get_nb_trainable_parameters()
    if not trained or not kinds:
        raise RecipeError("no module was adapted, so nothing would be trained", key="adapter.targets")
    return AdapterReport(sum(kinds.values()), trained, total, kinds)


def check_targets(model: nn.Module, targets: str | Sequence[str]) -> None:
    """Raises RecipeError for the first target that no adaptable module answers to, with the nearest names."""
    names = [name for name, module in model.named_modules() if _adaptable(module)]
    if targets == "all-linear":
        return
    if isinstance(targets, str):
        if not any(re.fullmatch(targets, name) for name in names):
            raise RecipeError(
                f"the regular expression {targets!r} matches none of the {len(names)} adaptable modules, such as "
                f"{names[len(names) // 2]!r} (the whole name has to match)",
                key="adapter.targets",
            )
        for name, module in model.named_modules():
            if re.fullmatch(targets, name) and not _adaptable(module):
                raise RecipeError(
                    f"the regular expression {targets!r} also matches {name!r}, a {type(module).__name__}, which takes no "
                    r"adapter; let it end in the names of linear layers, such as (q_proj|v_proj)",
                    key="adapter.targets",
                )
        return
    for target in targets:
        match_ending(target, names, "adapter.targets")


def check_modules_to_save(model: nn.Module, modules: Sequence[str]) -> None:
    """Raises RecipeError for the first of ``modules`` that names no module."""
    names = [name for name, _ in model.named_modules() if name]
    for target in modules:
        match_ending(target, names, "adapter.modules_to_save")


def match_ending(target: str, names: list[str], key: str) -> None:
    """Raises RecipeError where ``target`` is the end of none of the module ``names``."""
    if any(name == target or name.endswith("." + target) for name in names):
        return
    endings = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
    near = difflib.get_close_matches(target, endings, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RecipeError(f"{target!r} matches no module; {hint}(this model has {', '.join(endings)})", key=key)


def _adaptable(module: nn.Module) -> bool:
    # Quantized linears subclass nn.Linear; GPT-2's Conv1D does not.
    return isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d) or type(module).__name__ == "Conv1D"


def save_adapter(model: Any, folder: Path) -> None:
    """Writes the adapter in PEFT's own format: ``adapter_config.json`` and ``adapter_model.safetensors``.

    PEFT writes its lists from sets, whose order changes between processes; sorted, equal runs give equal files.
    """
    model.save_pretrained(
        str(folder),
        safe_serialization=True,
        selected_adapters=["default"],  # a teacher's adapter may be loaded beside it
        save_embedding_layers=_trains_embeddings(model),
    )
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _trains_embeddings(model: Any) -> bool:
    config = model.peft_config["default"]
    named = [*(config.target_modules or []), *(config.modules_to_save or [])]
    return any(str(name).endswith(("embed_tokens", "lm_head", "wte", "word_embeddings")) for name in named)


def load_adapter(model: nn.Module, folder: Path, *, trainable: bool = False, kernels: str = "auto") -> Any:
    """``model`` with a saved adapter, every tensor of which was used; ``kernels`` as in ``add_lora``.

    Raises: ArtifactError when files are missing, damaged, or made for another model.
    """
    from peft import LoraConfig, PeftConfig, PeftModel
    from safetensors import SafetensorError

    from peftlab.adapters import fused

    check_adapter_files(folder)
    config = PeftConfig.from_pretrained(str(folder))
    if isinstance(config, LoraConfig):
        fused.register(config)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, config=config)
    except SafetensorError as error:
        raise ArtifactError(f"{folder / ADAPTER_FILES[1]} is damaged: {error}; restore it from a checkpoint") from error
    except (RuntimeError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()
        detail = next((line.strip() for line in first if "size mismatch" in line), first[0] if first else "")
        raise ArtifactError(
            f"the adapter in {folder} was made for another model ({_made_for(folder)}), not for {_name(model)}: {detail}"
        ) from error
    _check_complete(peft_model, folder, model)
    fused.set_kernels(peft_model, kernels)
    return peft_model


def add_adapter(model: Any, folder: Path, *, name: str) -> None:
    """Loads a saved adapter beside the one that ``model`` trains, frozen and not active.

    Raises: ArtifactError when files are missing, damaged, or made for another model.
    """
    check_adapter_files(folder)
    active = model.active_adapter
    try:
        model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"the adapter in {folder} was made for another model ({_made_for(folder)}), not for {_name(model.get_base_model())}: {error}"
        ) from error
    model.set_adapter(active)
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name:
            parameter.requires_grad_(False)


def load_adapter_weights(model: Any, folder: Path) -> None:
    """Puts saved adapter tensors into a model that carries the same adapter."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(str(folder / "adapter_model.safetensors")))


def check_adapter_files(folder: Path) -> None:
    """Raises ArtifactError when ``folder`` does not hold a readable adapter in safetensors format."""
    from safetensors import SafetensorError, safe_open

    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            pickled = (folder / "adapter_model.bin").exists()
            found = "found adapter_model.bin, a pickle, which can run code when loaded" if pickled else "it is missing"
            raise ArtifactError(f"expected {folder / name}; {found}")
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
        raise ArtifactError(f"{folder / ADAPTER_FILES[1]} holds no tensors")


def brought_parameters(folder: Path) -> set[str]:
    """Names, in the model without it, of the parameters that an adapter's files hold as a whole, such as a task head."""
    from safetensors import safe_open

    with safe_open(str(folder / ADAPTER_FILES[1]), framework="pt") as tensors:
        return {name.removeprefix("base_model.model.") for name in tensors.keys()}  # noqa: SIM118  (no mapping)


def _check_complete(model: Any, folder: Path, base: nn.Module) -> None:
    """PEFT only warns about tensors that fit nowhere and modules that got none; both mean another model."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(str(folder / ADAPTER_FILES[1]), framework="pt") as tensors:
        saved = set(tensors.keys())
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=_trains_embeddings(model)))
    if saved != expected:
        odd = sorted(saved ^ expected)[0]
        side = "in the file but not in the model" if odd in saved else "in the model but not in the file"
        raise ArtifactError(
            f"the adapter in {folder} was made for another model ({_made_for(folder)}), not for {_name(base)}: "
            f"{len(saved ^ expected)} tensors do not match, such as {odd} ({side})"
        )


def _made_for(folder: Path) -> str:
    return str(json.loads((folder / ADAPTER_FILES[0]).read_text()).get("base_model_name_or_path") or "unknown")


def _name(model: nn.Module) -> str:
    return str(getattr(model, "name_or_path", "") or type(model).__name__)
