"""What gpu-check compares the fused losses with: the same losses, of as many bytes as its model says."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.gpu_check import base, loss_model, loss_rivals, loss_speed

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPE = (64, 8, 4096)


class Traffic(TorchDispatchMode):
    """Bytes of the tensors as large as the logits that operators read and write, products left out."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.bytes = numel, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if not function.is_view and function._schema.name not in ("aten::mm", "aten::_unsafe_view", "aten::detach"):
            for leaf in tree_leaves((args, kwargs, found)):
                if isinstance(leaf, torch.Tensor) and leaf.numel() >= self.numel and 0 not in leaf.stride():
                    self.bytes += leaf.numel() * leaf.element_size()
        return found


def peak_bytes(run: Any) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    held = highest = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


@pytest.mark.parametrize(
    ("case", "name"),
    [("CE_FROZEN", "full logits"), ("CE_TRAINED", "full logits"), ("KL", "lean KL"), ("JSD", "JSD + CE")],
)
def test_dense_losses_move_and_hold_what_the_model_says(case: str, name: str) -> None:
    problem = loss_rivals.make_problem(base.Device("cpu"), getattr(loss_model, case), SHAPE)
    loss = loss_rivals.RIVALS[name].make(problem)

    def run() -> Any:
        return torch.autograd.grad(loss(), problem.leaves)

    run()
    dense, logits = loss_model.DENSE[name], SHAPE[0] * SHAPE[2]
    with Traffic(logits) as traffic:
        run()
    assert traffic.bytes / logits == pytest.approx(dense.bytes_per_logit, rel=0.02)
    assert peak_bytes(run) / logits == pytest.approx(dense.peak, rel=0.05)


def test_targets_are_within_what_the_model_says() -> None:
    """And no further below it than an eighth, or they would say little."""
    model, checked = loss_model, 0
    for case, targets in model.TARGETS.items():
        for name in targets.keys() & model.DENSE.keys():
            low, high = (ms / model.ours_ms(case) for ms in model.dense_ms(case, name))
            ratio, memory = targets[name]
            assert 0.88 * low <= ratio <= low <= high, (case, name, low)
            assert memory is None or memory <= model.dense_bytes(case, name) / model.ours_bytes(case)
            checked += 1
    assert checked == 5


def test_every_target_is_measured_somewhere() -> None:
    rows = [row for part in loss_speed.ROWS.values() for row in part]
    for case, targets in loss_model.TARGETS.items():
        measured = {name for of, against in rows if of == case for name in loss_speed.AGAINST[against]}
        assert targets.keys() <= measured


def rival(make: Any) -> ModuleType:
    module = ModuleType("liger_kernel")
    module.make = make  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("make", "state"),
    [
        (
            lambda p: lambda: 1.5 * (p.x @ p.w.t()).float().logsumexp(-1).sum(),
            "computes something else: its gradient is off",
        ),
        (
            lambda p: importlib.import_module("no_such_kernels"),
            "failed: ModuleNotFoundError: No module named 'no_such_k",
        ),
        (lambda p: lambda: torch.empty(0).max(), "failed: RuntimeError: max(): "),
    ],
)
def test_a_contestant_that_fails_costs_its_own_figure(monkeypatch: pytest.MonkeyPatch, make: Any, state: str) -> None:
    device = base.Device("cpu")
    speed, case = loss_speed, loss_model.CE_FROZEN
    monkeypatch.setitem(loss_rivals.RIVALS, "Liger", loss_rivals.Rival(make))
    monkeypatch.setitem(speed.TARGETS, case, {**speed.TARGETS[case], "Liger": (1.0, None)})
    row = speed._loss_speed(device, case, "Liger", SHAPE)
    assert row["ok"] is None and row["not_run"].startswith(f"Liger: {state}")
    monkeypatch.setitem(speed.AGAINST, "Liger", ("Liger", "full logits"))
    row = speed._loss_speed(device, case, "Liger", SHAPE)
    assert row["contestants"]["Liger"].startswith(state) and row["contestants"]["full logits"] == "measured"
    assert row["ratios"].keys() == {"full logits"}


def test_what_is_not_installed_is_said() -> None:
    assert "quack" not in sys.modules
    row = loss_speed._loss_speed(base.Device("cpu"), loss_model.CE_TRAINED, "CuTe DSL", SHAPE)
    assert row["not_run"] == "Liger CuTe: not installed: liger_kernel, cutlass; QuACK: not installed: quack, cutlass"
