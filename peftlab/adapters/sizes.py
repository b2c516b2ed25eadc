"""Sizes of an adapter that the widths of its layers limit: the rank, and options that have to divide a width."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import nn

from peftlab.errors import RecipeError
from peftlab.specs.method_spec import Divisor, MethodSpec


def check_rank(model: nn.Module, names: Sequence[str], rank: int | None, key: str = "adapter.rank") -> None:
    """Raises RecipeError for a rank above that of every adapted weight."""
    modules = dict(model.named_modules())
    widths = {n: min(m.in_features, m.out_features) for n in names if isinstance(m := modules[n], nn.Linear)}
    if rank is not None and len(widths) == len(names) > 0 and rank > max(widths.values()):
        widest = max(widths, key=widths.__getitem__)
        raise RecipeError(
            f"expected at most {widths[widest]:,}, the smaller side of the largest adapted weight ({widest}); found {rank:,}, "
            "which no update of these layers can have",
            key=key,
        )


def fitting_sizes(
    model: nn.Module, spec: MethodSpec, names: Sequence[str], given: Mapping[str, Any]
) -> tuple[dict[str, int], list[str]]:
    """Options of a method that have to divide the widths of the linear layers ``names``, where PEFT's default does not: the
    largest number below it that does, and a line for each.

    Args: given: the options that the recipe sets, by PEFT's names.
    Raises: RecipeError for one of them that does not divide every width.
    """
    chosen, lines = dict[str, int](), list[str]()
    for divisor in spec.divisors:
        default = spec.value_of(divisor.option)
        value = given.get(divisor.option, default)
        values = {key: given.get(key, spec.value_of(key)) for key in divisor.when}
        if not isinstance(value, int) or value < 1 or values != dict(divisor.when):
            continue
        widths = set(_widths(model, names, divisor))
        if all(width % value == 0 for width in widths) and not (divisor.even and value % 2):
            continue
        common = math.gcd(*widths)
        fits = [n for n in range(1, min(common, value) + 1) if common % n == 0 and not (divisor.even and n % 2)]
        sizes = ", ".join(f"{width:,}" for width in sorted(widths))
        ours = next((key for key, name in spec.keys.items() if name == divisor.option), divisor.option)
        what = f"{'an even' if divisor.even else 'a'} divisor of the widths of the adapted layers ({sizes})"
        if not fits:
            raise RecipeError(f"expected {what}, and there is none", key=f"adapter.{ours}")
        if divisor.option in given:
            raise RecipeError(f"expected {what}, such as {fits[-1]}; found {value}", key=f"adapter.{ours}")
        chosen[divisor.option] = fits[-1]
        lines.append(f"adapter.{ours} is {fits[-1]}, {what}; PEFT's default of {value} is none")
    return chosen, lines


def _widths(model: nn.Module, names: Iterable[str], divisor: Divisor) -> Iterable[int]:
    """Inputs and outputs, as ``divisor`` asks, of the linear layers among ``names``."""
    for name in names:
        module: Any = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            sizes = {"in": module.in_features, "out": module.out_features}
        elif type(module).__name__ == "Conv1D":
            sizes = {"in": cast(int, module.nx), "out": cast(int, module.nf)}
        else:
            continue
        yield from (size for side, size in sizes.items() if divisor.of in (side, "both"))
