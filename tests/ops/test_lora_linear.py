"""lora_linear against the formula in float64: values, gradients, rounding, layouts, refused inputs."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from peftlab_kernels.lora_linear import lora_linear, lora_linear_reference
from torch import Tensor

from tests.ops.lora_linear_examples import (
    BACKENDS,
    EACH_BACKEND,
    EACH_DROPOUT,
    EACH_KIND,
    EACH_WAY,
    NAMES,
    NEEDS_TRITON,
    SCALE,
    SEED,
    SIXTEEN_BITS,
    TOLERANCE,
    check,
    problem,
    run,
    run_op,
    run_unfused,
    tolerance_of,
    truth,
    weight,
)


@pytest.mark.parametrize(
    "shape", [(0, 50, 130, 8), (1, 130, 50, 1), (63, 130, 50, 64), (63, 50, 97, 100), (1000, 50, 130, 16)]
)
@EACH_DROPOUT
@EACH_KIND
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_lora_linear_equals_the_formula_at_odd_shapes(
    device: torch.device, backend: str, dtype: torch.dtype, kind: str, dropout: float, shape: tuple[int, int, int, int]
) -> None:
    case = problem(kind, shape, dtype, device, backend=backend, dropout=dropout)
    actual = run_op(case, backend)
    assert all(value.dtype == dtype for value in actual.values())
    check(actual, truth(case), tolerance_of(kind, dtype))


@pytest.mark.parametrize("kind", ["dense", "int8"])
@EACH_DROPOUT
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_lora_linear_equals_the_formula_with_columns_in_whole_bytes(
    device: torch.device, backend: str, dtype: torch.dtype, dropout: float, kind: str
) -> None:
    case = problem(kind, (129, 96, 256, 8), dtype, device, backend=backend, dropout=dropout)
    check(run_op(case, backend), truth(case), tolerance_of(kind, dtype))


@EACH_KIND
@pytest.mark.parametrize(
    ("forward", "backward", "dropout"), [("merged", "merged", 0.0), ("split", "split", 0.0), ("split", "split", 0.3)]
)
@pytest.mark.parametrize(("backend", "dtype"), SIXTEEN_BITS)
def test_lora_linear_errs_no_more_than_the_unfused_formula(
    device: torch.device,
    force_plan: Any,
    backend: str,
    dtype: torch.dtype,
    forward: str,
    backward: str,
    dropout: float,
    kind: str,
) -> None:
    """The error budget by the root mean square, which two or three roundings of many elements make stable.

    The slack is for sums that both paths keep in float32, but in another order: 1e-6 of the result, when one rounding
    to 16 bits is 3e-4 or more.
    """
    force_plan(forward, backward)
    for shape in [(63, 50, 130, 8), (300, 130, 50, 16), (127, 256, 128, 64), (100, 130, 96, 100)]:
        case = problem(kind, shape, dtype, device, backend=backend, dropout=dropout)
        want, unfused, actual = truth(case), run_unfused(case), run_op(case, backend)
        for name in NAMES:
            error, allowed = (float((t[name].double() - want[name]).norm()) for t in (actual, unfused))
            assert error <= 1.1 * allowed + 1e-6 * float(want[name].norm()), (
                f"{name} at {shape}: error {error:.3g}, unfused {allowed:.3g}"
            )


@pytest.mark.parametrize(
    ("kind", "how"),
    [*((kind, "merged") for kind in ("nf4", "int8", "dense-fp32")), *((k, "split") for k in ("dense", "nf4", "int8"))],
)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype", "ratio"),
    [
        pytest.param("torch", torch.bfloat16, 1e-3, id="torch-bf16"),
        pytest.param("triton", torch.float16, 1.25e-4, id="triton-fp16", marks=NEEDS_TRITON),
        *[pytest.param(*p.values, 1e-3, id=p.id, marks=p.marks) for p in SIXTEEN_BITS if p.id == "triton-bf16"],
    ],
)
def test_lora_linear_does_not_round_a_small_adapter_away(
    device: torch.device, force_plan: Any, backend: str, dtype: torch.dtype, ratio: float, autocast: bool, kind: str,
    how: str,
) -> None:  # fmt: skip
    """|BA| is an eighth to a quarter of the spacing of 16-bit numbers near W. Half of the adapter is lost if it is
    added to an output that is already rounded. A weight merged in float32 and rounded once carries all of it on
    average. So does an output that is rounded once."""
    case = problem(kind, (512, 512, 512, 16), dtype, device)
    B = case.B.double() * (ratio / SCALE * case.W.norm() / (case.B.double() @ case.A.double()).norm())
    case = replace(case, B=B.to(dtype), bias=torch.zeros_like(case.bias))
    BA, W = SCALE * case.B.double() @ case.A.double(), case.W.double()
    parts = {
        "y": (case.x.double() @ W.T, case.x.double() @ BA.T),
        "x": (case.grad.double() @ W, case.grad.double() @ BA),
    }

    def gain(result: dict[str, Tensor], name: str) -> float:
        base, adapter = parts[name]
        return float(((result[name].double() - base) * adapter).sum() / adapter.square().sum())

    force_plan(how, how)
    with torch.autocast(device.type, dtype=dtype, enabled=autocast):
        fused = run_op(case, backend)
    unfused = run_unfused(case)
    for name in parts:
        passed, added = gain(fused, name), gain(unfused, name)
        assert 0.9 <= passed <= 1.1, f"{name}: {how} passes {passed:.3f} of the adapter, base then add {added:.3f}"
        assert abs(passed - 1) < abs(added - 1)


def test_lora_linear_reference_passes_gradcheck() -> None:
    g = torch.Generator().manual_seed(0)
    sizes = ((4, 10), (7, 10), (2, 10), (7, 2), (7,))
    inputs = [torch.randn(size, generator=g, dtype=torch.float64).requires_grad_() for size in sizes]
    keep = torch.rand(4, 10, generator=g) > 0.3
    for options in ({}, {"keep": keep, "keep_scale": 1 / 0.7}):
        function = functools.partial(lora_linear_reference, scale=SCALE, **options)
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_lora_linear_reference_equals_the_formula(device: torch.device) -> None:
    case = problem("nf4", (63, 50, 130, 8), torch.float64, device, dropout=0.3)
    options = {"scale": SCALE, "keep": case.keep, "keep_scale": 1 / case.share}
    actual = run(lambda x, A, B, b: lora_linear_reference(x, case.W, A, B, b, **options), case.inputs(), case.grad)
    check(actual, truth(case), TOLERANCE[torch.float64])


@EACH_DROPOUT
@EACH_BACKEND
def test_lora_linear_takes_more_and_fewer_dimensions(device: torch.device, backend: str, dropout: float) -> None:
    """Inputs are [T, B, K] viewed as [B, T, K], and [K]."""
    case = problem("int8", (60, 50, 130, 8), torch.float32, device, backend=backend, dropout=dropout)
    options = {"scale": SCALE, "dropout": dropout, "seed": torch.tensor(SEED), "backend": backend}
    x = case.x.view(5, 12, 50).transpose(0, 1).contiguous().transpose(0, 1).detach().requires_grad_()
    assert not x.is_contiguous()
    y = lora_linear(x, case.base, case.A, case.B, bias_N=case.bias, **options)
    (dx,) = torch.autograd.grad(y, x, case.grad.view(5, 12, 130))
    assert y.shape == (5, 12, 130)
    want = truth(case)
    torch.testing.assert_close(y.detach().view(60, 130).double(), want["y"], rtol=0, atol=1e-5)
    torch.testing.assert_close(dx.view(60, 50).double(), want["x"], rtol=0, atol=1e-5)
    one = lora_linear(case.x[0], case.base, case.A, case.B, bias_N=case.bias, **options)
    assert one.shape == (130,)
    torch.testing.assert_close(one.double(), want["y"][0], rtol=0, atol=1e-5)


def test_lora_linear_without_bias_and_gradient(device: torch.device) -> None:
    case = problem("dense", (20, 50, 33, 8), torch.float32, device)
    y = lora_linear(case.x, case.base, case.A, case.B, scale=SCALE)
    assert not y.requires_grad
    torch.testing.assert_close(y.double(), truth(case)["y"] - case.bias.double(), rtol=0, atol=1e-5)


@EACH_WAY
@EACH_BACKEND
def test_lora_linear_keeps_a_float32_adapter_under_16_bits(
    device: torch.device, force_plan: Any, backend: str, how: str, dropout: float
) -> None:
    """Factors and bias keep their type, and so do their gradients."""
    force_plan(how, how)
    case = problem("nf4", (63, 50, 130, 8), torch.float16, device, backend=backend, dropout=dropout)
    wide = replace(case, A=case.A.float(), B=case.B.float(), bias=case.bias.float())
    actual = run_op(wide, backend)
    assert [actual[name].dtype for name in NAMES] == [torch.float16] * 2 + [torch.float32] * 3
    check(actual, truth(case), TOLERANCE[torch.float16])


@pytest.mark.parametrize(
    ("x", "A", "B", "message"),
    [
        ((4, 49), (8, 50), (130, 8), r"found \[4, 49\], \[8, 50\] and \[130, 8\]"),
        ((4, 50), (8, 49), (130, 8), r"\[8, 49\]"),
        ((4, 50), (8, 50), (129, 8), r"\[129, 8\]"),
        ((4, 50), (8, 50), (130, 7), r"\[130, 7\]"),
    ],
)
def test_lora_linear_refuses_shapes_that_do_not_fit(device: torch.device, x: Any, A: Any, B: Any, message: str) -> None:
    base, _ = weight("dense", 130, 50, torch.float32, device)
    with pytest.raises(ValueError, match=message):
        lora_linear(*(torch.zeros(x, device=device), base), *(torch.zeros(s, device=device) for s in (A, B)), scale=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0, "seed": torch.tensor(1)}, r"\[0, 1\), found 1.0"),
        ({"dropout": -0.1, "seed": torch.tensor(1)}, "found -0.1"),
        ({"dropout": 0.1}, "new_seed"),
        ({"backend": "cuda"}, "found 'cuda'"),
        ({"bias_N": torch.zeros(129)}, "129"),
    ],
)
def test_lora_linear_refuses_options_that_do_not_fit(
    device: torch.device, options: dict[str, Any], message: str
) -> None:
    case = problem("dense", (4, 50, 130, 8), torch.float32, device)
    options = {k: v.to(device) if k == "bias_N" else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        lora_linear(case.x, case.base, case.A, case.B, scale=1.0, **options)


@NEEDS_TRITON
def test_lora_linear_on_triton_refuses_float64(device: torch.device) -> None:
    case = problem("dense", (4, 50, 130, 8), torch.float64, device)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        lora_linear(case.x, case.base, case.A, case.B, scale=1.0, backend="triton")
