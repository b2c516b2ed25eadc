"""FLOPs counted from shapes against torch's own counter, which counts the kernels of a whole step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from peftlab.measuring import flops

ROWS, LENGTH = 3, 32


def _inputs() -> torch.Tensor:
    return torch.randint(5, 200, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def _counted(model: Any, forward: Callable[[torch.Tensor], Any]) -> flops.Counted:
    ids = _inputs()
    one, two = (flops.count_linears(model, lambda n=n: forward(ids[:n])) for n in (1, 2))
    return flops.of_rows(one, two, ROWS)


@pytest.mark.parametrize("dora", [False, True])
def test_training_flops_equal_those_of_the_counter(tiny: Callable[..., Any], dora: bool) -> None:
    from peftlab.adapters.fused import set_kernels

    model = tiny("tiny:llama", attention="eager", dora=dora).train()
    set_kernels(model, "reference")

    def loss(ids: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return value

    linears = _counted(model, loss)
    width = flops.attention_width(model.config)
    assert width == 2 * 64, "two layers, 64 wide"
    mine = flops.training_flops(linears, rows=ROWS, length=LENGTH, width=width)
    with FlopCounterMode(display=False) as counter:
        loss(_inputs()).backward()
    assert mine == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_training_flops_of_full_fine_tuning_equal_those_of_the_counter(tiny: Callable[..., Any]) -> None:
    model = tiny("tiny:llama", adapter=False, attention="eager").train().requires_grad_(True)
    linears = _counted(model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss)
    mine = flops.training_flops(linears, rows=ROWS, length=LENGTH, width=flops.attention_width(model.config))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=_inputs(), labels=_inputs(), use_cache=False).loss.backward()
    assert mine == pytest.approx(counter.get_total_flops(), rel=0.05)


@torch.no_grad()
def test_generation_flops_equal_those_of_the_counter(tiny: Callable[..., Any]) -> None:
    model = tiny("tiny:llama", adapter=False, attention="eager")
    prompt = _counted(model, lambda ids: model(ids, use_cache=False, logits_to_keep=1))
    token = _counted(model, lambda ids: model(ids[:, :1], use_cache=False, logits_to_keep=1))
    width = flops.attention_width(model.config)
    mine = flops.generation_flops(prompt, token, rows=ROWS, length=LENGTH, new_tokens=8, width=width)
    ids = _inputs()
    with FlopCounterMode(display=False) as counter:
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False
        )
    assert mine == pytest.approx(counter.get_total_flops(), rel=0.05)
