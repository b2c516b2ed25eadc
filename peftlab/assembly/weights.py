"""The backbone of a recipe: how its weights are kept, and loading it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftlab.assembly.families import reads_ids
from peftlab.errors import RecipeError
from peftlab.measuring.memory import share_one_heap
from peftlab.models import check_stored, load_model, reconcile, start_rows
from peftlab.specs.methods import METHODS

if TYPE_CHECKING:
    from peftlab.assembly.assembly import Assembly


def kept_as(assembly: Assembly) -> str:
    """How the linear weights are kept: as the model's files store them quantized, else model.quantize.

    Raises: RecipeError if the two contradict each other, or quantized weights would be trained.
    """
    recipe, stored = assembly.recipe, assembly.stored
    if stored == "none":
        return recipe.model.quantize
    check_stored(assembly.pretrained, stored, recipe.model.quantize)
    methods = [assembly.method, *(METHODS[other.method] for other in recipe.adapter.beside)]
    if (method := next((m for m in methods if not m.trains_on(stored)), None)) is not None:
        what = f"{method.label} does not work on them" if method.adapts else "they cannot be trained"
        raise RecipeError(
            f"the weights of {recipe.model.name} are stored in {stored}, and {what}; use adapter.method=lora, or name the "
            "model that it was made from",
            key="adapter.method",
        )
    return stored


def load_backbone(assembly: Assembly, changes: dict[str, Any]) -> Any:
    """Loads the frozen backbone. Args: changes: override loading options, such as ``quantize="none"``."""
    # Only after encoding: before, the tokenizer's threads would wait for each other (measured: twice the time).
    share_one_heap()
    model, added = assembly.recipe.model, assembly.recipe.adapter.tokens
    options: dict[str, Any] = {
        "quantize": assembly.storage,
        "double_quant": model.double_quant,
        "compute_dtype": model.compute_dtype,
        # Trained weights need float32: a single update is often below the resolution of 16 bits.
        "dtype": "float32" if not assembly.method.adapts and model.dtype == "auto" else model.dtype,
        "attention": model.attention,
        "resize_token_embeddings": model.resize_token_embeddings,
    }
    loaded = load_model(
        assembly.pretrained,
        auto_class=assembly.spec.auto_class,
        device=assembly.device,
        **(options | changes),
        **assembly.task.model_kwargs(),
    )
    if added:
        start_rows(loaded, assembly.reader, added)
    if reads_ids(loaded.config, assembly.spec):
        reconcile(loaded, assembly.reader)
    return loaded
