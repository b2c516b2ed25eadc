"""The section ``adapter`` of a recipe as arguments of ``adapters.inject``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftlab.adapters import Beside, Pattern
from peftlab.recipe import Recipe
from peftlab.specs.methods import METHODS

if TYPE_CHECKING:
    from peftlab.recipe.adapter import BesideSection


def adapter_places(recipe: Recipe) -> dict[str, Any]:
    """The arguments that say which modules are adapted and which are trained in full."""
    a = recipe.adapter
    return {
        "peft_type": recipe.spec.peft_type,
        "targets": a.targets,
        "modules_to_save": a.modules_to_save,
        "layers": a.layers,
        "freeze": a.freeze,
    }


def adapter_options(recipe: Recipe) -> dict[str, Any]:
    """The other arguments: the settings of the method."""
    a = recipe.adapter
    options = {key: getattr(a, key) for key in recipe.method.keys if key not in ("targets", "modules_to_save")}
    options |= a.options
    if a.patterns:
        options["patterns"] = [Pattern(**pattern.model_dump()) for pattern in a.patterns]
    if a.beside:
        options["beside"] = [_beside(other) for other in a.beside]
    return options


def _beside(section: BesideSection) -> Beside:
    keys = METHODS[section.method].keys
    options = {k: getattr(section, k) for k in ("rank", "alpha", "dropout", "rslora", "dora") if k in keys}
    return Beside(section.method, section.targets, section.layers, options | section.options, section.lr)
