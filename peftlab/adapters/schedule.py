"""Methods that change their adapter by the step: AdaLoRA's budget of ranks, AdaMSS's choice of subspaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.errors import RecipeError

# AdaLoRA's averages by parameter, and AdaMSS's by layer.
_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_LAYER_AVERAGES = ("exp_avg_ipt_A", "exp_avg_ipt_B", "exp_avg_unc_A", "exp_avg_unc_B")


def check_steps(num_steps: int | None, tfinal: int) -> None:
    """Raises RecipeError if AdaLoRA has no step before its last phase. Args: num_steps: of the run; None if not known yet."""
    if num_steps is not None and num_steps - tfinal < 2:
        raise RecipeError(
            f"AdaLoRA chooses its ranks by the steps before: expected at least {tfinal + 2} steps, found {num_steps}",
            key="train.max_steps",
        )


def after_step(model: Any, step: int) -> None:
    """Lets the method change the adapter after optimizer step ``step``, counted from 1, while the gradients are there."""
    if (update := _update(model)) is None:
        return
    for name, parameter in model.named_parameters():
        if ".lora_" in name and parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(
                parameter
            )  # of a module that the loss does not use; AdaLoRA reads every gradient
    update(step)


def penalty(model: Any) -> Tensor | None:
    """[] what the method adds to the mean loss; None if nothing.

    AdaLoRA: ``orth_reg_weight`` times the mean over A and B of the Frobenius norm of their Gram matrix minus the identity
    (arXiv 2303.10512, equation 4, as PEFT computes it).
    """
    config = getattr(model, "peft_config", {}).get("default")
    weight = getattr(config, "orth_reg_weight", 0.0)
    if not weight:
        return None
    norms = []
    for name, p in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            gram = p @ p.T if ".lora_A." in name else p.T @ p
            norms.append((gram - torch.eye(len(gram), device=p.device, dtype=p.dtype)).norm())
    return weight * torch.stack(norms).mean() if norms else None


def schedule_state(model: Any) -> dict[str, Tensor]:
    """What the method keeps from step to step beside the adapter, by name; empty for most methods."""
    state: dict[str, Tensor] = {}
    if (allocator := _allocator(model)) is not None:
        for kind in _AVERAGES:
            state |= {f"{kind}/{name}": value for name, value in getattr(allocator, kind).items()}
        for name, kept in (model.peft_config["default"].rank_pattern or {}).items():
            state[f"ranks/{name}"] = torch.tensor(kept, dtype=torch.uint8)
    for layer, averages in _layer_averages(model):
        state |= {f"{layer}/{i}": value for i, value in enumerate(averages) if value is not None}
    return state


def load_schedule_state(model: Any, state: dict[str, Tensor]) -> None:
    """Restores the result of ``schedule_state``."""
    device = next(model.parameters()).device
    if (allocator := _allocator(model)) is not None:
        for kind in _AVERAGES:
            values = {n.removeprefix(f"{kind}/"): t.to(device) for n, t in state.items() if n.startswith(f"{kind}/")}
            setattr(allocator, kind, values)
        ranks = {n.removeprefix("ranks/"): t.bool().tolist() for n, t in state.items() if n.startswith("ranks/")}
        model.peft_config["default"].rank_pattern = ranks or {}
    for layer, averages in _layer_averages(model):
        for i in range(len(averages)):
            value = state.get(f"{layer}/{i}")
            averages[i] = None if value is None else value.to(device)


def _update(model: Any) -> Callable[[int], None] | None:
    tuner: Any = getattr(model, "base_model", model)
    # Of the class: a tuner passes unknown names on to the model.
    return tuner.update_and_allocate if hasattr(type(tuner), "update_and_allocate") else None


def _allocator(model: Any) -> Any:
    """AdaLoRA's allocator of ranks; None for another method."""
    return vars(getattr(model, "base_model", nn.Module())).get("rankallocator")


def _layer_averages(model: nn.Module) -> Iterator[tuple[str, list[Tensor | None]]]:
    """AdaMSS's averages: one list per layer and kind, with an entry per subspace."""
    for name, module in model.named_modules():
        for kind in _LAYER_AVERAGES:
            for averages in getattr(module, kind, {}).values():
                yield f"{name}/{kind}", averages
