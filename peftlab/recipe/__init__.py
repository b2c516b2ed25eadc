"""The recipe: one YAML file that says what to train on what. Names are imported on first use; see ``__getattr__``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from peftlab.recipe.shipped import copy_recipe, recipe_names, recipe_schema, recipe_summary, recipe_text

if TYPE_CHECKING:
    from peftlab.recipe.load import LoadedRecipe, load_recipe
    from peftlab.recipe.lock import check_lock, check_same_settings, local_files, write_lock
    from peftlab.recipe.schema import Recipe
    from peftlab.recipe.start import adapter_folder, lock_of
else:
    _HOME = {
        "Recipe": "schema",
        "LoadedRecipe": "load",
        "load_recipe": "load",
        "write_lock": "lock",
        "check_lock": "lock",
        "check_same_settings": "lock",
        "local_files": "lock",
        "adapter_folder": "start",
        "lock_of": "start",
    }

    def __getattr__(name: str) -> object:
        # Listing the shipped recipes must not wait for pydantic and PyYAML.
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


__all__ = [
    "LoadedRecipe",
    "Recipe",
    "adapter_folder",
    "check_lock",
    "check_same_settings",
    "copy_recipe",
    "load_recipe",
    "local_files",
    "lock_of",
    "recipe_names",
    "recipe_schema",
    "recipe_summary",
    "recipe_text",
    "write_lock",
]
