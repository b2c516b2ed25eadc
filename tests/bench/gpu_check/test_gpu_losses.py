"""What gpu-check compares the fused losses with: the same losses, which move as many bytes as its model says."""

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
from bench.gpu_check.loss_model import TIMED

ROOT = Path(__file__).resolve().parents[3]
SHAPE = (64, 8, 4096)


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write in tensors as large as the logits, without the products."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.bytes = numel, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        if not function.is_view and function._schema.name not in ("aten::mm", "aten::_unsafe_view", "aten::detach"):
            for leaf in tree_leaves((args, kwargs, outputs)):
                if isinstance(leaf, torch.Tensor) and leaf.numel() >= self.numel and 0 not in leaf.stride():
                    self.bytes += leaf.numel() * leaf.element_size()
        return outputs


def peak_bytes(run: Any) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    held = highest = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


@pytest.mark.parametrize("case", [name for name, timed in TIMED.items() if not timed.stored])
def test_dense_losses_move_and_hold_the_bytes_of_the_model(case: str) -> None:
    problem, dense = loss_rivals.make_problem(base.Device("cpu"), TIMED[case], SHAPE), TIMED[case].plain
    loss = dense.make(problem)

    def run() -> Any:
        return torch.autograd.grad(loss(), problem.leaves)

    run()
    logits = SHAPE[0] * SHAPE[2]
    with Traffic(logits) as traffic:
        run()
    assert traffic.bytes / logits == pytest.approx(dense.bytes_per_logit, rel=0.02)
    assert peak_bytes(run) / logits == pytest.approx(dense.peak, rel=0.05)


@pytest.mark.parametrize("case", TIMED)
def test_targets_of_losses_are_within_the_model(case: str) -> None:
    """A target is at most an eighth below the model; a lower one would say little."""
    timed = TIMED[case]
    needs, ours = loss_model.needs_of(timed.plain, timed), loss_model.ours_ms(timed)
    ratio, memory = timed.targets[timed.plain.name]
    assert 0.88 * needs.low_ms <= ratio * ours <= needs.low_ms <= needs.high_ms
    assert memory is None or memory <= needs.bytes / loss_model.ours_bytes(timed)


def test_targets_are_all_measured() -> None:
    rows = [(part, *row) for part in loss_speed.AGAINST for row in loss_speed.rows_of(part)]
    for case, timed in TIMED.items():
        measured = {n for part, of, against in rows if of == case for n in loss_speed.contestants(case, part, against)}
        assert timed.targets.keys() == measured


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
def test_failing_contestant_loses_only_its_own_figure(monkeypatch: pytest.MonkeyPatch, make: Any, state: str) -> None:
    device, case = base.Device("cpu"), TIMED["cross-entropy, frozen head"]
    monkeypatch.setitem(loss_rivals.RIVALS, "Liger", loss_rivals.Rival(make))
    row = loss_speed._loss_speed(device, case, ["Liger"], SHAPE)
    assert row["ok"] is None and row["not_run"].startswith(f"Liger: {state}")
    row = loss_speed._loss_speed(device, case, ["Liger", "full logits"], SHAPE)
    assert row["contestants"]["Liger"].startswith(state) and row["contestants"]["full logits"] == "measured"
    assert row["ratios"].keys() == {"full logits"}


def test_contestants_that_are_not_installed_are_reported() -> None:
    assert "quack" not in sys.modules
    case = "cross-entropy, trained head"
    names = loss_speed.contestants(case, "compiled", "CuTe DSL")
    row = loss_speed._loss_speed(base.Device("cpu"), TIMED[case], names, SHAPE)
    assert row["not_run"] == "Liger CuTe: not installed: liger_kernel, cutlass; QuACK: not installed: quack, cutlass"
