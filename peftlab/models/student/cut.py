"""What to cut from a teacher, as plain values, and whether a given model allows that cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from peftlab.errors import RecipeError
from peftlab.models.student.families import Widths, resolve_sizes
from peftlab.models.student.stack import LAYERS_KEY, Part, check_layer_numbers, cut_layers, find_stack

_SECTION = "distill.student_init"


@dataclass(frozen=True)
class StudentCut:
    """A smaller model inside a larger one; None keeps a size.

    Attributes:
        layers: numbers of the layers to keep, ascending.
        num_layers: how many layers to keep, instead of ``layers``.
        by: which ones to keep: evenly spaced, the first ones, or those whose removal changes the output most.
        search: for ``by="importance"``: remove one layer, measure again, remove the next; or measure once and remove
            the least important ones together.
        part: which half of an encoder-decoder model is cut; None: the decoder.
        hidden_size, num_heads, num_key_value_heads, intermediate_size: widths, as in ``cut_width``.
    """

    layers: tuple[int, ...] | None = None
    num_layers: int | None = None
    by: Literal["even", "first", "importance"] = "even"
    search: Literal["greedy", "once"] = "greedy"
    part: Part | None = None
    hidden_size: int | None = None
    num_heads: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None

    @property
    def widths(self) -> Widths:
        return Widths(self.hidden_size, self.num_heads, self.num_key_value_heads, self.intermediate_size)

    @property
    def is_measured(self) -> bool:
        """Whether the choice needs the teacher's outputs on a sample."""
        return self.widths != Widths() or (self.num_layers is not None and self.by == "importance")


def evenly_spaced(num_layers: int, keep: int) -> tuple[int, ...]:
    """The layers floor(i (num_layers - 1) / (keep - 1)) for i = 0 .. keep - 1, from the first to the last.

    Rounding down keeps the lower of two equally near layers: 6 -> 3 is 0, 2, 5. A single layer is the first.
    """
    assert 1 <= keep <= num_layers
    return tuple(i * (num_layers - 1) // max(keep - 1, 1) for i in range(keep))


def check_cut(cut: StudentCut, model: nn.Module) -> None:
    """Raises RecipeError unless ``model`` allows the cut; a skeleton on the meta device is cut in place."""
    depth = cut.layers is not None or cut.num_layers is not None
    if not depth and cut.widths == Widths():
        raise RecipeError(
            "expected something to cut (layers, num_layers, hidden_size, num_heads, num_key_value_heads or "
            "intermediate_size), found nothing: the student would be the model itself",
            key=_SECTION,
        )
    if cut.layers is not None and cut.num_layers is not None:
        raise RecipeError("layers and num_layers exclude each other; remove one", key=f"{_SECTION}.num_layers")
    for name, value, needs, given in (
        ("by", cut.by != "even", "num_layers", cut.num_layers is not None),
        ("search", cut.search != "greedy", "by=importance", cut.by == "importance"),
        ("part", cut.part is not None, "layers or num_layers", depth),
    ):
        if value and not given:
            raise RecipeError(f"{name} has no effect without {needs}; remove it", key=f"{_SECTION}.{name}")
    _check_plain(model)
    if depth:
        _check_depth(cut, model)
    if cut.widths != Widths():
        before, after = resolve_sizes(model, cut.widths)
        if before == after and not depth:
            raise RecipeError("these are already the model's sizes: nothing is cut", key=_SECTION)


def _check_depth(cut: StudentCut, model: nn.Module) -> None:
    total = len(find_stack(model, cut.part))
    keep = cut.num_layers
    if cut.layers is not None:
        check_layer_numbers(cut.layers, total)
        keep = len(cut.layers)
    assert keep is not None
    key = LAYERS_KEY if cut.layers is not None else f"{_SECTION}.num_layers"
    if not 1 <= keep <= total:
        raise RecipeError(f"expected 1 to {total} layers, found {keep}: the model has {total}", key=key)
    if keep == total and cut.widths == Widths():
        raise RecipeError(f"the model has {total} layers, and all are kept: nothing is cut", key=key)
    if cut.by != "importance" and all(p.is_meta for p in model.parameters()):
        cut_layers(model, chosen_layers(cut, total), part=cut.part)


def chosen_layers(cut: StudentCut, num_layers: int) -> tuple[int, ...]:
    """The layers to keep, for a choice without measurement."""
    if cut.layers is not None:
        return cut.layers
    assert cut.num_layers is not None and cut.by != "importance"
    return evenly_spaced(num_layers, cut.num_layers) if cut.by == "even" else tuple(range(cut.num_layers))


def _check_plain(model: nn.Module) -> None:
    config: Any = model.config
    if getattr(config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        raise RecipeError(
            "a student can only be cut from unquantized weights, but this model's are quantized; use the original model",
            key=_SECTION,
        )
