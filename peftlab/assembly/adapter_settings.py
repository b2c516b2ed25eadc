"""A recipe's adapter: the arguments of its injection, and the saved adapters that the recipe names."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from peftlab.adapters import Pattern
from peftlab.assembly.mixed import mixed_adapters, mixed_fingerprint
from peftlab.assembly.stack import adapter_fingerprint, base_adapter
from peftlab.assembly.start import Start
from peftlab.recipe import Recipe


class AdapterSettings:
    """The section ``adapter`` of a recipe, resolved on first use."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._section = recipe, recipe.adapter

    @property
    def places(self) -> dict[str, Any]:
        """The arguments of ``adapters.inject`` that say which modules are adapted and which are trained in full."""
        a = self._section
        return {
            "peft_type": self._recipe.spec.peft_type,
            "targets": a.targets,
            "modules_to_save": a.modules_to_save,
            "layers": a.layers,
            "freeze": a.freeze,
        }

    @property
    def options(self) -> dict[str, Any]:
        """Its other arguments: the settings of the method. Raises: RecipeError if an adapter in them is missing or damaged."""
        a, keys = self._section, self._recipe.method.keys
        options = {key: getattr(a, key) for key in keys if key not in ("targets", "modules_to_save")} | a.options
        if self.mixed:
            options["adapters"] = {name: str(folder) for name, folder in self.mixed.items()}
        return options | ({"patterns": [Pattern(**p.model_dump()) for p in a.patterns]} if a.patterns else {})

    @functools.cached_property
    def mixed(self) -> dict[str, Path]:
        """The folders of the adapters that X-LoRA mixes, by name; empty for another method. Raises: as ``options``."""
        named = self._section.options["adapters"] if "adapters" in self._recipe.method.required else {}
        return mixed_adapters(named)

    @functools.cached_property
    def start(self) -> Start | None:
        """The adapter that this one continues. Raises: RecipeError if there is none in adapter.start, ArtifactError."""
        return None if self._section.start is None else Start.find(self._section.start)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the saved adapters that the recipe names, by what they are for."""
        found = {} if self.start is None else {"start adapter": self.start.fingerprint}
        if self.mixed:
            found["mixed adapters"] = mixed_fingerprint(self.mixed)
        if (name := self._recipe.model.adapter) is not None:
            found["base adapter"] = adapter_fingerprint(base_adapter(name))
        return found
