"""Methods that change their adapter by the step: AdaLoRA's ranks, AdaMSS's subspaces, and their state in checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftlab.adapters import after_step, inject, load_state, penalty, save_state
from peftlab.adapters.schedule import schedule_state
from peftlab.errors import RecipeError

IDS = torch.arange(3, 27).reshape(2, 12)
STEPS = 12


@pytest.fixture
def base(tiny: Callable[..., Any]) -> Any:
    return tiny("tiny:llama", adapter=False)


def adalora(base: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {"rank": 2, "init_r": 4, "tfinal": 4, "deltaT": 1, **options}
    return inject(base, "adalora", peft_type="CAUSAL_LM", num_steps=STEPS, **settings)


def adamss(base: Any) -> Any:
    torch.manual_seed(0)
    settings = {"rank": 8, "use_asa": True, "asa_target_subspaces": 10, "init_warmup": 1, "final_warmup": 8}
    return inject(base, "adamss", peft_type="CAUSAL_LM", mask_interval=2, num_subspaces=3, **settings)


def run(model: Any, steps: range, optimizer: torch.optim.Optimizer) -> None:
    for step in steps:
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        after_step(model, step + 1)
        optimizer.zero_grad()


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def test_penalty_is_what_pefts_forward_adds_to_the_loss(base: Any) -> None:
    model = adalora(base, orth_reg_weight=0.7).eval()
    whole = model(input_ids=IDS, labels=IDS).loss
    alone = model.get_base_model()(input_ids=IDS, labels=IDS).loss
    extra = penalty(model)
    assert extra is not None and float(extra) > 0.1
    torch.testing.assert_close(extra, whole - alone, rtol=1e-4, atol=1e-5)
    of_A = [p for n, p in model.named_parameters() if ".lora_A." in n]
    wanted = torch.autograd.grad(whole - alone, of_A, allow_unused=True)
    torch.testing.assert_close(torch.autograd.grad(extra, of_A), wanted, rtol=1e-3, atol=1e-5)


def test_penalty_is_nothing_for_other_methods_and_without_weight(base: Any) -> None:
    assert penalty(inject(copy.deepcopy(base), "lora", peft_type="CAUSAL_LM", rank=2, alpha=4)) is None
    assert penalty(adalora(base, orth_reg_weight=0.0)) is None


def test_adalora_ends_at_its_budget(base: Any) -> None:
    model = adalora(base)
    run(model, range(STEPS), optimizer_of(model))
    kept = sum(int(p.count_nonzero()) for n, p in model.named_parameters() if ".lora_E." in n)
    assert kept <= 2 * 14  # rank 2 for each of 14 layers on average, of 4 at the start
    assert kept >= 2 * 14 - 1
    per_layer = [sum(row) for row in model.peft_config["default"].rank_pattern.values()]
    assert sum(per_layer) == kept and len(set(per_layer)) > 1  # layers get different ranks


def test_adalora_takes_modules_that_the_loss_does_not_use(base: Any) -> None:
    model = adalora(base)
    (
        model(input_ids=IDS).logits.sum() * 0 + sum(p.sum() for n, p in model.named_parameters() if "0.mlp" in n)
    ).backward()
    unused = [p for n, p in model.named_parameters() if ".lora_" in n and "1.mlp" in n and p.requires_grad]
    for parameter in unused:
        parameter.grad = None
    after_step(model, 1)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in unused)


@pytest.mark.parametrize("stop", [3, 9])
def test_adalora_goes_on_from_its_state_to_the_bit(base: Any, stop: int, tmp_path: Path) -> None:
    other = copy.deepcopy(base)
    whole = adalora(base)
    run(whole, range(STEPS), optimizer_of(whole))
    first = adalora(copy.deepcopy(other))
    run(first, range(stop), optimizer_of(first))
    save_state(first, tmp_path)
    second = adalora(other)
    load_state(second, tmp_path)
    run(second, range(stop, STEPS), optimizer_of(second))
    wanted = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, wanted[n]) for n, p in second.named_parameters() if p.requires_grad)
    assert second.peft_config["default"].rank_pattern == whole.peft_config["default"].rank_pattern


def test_adalora_from_its_values_alone_has_other_averages(base: Any) -> None:
    """The deliberate fault: going on from the adapter's values, as PEFT's file would."""
    other = copy.deepcopy(base)
    first = adalora(base)
    run(first, range(6), optimizer_of(first))
    second = adalora(other)
    second.load_state_dict(first.state_dict())
    second.peft_config["default"].rank_pattern = first.peft_config["default"].rank_pattern
    for model in (first, second):
        run(model, range(6, 7), optimizer_of(model))
    averages = [model.base_model.rankallocator.exp_avg_ipt for model in (first, second)]
    assert all(not torch.equal(value, averages[1][name]) for name, value in averages[0].items() if value.any())


def test_adamss_freezes_subspaces_and_goes_on_from_its_state_to_the_bit(base: Any, tmp_path: Path) -> None:
    other = copy.deepcopy(base)
    whole = adamss(base)
    started = sum(p.requires_grad for p in whole.parameters())
    run(whole, range(STEPS), optimizer_of(whole))
    assert sum(p.requires_grad for p in whole.parameters()) < started
    first = adamss(copy.deepcopy(other))
    run(first, range(5), optimizer_of(first))
    assert schedule_state(first)
    save_state(first, tmp_path)
    second = adamss(other)
    trained = optimizer_of(second)  # made before the state is loaded, as a resumed run does
    load_state(second, tmp_path)
    run(second, range(5, STEPS), trained)
    wanted = dict(whole.named_parameters())
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
        assert parameter.requires_grad == wanted[name].requires_grad, name


@pytest.mark.parametrize(("num_steps", "tfinal"), [(1, 0), (10, 9), (10, 12)])
def test_adalora_needs_steps_before_its_last_phase(base: Any, num_steps: int, tfinal: int) -> None:
    with pytest.raises(RecipeError, match=rf"expected at least {tfinal + 2} steps, found {num_steps}"):
        inject(base, "adalora", peft_type="CAUSAL_LM", num_steps=num_steps, tfinal=tfinal)
