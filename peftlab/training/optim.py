"""AdamW and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def learning_rate(step: int, *, total_steps: int, peak: float, schedule: str, warmup: float) -> float:
    """Learning rate of the optimizer step ``step`` (counted from 0).

    Rises linearly over the warm-up (``warmup`` steps, or that share of all steps when below 1), then stays, falls
    linearly, or falls along half a cosine, reaching 0 just after the last step.
    """
    num_warmup = math.ceil(round(warmup * total_steps, 9)) if warmup < 1 else int(warmup)
    if step < num_warmup:
        return peak * (step + 1) / (num_warmup + 1)
    if schedule == "constant":
        return peak
    progress = (step - num_warmup) / max(1, total_steps - num_warmup)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    assert schedule == "linear"
    return peak * (1 - progress)


def make_optimizer(model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float) -> Any:
    """Fused AdamW over the trained parameters; vectors (biases, norms, magnitudes) are not decayed."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)
