"""Settings of an adapter that hold for some of its modules: rank, alpha, dropout and learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftlab.adapters.places import chosen_blocks_of, ends_with
from peftlab.errors import RecipeError
from peftlab.specs.method_spec import MethodSpec


@dataclass(frozen=True)
class Pattern:
    """Settings for the adapted modules that match ``targets`` and lie in ``layers``; None: as for the other modules.

    Attributes: targets, layers: as in ``inject``. lr: the learning rate at its peak.
    """

    targets: str | Sequence[str]
    layers: Sequence[int] | str | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    lr: float | None = None


def assigned(model: nn.Module, names: Sequence[str], patterns: Sequence[Pattern]) -> dict[str, Pattern]:
    """The pattern of each of the adapted modules ``names`` of ``model`` that has one.

    Raises: RecipeError for a pattern that matches none of them, and for two patterns on one module.
    """
    found: dict[str, tuple[int, Pattern]] = {}
    for index, pattern in enumerate(patterns):
        key = f"adapter.patterns.{index}.targets"
        matches = [name for name in names if ends_with(name, pattern.targets)]
        if matches and pattern.layers is not None:
            matches = chosen_blocks_of(matches, pattern.layers, model, key=f"adapter.patterns.{index}.layers")
        if not matches:
            raise RecipeError(
                f"{pattern.targets!r} matches none of the {len(names)} adapted modules, such as {names[0]}; "
                "adapter.targets says which modules are adapted",
                key=key,
            )
        for name in matches:
            if name in found:
                raise RecipeError(
                    f"{name} matches this pattern and pattern {found[name][0]}; a module can have one", key=key
                )
            found[name] = (index, pattern)
    return {name: pattern for name, (_, pattern) in found.items()}


def pattern_values(spec: MethodSpec, patterns: Sequence[Pattern], of_module: Mapping[str, Pattern]) -> dict[str, Any]:
    """PEFT's settings for the ``patterns``, by module. Raises: RecipeError for one that the method does not have."""
    # AdaLoRA keeps the ranks that it has found in rank_pattern. The layers of LoRA, and no others, have a dropout each.
    has = {
        "rank": spec.keys.get("rank") == "r" and "rank_pattern" in spec.options,
        "alpha": "alpha_pattern" in spec.options and "alpha_pattern" not in spec.refused_options,
        "dropout": "dora" in spec.keys,
    }
    for index, pattern in enumerate(patterns):
        for ours, exists in has.items():
            if getattr(pattern, ours) is not None and not exists:
                key = f"adapter.patterns.{index}.{ours}"
                raise RecipeError(f"{spec.name} takes no {ours} for single modules; remove it", key=key)
    values = {
        f"{ours}_pattern": {n: getattr(p, ours) for n, p in of_module.items() if getattr(p, ours) is not None}
        for ours in ("rank", "alpha")
    }
    return {name: chosen for name, chosen in values.items() if chosen}


def set_dropout(model: Any, of_module: Mapping[str, Pattern]) -> None:
    """Sets the dropout of the modules whose pattern has one; it acts in training only, so PEFT's files do not have it."""
    modules = dict(model.get_base_model().named_modules())
    for name, pattern in of_module.items():
        if pattern.dropout is not None:
            dropout = nn.Dropout(pattern.dropout) if pattern.dropout else nn.Identity()
            modules[name].lora_dropout["default"] = dropout


def rate_factors(model: Any, lr: float, loraplus_lr_ratio: float = 1.0) -> dict[str, float]:
    """Factor on the learning rate ``lr`` of each trained parameter whose rate differs, by name.

    Args: loraplus_lr_ratio: rate of LoRA's B / rate of A (LoRA+, arXiv 2402.12354).
    """
    of_module: Mapping[str, Pattern] = getattr(model, "patterns_of_modules", {})
    around = "base_model.model." if hasattr(getattr(model, "base_model", None), "model") else "base_model."
    rates = {f"{around}{name}.": p.lr / lr for name, p in of_module.items() if p.lr is not None}
    factors = {}
    for name, parameter in model.named_parameters():
        factor = next((rate for start, rate in rates.items() if name.startswith(start)), 1.0)
        if ".lora_B." in name or ".lora_embedding_B." in name:
            factor *= loraplus_lr_ratio
        if parameter.requires_grad and factor != 1.0:
            factors[name] = factor
    return factors
