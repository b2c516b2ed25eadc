"""Compares a changed model with the model that its config describes, as ``from_pretrained`` would build it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from peftlab.errors import RecipeError
from peftlab.models.load_errors import quiet

# Attributes with the index of a module in the stack; the cache stores keys and values under it.
_LAYER_NUMBERS = {"layer_idx", "layer_id", "layer_index", "layer_number"}
# Set from outside, not by the config.
_NOT_FROM_CONFIG = {"training", "gradient_checkpointing"}


def rebuilt(model: nn.Module, config: Any, *, key: str) -> Any:
    """A model of the class of ``model`` on the meta device, built from ``config`` as if read from a file.

    Raises: RecipeError if the class refuses the config.
    """
    try:
        plain = type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))
        plain._attn_implementation = config._attn_implementation
        with quiet(), torch.device("meta"):
            return type(model)(plain)
    except (StrictDataclassError, ValueError, KeyError, IndexError, TypeError, RuntimeError, AssertionError) as error:
        reason = str(error.__cause__ or error).strip()  # the config's message, without the wrapper's
        raise RecipeError(
            f"{type(model).__name__} cannot be built with the student's sizes: {reason}", key=key
        ) from error


def check_tensors(model: nn.Module, expected: nn.Module, *, key: str) -> None:
    """Raises RecipeError unless both have tensors of the same names and shapes."""
    has, wants = _shapes(model), _shapes(expected)
    if has == wants:
        return
    name = min(has.items() ^ wants.items())[0]
    raise RecipeError(
        f"{type(model).__name__} with the student's sizes has {_tensor(name, wants)}, but the cut has {_tensor(name, has)}: "
        "this architecture does not allow this cut",
        key=key,
    )


def check_layers(model: nn.Module, expected: nn.Module, stack: str, kept: Sequence[int], *, key: str) -> None:
    """Raises RecipeError unless the layers in ``model`` match its config, apart from their layer numbers.

    A layer can depend on its position: only T5's first layer has the position bias, ModernBERT's first layer has no norm
    before its attention, GPT-2 may scale by depth. Such a layer cannot move in a plain checkpoint.

    Args:
        stack: path of the list of layers. kept: the number of each layer in the source.
    """
    for new, old in enumerate(kept):
        problem = _difference(model.get_submodule(f"{stack}.{new}"), expected.get_submodule(f"{stack}.{new}"))
        if problem:
            has, wants = problem
            raise RecipeError(
                f"layer {old} of {type(model).__name__} has {has} and cannot become layer {new} of the student, which needs "
                f"{wants}: keep the teacher's layer {new} as well, or choose other layers",
                key=key,
            )
    check_tensors(model, expected, key=key)


def same_but_for_their_number(layers: nn.ModuleList) -> bool:
    """Whether any of ``layers`` could replace any other."""
    return all(_difference(layer, layers[0]) is None for layer in layers)


def _difference(layer: nn.Module, wanted: nn.Module) -> tuple[str, str] | None:
    """The first difference as text: what ``layer`` has, and what ``wanted`` has."""
    has, wants = _shapes(layer), _shapes(wanted)
    if has != wants:
        name = min(has.items() ^ wants.items())[0]
        return _tensor(name, has), _tensor(name, wants)
    for path, attribute, value, target in _differences(layer, wanted):
        if attribute not in _LAYER_NUMBERS:
            return f"{path}.{attribute} = {value!r}".lstrip("."), f"{target!r}"
    return None


def adopt_sizes(model: nn.Module, expected: nn.Module) -> None:
    """Copies plain attributes (numbers and sizes) from the modules of ``expected`` to those of ``model``."""
    for path, name, _, value in list(_differences(model, expected)):
        setattr(model.get_submodule(path), name, copy.copy(value))


def _differences(model: nn.Module, expected: nn.Module) -> Iterator[tuple[str, str, Any, Any]]:
    """(module, attribute, value, expected value) of the plain attributes of both modules."""
    others = dict(expected.named_modules())
    for path, module in model.named_modules():
        if path not in others:
            continue
        wanted = vars(others[path])
        for name, value in vars(module).items():
            if name.startswith("_") or name in _NOT_FROM_CONFIG or name not in wanted:
                continue
            if isinstance(value, int | float | str | tuple | None) and value != wanted[name]:
                yield path, name, value, wanted[name]


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _tensor(name: str, shapes: dict[str, tuple[int, ...]]) -> str:
    return f"{name} {list(shapes[name])}" if name in shapes else f"no {name}"
