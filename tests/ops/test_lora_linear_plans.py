"""Each plan of lora_linear gives the same values, also measured plans that may not merge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peftlab_kernels.lora_linear import Int8Weight, op, plan
from torch import Tensor

from tests.ops.lora_linear_examples import (
    BACKENDS,
    EACH_BACKEND,
    EACH_DROPOUT,
    EACH_KIND,
    TOLERANCE,
    call,
    check,
    problem,
    run_op,
    tolerance_of,
    truth,
)


@pytest.mark.parametrize("backward", ["merged", "split"])
@pytest.mark.parametrize("forward", ["merged", "split"])
@EACH_KIND
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_lora_linear_equals_the_formula_under_every_plan(
    device: torch.device,
    force_plan: Any,
    backend: str,
    dtype: torch.dtype,
    kind: str,
    forward: str,
    backward: str,
) -> None:
    force_plan(forward, backward)
    case = problem(kind, (63, 50, 130, 8), dtype, device)
    check(run_op(case, backend), truth(case), tolerance_of(kind, dtype))


@EACH_DROPOUT
@EACH_BACKEND
def test_lora_linear_library_plan_of_nf4_equals_the_formula(
    device: torch.device, force_plan: Any, backend: str, dropout: float
) -> None:
    force_plan("library", "split")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    case = problem("nf4", (63, 128, 130, 8), dtype, device, backend=backend, dropout=dropout)
    check(run_op(case, backend), truth(case), TOLERANCE[dtype])


@pytest.mark.parametrize("threshold", [0.0, 2.0])
@EACH_DROPOUT
@EACH_BACKEND
def test_lora_linear_library_plan_of_int8_equals_the_rounded_formula(
    device: torch.device, force_plan: Any, backend: str, dropout: float, threshold: float
) -> None:
    """LLM.int8 rounds x to 8 bits, row by row and apart from columns with outliers; the gradients are those of x."""
    force_plan("library", "split")
    case = problem("int8", (64, 128, 130, 8), torch.float16, device, backend=backend, dropout=dropout)
    assert isinstance(case.base, Int8Weight)
    case = replace(case, base=replace(case.base, threshold=threshold))
    x = case.x.double()
    outliers = (x.abs() >= threshold).any(0) if threshold else torch.zeros_like(x[0], dtype=torch.bool)
    rest = x * (x.abs() < threshold) if threshold else x
    row_absmax = rest.abs().amax(1, keepdim=True)
    rounded = torch.where(outliers, x, torch.round(rest * 127 / row_absmax) * row_absmax / 127)
    check(run_op(case, backend), truth(case, rounded), TOLERANCE[torch.float16])
    # A write that is undone still counts: the backward of another operator that saved x would fail.
    version = case.x._version
    call(case, case.inputs(), backend)
    assert case.x._version == version


def test_lora_linear_measured_plan_cannot_merge_dropout(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A table that asks for it is refused or has no effect. The gradients stay right."""
    row = {"device": plan._device_key(device.type, 0), "kind": "dense", "m": 64, "n": 130, "k": 50, "dropout": True}
    table = tmp_path / "plans.json"
    table.write_text(json.dumps({"plans": [row | {"forward": "split", "backward": "merged"}]}), encoding="utf-8")
    monkeypatch.setattr(plan, "_extra_tables", [])
    case = problem("dense", (63, 50, 130, 8), torch.float32, device, dropout=0.3)
    try:
        plan.use_table(table)
    except ValueError:
        return
    try:
        check(run_op(case, "torch"), truth(case), TOLERANCE[torch.float32])
    finally:
        plan._choose.cache_clear()


@pytest.mark.parametrize(
    ("weight_dtype", "dtype", "merged"),
    [
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float16, torch.float16, False),
        (torch.float32, torch.bfloat16, True),
        (torch.float32, torch.float32, True),
    ],
)
def test_lora_linear_sixteen_bit_weights_are_never_merged(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    weight_dtype: torch.dtype,
    dtype: torch.dtype,
    merged: bool,
) -> None:
    """A measured plan asks for a merge. It is used only if W is not on the 16-bit grid of x."""
    row = plan.key_of("dense", device, M=63, N=130, K=50, dropout=False)._asdict()
    table = tmp_path / "plans.json"
    table.write_text(json.dumps({"plans": [row | {"forward": "merged", "backward": "merged"}]}), encoding="utf-8")
    asked: list[bool] = []
    right = op.as_float

    def as_float(*args: Any, low_rank: Any = None, **kwargs: Any) -> Tensor:
        asked.append(low_rank is not None)
        return right(*args, low_rank=low_rank, **kwargs)

    monkeypatch.setattr(op, "as_float", as_float)
    case = problem("dense", (63, 50, 130, 8), weight_dtype, device)
    case = replace(case, x=case.x.to(dtype), grad=case.grad.to(dtype))
    plan.use_table(table)
    try:
        run_op(case, "torch")
    finally:
        plan.use_table(None)
    assert asked == [merged, merged]
