"""The optimizers by name; the rows are in ``specs.optimizers``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def make_optimizer(
    model: nn.Module, name: str, *, lr: float, factors: Mapping[str, float] | None = None, **options: Any
) -> Any:
    """Returns the optimizer for the trained parameters of ``model``. Its groups have ``factor``, which multiplies their rate.

    Args: factors: factor on the learning rate by name of a parameter; default 1. options: the keys of its row.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((factors or {}).get(parameter_name, 1.0), []).append(parameter)
    return OPTIMIZERS[name](groups, lr=lr, **options)


def _adamw(
    trained: Mapping[float, list[nn.Parameter]], *, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """Fused AdamW; vectors (biases, norms, magnitudes) are not decayed."""
    groups = [
        {**group, "factor": factor, "lr": lr * factor}
        for factor, parameters in trained.items()
        for group in _decayed(parameters, weight_decay)
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def _decayed(trained: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": _adamw}
