"""The optimizers by name; the rows are in ``specs.optimizers``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def make_optimizer(model: nn.Module, name: str, *, lr: float, **options: Any) -> Any:
    """Returns the optimizer for the trained parameters of ``model``. Args: options: the keys of its row."""
    return OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad], lr=lr, **options)


def _adamw(
    trained: list[nn.Parameter], *, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """Fused AdamW; vectors (biases, norms, magnitudes) are not decayed."""
    return torch.optim.AdamW(_decayed(trained, weight_decay), lr=lr, betas=betas, fused=True)


def _decayed(trained: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": _adamw}
