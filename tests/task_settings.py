"""The settings of a task as a recipe without them has them."""

from __future__ import annotations

from typing import Any

from peftlab.recipe.schema import Recipe
from peftlab.specs.task_spec import TaskSpec


def default_settings(spec: TaskSpec, **given: Any) -> dict[str, Any]:
    """``TaskParts.settings`` with the defaults of the keys. Args: given: by the last part of a key."""
    values = {}
    for key in spec.settings:
        section, name = key.split(".")
        model: Any = Recipe.model_fields[section].annotation
        values[key] = given.get(name, model.model_fields[name].get_default(call_default_factory=True))
    assert given.keys() <= {key.split(".")[1] for key in spec.settings}
    return values
