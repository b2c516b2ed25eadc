"""How long the rows of a recipe may be, in tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftlab.errors import RecipeError
from peftlab.models import UNLIMITED

if TYPE_CHECKING:
    from peftlab.assembly.assembly import Assembly


def input_limit(assembly: Assembly) -> int:
    """Maximum input length that the model's files allow: the limit of prompts and of inputs to predict."""
    if assembly.spec.reader == "image processor":
        return int(assembly.reader.length)
    allowed = _own_tokens(assembly)
    return min(allowed, assembly.task.max_length or allowed)


def row_limit(assembly: Assembly) -> int:
    """Maximum length of training and held-out rows: data.max_length. Raises: RecipeError if the model allows less, or
    packing has no limit."""
    model, data = assembly.recipe.model.name, assembly.recipe.data
    if assembly.spec.reader == "image processor":
        return input_limit(assembly)
    allowed = _own_tokens(assembly)
    if data.max_length is None and allowed == UNLIMITED and data.packing:
        raise RecipeError(
            f"{model} has no limit of its own, so packing needs data.max_length, such as 2048", key="data.max_length"
        )
    if data.max_length is None:
        return input_limit(assembly)
    if data.max_length > allowed:
        prompts = _prompt_tokens(assembly)
        beside = f" beside the {prompts} of the adapter" if prompts else ""
        raise RecipeError(
            f"{model} reads at most {allowed:,} tokens{beside}, found {data.max_length:,}", key="data.max_length"
        )
    return data.max_length


def _prompt_tokens(assembly: Assembly) -> int:
    """Number of positions that the adapter takes before each row."""
    options = {**assembly.method.defaults, **assembly.recipe.adapter.options}
    return int(options.get("num_virtual_tokens") or 0) if assembly.method.prompts else 0


def _own_tokens(assembly: Assembly) -> int:
    """Maximum number of a row's own tokens that the model's files and the adapter allow."""
    allowed = assembly.most_tokens
    return allowed if allowed == UNLIMITED else allowed - _prompt_tokens(assembly)
