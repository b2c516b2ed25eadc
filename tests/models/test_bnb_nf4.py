"""NF4 weights that bitsandbytes reads wrongly on a CPU are found before they are used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import peftlab
from peftlab.errors import RecipeError
from peftlab.models import import_bitsandbytes, misreads_nf4
from peftlab.training.progress import SilentProgress
from tests.masked_examples import masked_recipe, write_bert, write_texts


def by_hand(weight: torch.Tensor) -> torch.Tensor:
    """NF4 with blocks of 64: the nearest value of the code, times the largest weight of the block."""
    code = import_bitsandbytes().functional.get_4bit_type("nf4", device="cpu")
    blocks = weight.flatten().view(-1, 64)
    size = blocks.abs().max(1, keepdim=True).values
    nearest = (blocks / size)[..., None].sub(code).abs().argmin(-1)
    return (code[nearest] * size).view_as(weight)


@pytest.mark.parametrize("width", [32, 48, 64, 72, 96, 128, 192, 384, 576])
def test_width_is_misread_if_bitsandbytes_differs_from_the_formula(width: int) -> None:
    functional = import_bitsandbytes().functional
    weight = torch.randn(64, width, generator=torch.Generator().manual_seed(1))
    read = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4", blocksize=64))
    differs = bool((read - by_hand(weight)).abs().max() > 0.05 * weight.abs().max())
    assert misreads_nf4(width) == differs


def test_model_with_such_a_width_is_refused_in_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(Path("texts"))
    write_bert(Path("bert"), hidden_size=96, intermediate_size=128)
    if not misreads_nf4(96):
        pytest.skip("this bitsandbytes reads 96 input features as it should")
    recipe = masked_recipe(model={"quantize": "nf4"}, run={"device": "cpu"})
    with pytest.raises(RecipeError, match="96 input features wrongly on a CPU") as error:
        peftlab.check(recipe, progress=SilentProgress())
    assert error.value.key == "model.quantize"
