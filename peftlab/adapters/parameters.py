"""Bare parameters that LoRA adapts, such as the stacked weights of experts: ``adapter.target_parameters``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn

from peftlab.adapters.places import chosen_blocks_of
from peftlab.errors import RecipeError

_KEY = "adapter.target_parameters"
_MOST = 12


def planned_parameters(
    model: nn.Module,
    endings: Sequence[str] | None,
    *,
    layers: Sequence[int] | str | None = None,
    freeze: Collection[str] = (),
    **_: Any,
) -> list[str]:
    """Full names of the parameters of a model without adapters whose names end so; none for None.

    Args: layers, freeze: as for ``inject``. Raises: RecipeError for an ending that matches nothing.
    """
    matrices = [name for name, p in model.named_parameters() if _dimensions(p) in (2, 3)]
    found = []
    for ending in endings or ():
        matched = [name for name in matrices if _ends_so(name, ending)]
        if not matched:
            raise RecipeError(_unknown(model, matrices, ending), key=_KEY)
        found += matched
    if found and layers is not None:
        found = chosen_blocks_of(found, layers, model)
    return [n for n in dict.fromkeys(found) if not any(f".{ending}." in f".{n}." for ending in freeze)]


def owners(parameters: Iterable[str]) -> list[str]:
    """The modules that the parameters with these names belong to."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))


def experts_text(shapes: Iterable[tuple[str, Sequence[int]]], *, quantized: bool) -> str:
    """``experts.down_proj of 4 experts in each of 2 layers, not quantized``; empty if no parameter holds several experts.

    Args: shapes: names and shapes of adapted parameters. quantized: whether the linear layers are; bitsandbytes quantizes no experts.
    """
    counts: dict[tuple[str, int], int] = {}
    for name, shape in shapes:
        if len(shape) == 3:
            kind = (".".join(name.split(".")[-2:]), int(shape[0]))
            counts[kind] = counts.get(kind, 0) + 1
    parts = [
        f"{kind} of {n} experts in {'1 layer' if layers == 1 else f'each of {layers} layers'}"
        for (kind, n), layers in sorted(counts.items())
    ]
    return ", ".join(parts) + (", not quantized" if parts and quantized else "")


def check_settings(dropout: float | None, dora: Any) -> None:
    """Raises RecipeError for settings that PEFT cannot use on parameters."""
    if dropout:
        raise RecipeError(
            "adapter.target_parameters adapts weights whose inputs PEFT does not see, so it cannot drop any; set it to 0",
            key="adapter.dropout",
        )
    if dora:
        raise RecipeError("DoRA does not work with adapter.target_parameters; set it to false", key="adapter.dora")


def _dimensions(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)
    return int(parameter.dim()) if state is None else len(state.shape)


def _ends_so(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _unknown(model: nn.Module, matrices: Sequence[str], ending: str) -> str:
    """The message for an ending that matches nothing: with the parameters that are no layer's weight, else all."""
    layers = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    bare = [n for n in matrices if not isinstance(model.get_submodule(n.rpartition(".")[0]), layers)]
    known = list(dict.fromkeys(re.sub(r".*\.\d+\.", "", name) for name in bare or matrices))
    near = difflib.get_close_matches(ending, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    more = f" and {len(known) - _MOST} others" if len(known) > _MOST else ""
    return f"{ending!r} matches no parameter; {hint}(this model has {', '.join(known[:_MOST])}{more})"
