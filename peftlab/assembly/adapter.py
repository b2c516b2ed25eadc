"""The section ``adapter`` of a recipe as arguments of ``adapters.inject``, and the saved adapters that a recipe names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftlab.adapters import Beside, Pattern
from peftlab.assembly.mixed import mixed_adapters, mixed_fingerprint
from peftlab.assembly.stack import adapter_fingerprint, base_adapter
from peftlab.assembly.start import Start
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
    """The other arguments: the settings of the method. Raises: RecipeError if an adapter to mix is missing or damaged."""
    a = recipe.adapter
    options = {key: getattr(a, key) for key in recipe.method.keys if key not in ("targets", "modules_to_save")}
    options |= a.options
    if mixed := mixed_of(recipe):
        options["adapters"] = {name: str(folder) for name, folder in mixed.items()}
    if a.patterns:
        options["patterns"] = [Pattern(**pattern.model_dump()) for pattern in a.patterns]
    if a.beside:
        options["beside"] = [_beside(other) for other in a.beside]
    return options


def mixed_of(recipe: Recipe) -> dict[str, Path]:
    """The folders of the adapters that X-LoRA mixes, by name; empty for another method. Raises: as ``adapter_options``."""
    return mixed_adapters(recipe.adapter.options["adapters"] if "adapters" in recipe.method.required else {})


def adapter_fingerprints(recipe: Recipe, start: Start | None) -> dict[str, str]:
    """Hashes of the saved adapters that a recipe names, by what they are for. Args: start: that of adapter.start."""
    found = {} if start is None else {"start adapter": start.fingerprint}
    if mixed := mixed_of(recipe):
        found["mixed adapters"] = mixed_fingerprint(mixed)
    if (name := recipe.model.adapter) is not None:
        found["base adapter"] = adapter_fingerprint(base_adapter(name))
    return found


def _beside(section: BesideSection) -> Beside:
    keys = METHODS[section.method].keys
    options = {k: getattr(section, k) for k in ("rank", "alpha", "dropout", "rslora", "dora") if k in keys}
    return Beside(section.method, section.targets, section.layers, options | section.options, section.lr)
