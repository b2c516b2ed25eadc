"""Checks which modules of a model match a recipe's names, with a clear error if none does."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import torch
from torch import nn

from peftlab.errors import RecipeError
from peftlab.specs.methods import TARGET_NAMES


def check_targets(model: nn.Module, targets: str | Sequence[str], *, norms: bool = False) -> None:
    """Raises RecipeError for the first target that matches no adaptable module, with the nearest names.

    Args: norms: whether the method adapts norms, and no other layers.
    """
    fits = is_norm if norms else is_adaptable
    names = [name for name, module in model.named_modules() if fits(module)]
    if targets in TARGET_NAMES:
        return
    if isinstance(targets, str):
        if not any(re.fullmatch(targets, name) for name in names):
            raise RecipeError(
                f"the regular expression {targets!r} matches none of the {len(names)} adaptable modules, such as "
                f"{names[len(names) // 2]!r} (the whole name has to match)",
                key="adapter.targets",
            )
        for name, module in model.named_modules():
            if re.fullmatch(targets, name) and not fits(module):
                raise RecipeError(
                    f"the regular expression {targets!r} also matches {name!r}, a {type(module).__name__}, which cannot have "
                    r"an adapter; end it with the names of linear layers, such as (q_proj|v_proj)",
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
    """Raises RecipeError if no module name in ``names`` ends with ``target``."""
    if any(name == target or name.endswith("." + target) for name in names):
        return
    endings = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
    near = difflib.get_close_matches(target, endings, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RecipeError(f"{target!r} matches no module{hint} (this model has {', '.join(endings)})", key=key)


def is_adaptable(module: nn.Module) -> bool:
    """Whether PEFT can put an adapter on it."""
    # Quantized linears subclass nn.Linear; GPT-2's Conv1D does not.
    kinds = nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.MultiheadAttention
    return (isinstance(module, kinds) or type(module).__name__ == "Conv1D") and not _is_router(module)


def _is_router(module: nn.Module) -> bool:
    """Whether it is a linear layer of a model's own code that gives something else than its product, such as the router of
    Llama 4, which returns a tuple. PEFT's layers expect the product, which Falcon's own layers give."""
    own = type(module).__module__.startswith("transformers.models.")
    if not own or not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return False
    weights = {name: weight.to("meta") for name, weight in module.named_parameters()}
    inputs = torch.empty(1, module.in_features, device="meta", dtype=module.weight.dtype)
    try:
        output: object = torch.func.functional_call(module, weights, (inputs,))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return True
    return not isinstance(output, torch.Tensor) or output.shape != (1, module.out_features)


def is_convolution(module: nn.Module) -> bool:
    """Whether it is a convolution of torch."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def is_plain_convolution(module: nn.Module) -> bool:
    """Whether it is an ungrouped convolution whose output is linear in its weight: PEFT can merge its adapter. One that
    standardizes its weight first has a forward of its own."""
    own = type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    return is_convolution(module) and not is_grouped(module) and own


def is_grouped(module: nn.Module) -> bool:
    """Whether it is a grouped convolution: PEFT adapts it only at a rank that its groups divide, and cannot merge it."""
    return is_convolution(module) and bool(module.groups != 1)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer: quantized or not, or GPT-2's Conv1D."""
    return (isinstance(module, nn.Linear) and not _is_router(module)) or type(module).__name__ == "Conv1D"


def is_norm(module: nn.Module) -> bool:
    """Whether it is a normalization layer with a weight, of torch or of a model's own code."""
    return "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None
