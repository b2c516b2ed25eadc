"""Fixtures of the ops: the device of their tensors, a fixed plan of lora_linear, an empty compiler cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from peftlab_kernels.lora_linear import Plan, plan


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def force_plan(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    def force(forward: str, backward: str) -> None:
        monkeypatch.setattr(plan, "choose", lambda *args, **kwargs: Plan(forward, backward))

    return force


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
