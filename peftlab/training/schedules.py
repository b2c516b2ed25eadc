"""The learning rate as a pure function of the step; the rows are in ``specs.optimizers``."""

from __future__ import annotations

import math
from collections.abc import Callable

# Share of the peak, after the warm-up, at a share 0..1 of the remaining steps.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}


def learning_rate(step: int, *, total_steps: int, peak: float, schedule: str, warmup: float) -> float:
    """Returns the learning rate of optimizer step ``step`` (counted from 0).

    Rises linearly over the warm-up (``warmup`` steps, or that share of all steps if below 1), then follows the
    schedule, which reaches its end just after the last step.
    """
    num_warmup = math.ceil(round(warmup * total_steps, 9)) if warmup < 1 else int(warmup)
    if step < num_warmup:
        return peak * (step + 1) / (num_warmup + 1)
    progress = (step - num_warmup) / max(1, total_steps - num_warmup)
    return peak * SCHEDULES[schedule](progress)
