"""Options that have to divide the widths of the adapted layers: PEFT itself says which values work."""

from __future__ import annotations

import dataclasses
from typing import Any

import peft
import pytest
import torch
from torch import nn

from peftlab.adapters import check_adapter, fitting_sizes
from peftlab.errors import RecipeError
from peftlab.specs.method_spec import Divisor
from peftlab.specs.methods import METHODS
from peftlab.specs.peft_methods import peft_method

# The only divisors that two layers share are 1, 2, 3 and 6: no default of PEFT above 6 divides both.
INPUTS, OUTPUTS = (12, 30), (30, 18)
CASES = [(spec.name, divisor) for spec in METHODS.values() for divisor in spec.divisors]
# What else PEFT wants for the option.
OTHERS: dict[str, dict[str, Any]] = {
    "mini_r": {"r": 2},
    "gralora_k": {"r": 12},
    "vector_length": {"num_vectors": 8, "topk": 2, "r": 2},
    "boft_block_num": {"boft_block_size": 0},
}


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "none"}
        self.first, self.second = (nn.Linear(i, o) for i, o in zip(INPUTS, OUTPUTS, strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def peft_accepts(method: str, divisor: Divisor, value: int) -> bool:
    options = {**OTHERS.get(divisor.option, {}), **divisor.when, divisor.option: value}
    try:
        config = getattr(peft, peft_method(method).config)(target_modules=["first", "second"], **options)
        peft.get_peft_model(Layers(), config)
    except (ValueError, RuntimeError):
        return False
    return True


def fitted(method: str, divisor: Divisor, **given: Any) -> dict[str, int]:
    return fitting_sizes(Layers(), METHODS[method], ["first", "second"], {**divisor.when, **given})[0]


@pytest.mark.parametrize(("method", "divisor"), CASES, ids=lambda case: getattr(case, "option", case))
def test_values_that_divide_are_those_that_peft_takes(method: str, divisor: Divisor) -> None:
    widths = [*(INPUTS if divisor.of != "out" else ()), *(OUTPUTS if divisor.of != "in" else ())]
    for value in (2, 3, 4, 6, 8):
        fits = all(width % value == 0 for width in widths) and not (divisor.even and value % 2)
        if divisor.option != "boft_block_num":  # which has more conditions than this one
            assert peft_accepts(method, divisor, value) == fits, value
        if fits:
            assert fitted(method, divisor, **{divisor.option: value}) == {}
        else:
            with pytest.raises(RecipeError, match=rf"expected an? .*divisor of the widths .* found {value}") as error:
                fitted(method, divisor, **{divisor.option: value})
            ours = next((k for k, name in METHODS[method].keys.items() if name == divisor.option), divisor.option)
            assert error.value.key == f"adapter.{ours}"


def test_default_that_does_not_divide_becomes_the_largest_that_does() -> None:
    for method, option, wanted in (("c3a", "block_size", 6), ("vblora", "vector_length", 6), ("road", "group_size", 6)):
        (divisor,) = METHODS[method].divisors
        assert fitted(method, divisor) == {option: wanted}
        assert peft_accepts(method, divisor, wanted)
    (divisor,) = METHODS["gralora"].divisors
    assert fitted("gralora", divisor) == {}, "PEFT's default of 2 divides"


def test_no_even_divisor_is_refused() -> None:
    layers = Layers()
    layers.first = nn.Linear(4, 9)
    with pytest.raises(RecipeError, match=r"expected an even divisor .* and there is none"):
        fitting_sizes(layers, METHODS["road"], ["first"], {})


def test_condition_that_does_not_hold_limits_nothing() -> None:
    assert fitting_sizes(Layers(), METHODS["miss"], ["first"], {"r": 7, "mini_r": 7}) == ({}, [])


def test_configuration_has_the_fitting_size(tiny: Any) -> None:
    model = tiny("tiny:bert", adapter=False)
    config = check_adapter(model, "c3a", peft_type=None, targets="all-linear")
    assert config.block_size == 64
    assert peft.get_peft_model(model, config)
    with pytest.raises(RecipeError, match="such as 32; found 48"):
        check_adapter(tiny("tiny:bert", adapter=False), "c3a", peft_type=None, targets="all-linear", block_size=48)


def test_fault_in_a_row_is_found() -> None:
    """A row that knew the outputs alone would let a value pass that PEFT refuses."""
    (divisor,) = METHODS["c3a"].divisors
    wrong = dataclasses.replace(divisor, of="out")
    spec = dataclasses.replace(METHODS["c3a"], divisors=(wrong,))
    layers = Layers()
    layers.first, layers.second = nn.Linear(12, 30), nn.Linear(12, 30)
    assert fitting_sizes(layers, spec, ["first"], {"block_size": 10})[0] == {}
    assert not peft_accepts("c3a", wrong, 10)
