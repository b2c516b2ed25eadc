"""The recipes that ship with peftlab: list, show, copy, and the JSON Schema for editors.

Only ``recipe_schema`` imports pydantic, so that ``peftlab recipes`` starts fast.
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from peftlab.errors import RecipeError


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    folder = _folder()
    if not folder.is_dir():
        return []
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_file(name: str) -> Traversable:
    """The file of a shipped recipe. Raises: RecipeError if there is none with that name."""
    if name not in recipe_names():
        raise RecipeError(f"no shipped recipe named `{name}`{nearest_recipes(name)}")
    return _folder() / f"{name}.yaml"


def recipe_text(name: str) -> str:
    """The whole file of a shipped recipe, comments included."""
    return recipe_file(name).read_text(encoding="utf-8")


def recipe_summary(name: str) -> str:
    """First comment line of the header of a shipped recipe, without its ``#``; empty without a header."""
    for line in recipe_text(name).splitlines():
        text = line.lstrip("# ").rstrip()
        if line.strip() and not line.startswith("#"):
            break
        if text:
            return text
    return ""


def copy_recipe(name: str, destination: str | os.PathLike[str] | None = None) -> Path:
    """The path of a new copy of a shipped recipe, with its comments.

    Args:
        destination: a file, or an existing folder (then DIR/NAME.yaml); default NAME.yaml in the current folder.

    Raises: RecipeError if the file exists, or its folder does not.
    """
    content = recipe_file(name).read_bytes()
    target = Path(f"{name}.yaml" if destination is None else destination)
    if target.is_dir():
        target = target / f"{name}.yaml"
    elif destination is not None and os.fspath(destination).endswith(("/", os.sep)):
        raise RecipeError(f"cannot copy {name} into {target}: no such folder; create it first")
    try:
        with open(target, "xb") as file:
            file.write(content)
    except FileExistsError:
        raise RecipeError(f"{target} already exists and is not overwritten; use another file name") from None
    except FileNotFoundError:
        raise RecipeError(
            f"cannot write {target}: the folder {target.parent} does not exist; create it first"
        ) from None
    except OSError as error:
        raise RecipeError(f"cannot write {target}: {error.strerror}") from None
    return target


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, with a description for every key."""
    from peftlab.recipe.schema import Recipe

    header = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "peftlab recipe"}
    return header | {key: value for key, value in Recipe.model_json_schema().items() if key != "title"}


def nearest_recipes(name: str) -> str:
    """The end of a message about an unknown recipe name: similar names, and how to list all."""
    near = get_close_matches(name, recipe_names(), n=3, cutoff=0.5)
    guess = f"; did you mean {' or '.join(f'`{other}`' for other in near)}?" if near else ";"
    return f"{guess} `peftlab recipes` lists the shipped recipes"


def _folder() -> Traversable:
    try:
        return resources.files("peftlab.recipes")
    except ModuleNotFoundError:
        # A bare clone on the path, not installed: the folder is not mapped to peftlab.recipes.
        return Path(__file__).parents[2] / "recipes"
