"""Deliberate faults in lora_linear turn its checks red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peftlab_kernels.lora_linear import op, passes
from torch import Tensor

from tests.ops.lora_linear_examples import BACKENDS, TOLERANCE, check, problem, run_op, truth


def _dropped_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_Call", lambda base, scale, *rest: _CALL(base, 1.0, *rest))


def _dropped_scale_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "up_backward", lambda dY, B, S, scale, backend: _UP(dY, B, S, 1.0, backend))


def _dropped_scale_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_float(*args: Any, low_rank: Any = None, **kwargs: Any) -> Tensor:
        return _AS_FLOAT(*args, low_rank=low_rank and (*low_rank[:2], 1.0), **kwargs)

    monkeypatch.setattr(op, "as_float", as_float)


def _zeroed_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def down_backward(*args: Any, **kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
        dX, dA = _DOWN(*args, **kwargs)
        return dX, None if dA is None else dA * 0

    monkeypatch.setattr(passes, "down_backward", down_backward)


def _unmasked_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def down_backward(x: Tensor, A: Tensor, dS: Tensor, packed: Any, *args: Any, **kwargs: Any) -> Any:
        return _DOWN(x, A, dS, packed if packed is None else torch.full_like(packed, 255), *args, **kwargs)

    monkeypatch.setattr(passes, "down_backward", down_backward)


def _other_mask_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def down_backward(x: Tensor, A: Tensor, dS: Tensor, packed: Any, *args: Any, **kwargs: Any) -> Any:
        return _DOWN(x, A, dS, packed if packed is None else packed.roll(1, 0), *args, **kwargs)

    monkeypatch.setattr(passes, "down_backward", down_backward)


_CALL, _AS_FLOAT, _UP, _DOWN = op._Call, op.as_float, passes.up_backward, passes.down_backward


@pytest.mark.parametrize(
    ("fault", "how", "dropout"),
    [
        (_dropped_scale, "split", 0.0),
        (_dropped_scale, "split", 0.3),
        (_dropped_scale_backward, "merged", 0.0),
        (_dropped_scale_merged, "merged", 0.0),
        (_zeroed_a_gradient, "split", 0.0),
        (_zeroed_a_gradient, "split", 0.3),
        (_unmasked_backward, "split", 0.3),
        (_other_mask_backward, "split", 0.3),
    ],
)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_lora_linear_deliberate_faults_are_caught(
    device: torch.device,
    force_plan: Any,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    dtype: torch.dtype,
    fault: Callable[[pytest.MonkeyPatch], None],
    how: str,
    dropout: float,
) -> None:
    force_plan(how, how)
    case = problem("dense", (63, 50, 130, 8), dtype, device, backend=backend, dropout=dropout)
    check(run_op(case, backend), truth(case), TOLERANCE[dtype])
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="error"):
        check(run_op(case, backend), truth(case), TOLERANCE[dtype])
