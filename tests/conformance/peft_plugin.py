"""The pytest plugin of both runs of ``peft_suite.py``, which copies this file and passes ``Settings`` in ``VARIABLE``.

It selects the tests of LoRA, seeds each of them, and in the second run enters the fused layers into every LoraConfig.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

VARIABLE = "PEFTLAB_PEFT_SUITE"


@dataclass(frozen=True)
class Settings:
    """report: path of the ``Report``. only: the one test to keep. seed: of every test, or of the first of
    ``repeats`` runs of each.

    float64: float32 in the tests means float64. measure: fused forwards are compared with float64.
    """

    fused: bool
    report: str
    only: str = ""
    seed: int = 0
    repeats: int = 1
    float64: bool = False
    measure: bool = False


@dataclass
class Report:
    """outcomes: test -> passed, failed or skipped. peft: the version that was imported. fused_forwards: 0 with PEFT's layers.

    error_fused, error_peft: largest difference of a layer's output from float64, divided by its largest value, mean over
    the ``measured`` fused forwards: of the fused one, and of PEFT's own on the same input and weights.
    """

    outcomes: dict[str, str] = field(default_factory=dict)
    peft: str = ""
    fused_forwards: int = 0
    measured: int = 0
    error_fused: float = 0.0
    error_peft: float = 0.0


settings = Settings(**json.loads(os.environ[VARIABLE]))
suite_report = Report()


def pytest_configure() -> None:
    import peft

    suite_report.peft = peft.__version__
    if settings.fused:
        enter_fused_layers()
    if settings.float64:
        # Tests and PEFT name the type explicitly, so a default alone would make them disagree.
        torch.set_default_dtype(torch.float64)
        torch.float = torch.float32 = torch.float64
        torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]


def enter_fused_layers() -> None:
    from peft import LoraConfig

    from peftlab.adapters.fused import FusedLora, register

    finish, forward = LoraConfig.__post_init__, FusedLora._fused

    def with_fused_layers(self: Any) -> None:
        finish(self)
        register(self)

    def counted(self: Any, x: torch.Tensor) -> torch.Tensor:
        suite_report.fused_forwards += 1
        y = forward(self, x)
        if settings.measure:
            measure(self, x, y, super(FusedLora, self).forward)
        return y

    LoraConfig.__post_init__ = with_fused_layers
    FusedLora._fused = counted  # type: ignore[method-assign]


@torch.no_grad()
def measure(layer: Any, x: torch.Tensor, y: torch.Tensor, peft_forward: Callable[..., torch.Tensor]) -> None:
    base, factors = layer.get_base_layer(), layer.factors()
    if type(base) is not torch.nn.Linear or factors.dropout:
        return  # dequantizing would need our own code, and PEFT's forward would draw another mask
    bias = base.bias.double() if base.bias is not None else None
    low = F.linear(F.linear(x.double(), factors.A_RK.double()), factors.B_NR.double())
    truth = F.linear(x.double(), base.weight.double(), bias) + factors.scale * low
    if unit := truth.abs().max().item():
        suite_report.measured += 1
        suite_report.error_fused += (y.double() - truth).abs().max().item() / unit
        suite_report.error_peft += (peft_forward(x).double() - truth).abs().max().item() / unit


@pytest.hookimpl(tryfirst=True)  # before anything that reorders what is left
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    def is_wanted(item: Any) -> bool:
        method = getattr(item, "callspec", None) and item.callspec.params.get("config_cls")
        # Of the tests that cover all methods, keep those of LoRA.
        lora = method.__name__ == "LoraConfig" if method else "lora" in item.nodeid.lower()
        return lora and settings.only in ("", re.sub(r"-?repeat\d+-?", "", item.nodeid).removesuffix("[]"))

    config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item)])
    items[:] = [item for item in items if is_wanted(item)]


def pytest_generate_tests(metafunc: Any) -> None:
    if settings.repeats > 1:
        metafunc.fixturenames.append("_repeat")
        metafunc.parametrize("_repeat", range(settings.repeats), ids=lambda number: f"repeat{number}")


@pytest.fixture
def _repeat(request: Any) -> Any:
    return request.param


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: Any) -> None:
    """Seeds each test. Otherwise it would inherit the state that earlier tests left, and the fused layers draw one
    number for a dropout mask where PEFT draws one per element."""
    callspec = getattr(item, "callspec", None)
    seed = settings.seed + (callspec.params.get("_repeat", 0) if callspec else 0)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":  # an error in a fixture has no call, or comes after it
        suite_report.outcomes[report.nodeid] = report.outcome


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        suite_report.outcomes[report.nodeid] = "failed"


def pytest_sessionfinish() -> None:
    if suite_report.measured:
        suite_report.error_fused /= suite_report.measured
        suite_report.error_peft /= suite_report.measured
    Path(settings.report).write_text(json.dumps(asdict(suite_report)), encoding="utf-8")
