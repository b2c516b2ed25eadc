"""Learning rates worked out by hand, and AdamW against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from peftlab.training.optimizers import make_optimizer
from peftlab.training.schedules import learning_rate


def rates(total: int, schedule: str, warmup: float) -> list[float]:
    return [learning_rate(i, total_steps=total, peak=3.0, schedule=schedule, warmup=warmup) for i in range(total)]


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [3, 3, 3, 3, 3]),
        ("constant", 2, [1, 2, 3, 3, 3]),
        ("linear", 0, [3, 2.4, 1.8, 1.2, 0.6]),
        ("linear", 2, [1, 2, 3, 2, 1]),
        ("linear", 0.4, [1, 2, 3, 2, 1]),
        ("linear", 0.01, [1.5, 3, 2.25, 1.5, 0.75]),
        ("cosine", 1, [1.5, 3, 1.5 + 1.5 * math.sqrt(0.5), 1.5, 1.5 - 1.5 * math.sqrt(0.5)]),
        ("linear", 5, [0.5, 1, 1.5, 2, 2.5]),
        ("linear", 9, [0.3, 0.6, 0.9, 1.2, 1.5]),
    ],
)
def test_learning_rate_equals_the_values_worked_out_by_hand(
    schedule: str, warmup: float, expected: list[float]
) -> None:
    assert rates(5, schedule, warmup) == pytest.approx(expected)


@pytest.mark.parametrize("percent", range(1, 100))
def test_learning_rate_warmup_of_a_share_of_100_steps_is_exact(percent: int) -> None:
    """0.07 * 100 is 7.000000000000001 in floating point. That is 7 steps of warm-up, not 8."""
    assert rates(100, "constant", percent / 100).index(3.0) == percent


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rate_is_positive_and_rises_once(schedule: str) -> None:
    values = rates(40, schedule, 0.1)
    assert min(values) > 0 and max(values) == 3.0
    top = values.index(3.0)
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)


def test_learning_rate_of_a_single_step_is_positive() -> None:
    assert rates(1, "linear", 0.03)[0] > 0


def test_adamw_equals_its_formula() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    model.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    lr, (b1, b2), decay = 0.1, (0.8, 0.9), 0.5
    optimizer = make_optimizer(model, "adamw", lr=lr, betas=(b1, b2), weight_decay=decay)
    m = {n: torch.zeros_like(p) for n, p in before.items()}
    v = {n: torch.zeros_like(p) for n, p in before.items()}
    for t in (1, 2, 3):
        optimizer.zero_grad()
        (model(torch.ones(4, 3).double()) ** 2).sum().backward()
        for name, p in model.named_parameters():
            if name == "frozen":
                continue
            m[name] = b1 * m[name] + (1 - b1) * p.grad
            v[name] = b2 * v[name] + (1 - b2) * p.grad**2
            if p.dim() > 1:  # matrices only
                before[name] = before[name] * (1 - lr * decay)
            step = (m[name] / (1 - b1**t)) / ((v[name] / (1 - b2**t)).sqrt() + 1e-8)
            before[name] = before[name] - lr * step
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=1e-9, atol=1e-12)
