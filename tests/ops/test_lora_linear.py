"""lora_linear against the formula in float64: values, gradients, rounding, masks, memory, compilation."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peftlab_kernels import runtime
from peftlab_kernels.lora_linear import (
    BaseWeight,
    DenseWeight,
    Int8Weight,
    Plan,
    dropout_mask,
    lora_linear,
    lora_linear_reference,
    op,
    passes,
    plan,
)
from peftlab_kernels.lora_linear.reference import philox_mask_reference
from peftlab_kernels.nf4_dequant import NF4Weight, nf4_dequant_reference
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from peftlab.models.bnb import import_bitsandbytes

NAMES = ("y", "x", "A", "B", "bias")
SCALE, SEED = 0.7, 77
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
# Triton's interpreter multiplies the bit patterns of bfloat16 (triton#11584).
SIXTEEN_BITS = [
    pytest.param("torch", torch.float16, id="torch-fp16"),
    pytest.param("torch", torch.bfloat16, id="torch-bf16"),
    pytest.param("triton", torch.float16, id="triton-fp16", marks=NEEDS_TRITON),
]
if torch.cuda.is_available():
    SIXTEEN_BITS.append(pytest.param("triton", torch.bfloat16, id="triton-bf16", marks=NEEDS_TRITON))
BACKENDS = [
    pytest.param("torch", torch.float64, id="torch-fp64"),
    pytest.param("torch", torch.float32, id="torch-fp32"),
    pytest.param("triton", torch.float32, id="triton-fp32", marks=NEEDS_TRITON),
    *[p for p in SIXTEEN_BITS if p.values[0] == "triton"],
]
EACH_BACKEND = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
KINDS = ("dense", "nf4", "int8")
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
EACH_DROPOUT = pytest.mark.parametrize("dropout", [0.0, 0.3])
EACH_WAY = pytest.mark.parametrize(("how", "dropout"), [("merged", 0.0), ("split", 0.0), ("split", 0.3)])
# Largest error by the largest value: a product of K <= 130 terms of either sign errs by a few roundings of its result;
# up to five products and sums follow one another. Quantized weights are decoded in float32, whatever x is.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """The tensors of a call, W in float64, and grad: what flows back."""

    base: BaseWeight
    W: Tensor
    x: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor
    grad: Tensor
    dropout: float = 0.0
    keep: Tensor | None = None

    def inputs(self) -> tuple[Tensor, ...]:
        return self.x, self.A, self.B, self.bias

    @property
    def share(self) -> float:
        """What dropout keeps, in steps of its 16-bit lanes."""
        return 1 - _threshold(self.dropout) / 65536


@functools.cache
def weight(kind: str, N: int, K: int, dtype: torch.dtype, device: torch.device) -> tuple[BaseWeight, Tensor]:
    """A base weight and its values in float64."""
    values = (torch.randn(N, K, generator=torch.Generator().manual_seed(1)) / K**0.5).to(device)
    bnb = import_bitsandbytes().functional
    if kind == "dense-fp32":
        return DenseWeight(values), values.double()
    if kind == "dense":
        return DenseWeight(values.to(dtype)), values.to(dtype).double()
    if kind == "int8":
        q, row_absmax, _ = bnb.int8_vectorwise_quant(values.half())
        return Int8Weight(q, row_absmax), q.double() * row_absmax.double()[:, None] / 127
    packed, state = bnb.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    second = (state.state2.code, state.state2.absmax, state.offset)
    W = nf4_dequant_reference(
        packed, state.absmax, state.code.double(), (N, K), nested=tuple(x.double() for x in second), dtype=torch.float64
    )  # fmt: skip
    return NF4Weight(packed, state.absmax, state.code, (N, K), 64, second), W


def _threshold(dropout: float) -> int:
    """A lane of 16 random bits is kept from here on."""
    return round(dropout * 65536)


def mask(M: int, K: int, dropout: float, backend: str, device: torch.device) -> Tensor:
    """[M, K] bool: what the op should keep."""
    philox = backend == "triton" or device.type == "cuda"
    packed = philox_mask_reference(SEED, M, K, dropout) if philox else _sfc64(M, K, dropout)
    return passes.unpack_mask(packed, K).to(device)


def _sfc64(M: int, K: int, dropout: float) -> Tensor:
    return passes._sfc64(torch.empty(M, K), _threshold(dropout), SEED)


def problem(
    kind: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    backend: str = "torch",
    dropout: float = 0.0,
) -> Case:
    """shape: M, K, N, R. The adapter's part is about as large as the base's."""
    M, K, N, R = shape
    base, W = weight(kind, N, K, dtype, device)
    g = torch.Generator().manual_seed(0)
    sizes = ((M, K), (R, K), (N, R), (N,), (M, N))
    x, A, B, bias, dY = (torch.randn(size, generator=g).to(device) for size in sizes)
    keep = mask(M, K, dropout, backend, device) if dropout else None
    tensors = (x, A / K**0.5, B / R**0.5, bias, dY)
    return Case(base, W, *(t.to(dtype) for t in tensors), dropout, keep)


def run(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dY: Tensor) -> dict[str, Tensor]:
    """The output, and the gradient of every input, by name."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    grads = torch.autograd.grad(y, leaves, dY)
    return dict(zip(NAMES, (y.detach(), *grads), strict=True))


def call(case: Case, leaves: Sequence[Tensor], backend: str, **change: Any) -> Tensor:
    x, A, B, bias = leaves
    options = {"scale": SCALE, "dropout": case.dropout, "seed": torch.tensor(SEED), "backend": backend} | change
    return lora_linear(x, case.base, A, B, bias_N=bias, **options)


def run_op(case: Case, backend: str, **change: Any) -> dict[str, Tensor]:
    return run(lambda *leaves: call(case, leaves, backend, **change), case.inputs(), case.grad)


def run_unfused(case: Case) -> dict[str, Tensor]:
    """PEFT's formula in the type of x."""

    def function(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        dropped = x if case.keep is None else x * case.keep * (1 / case.share)
        return F.linear(x, case.W.to(x.dtype), bias) + F.linear(F.linear(dropped, A), B) * SCALE

    return run(function, case.inputs(), case.grad)


def truth(case: Case, x_of_base: Tensor | None = None) -> dict[str, Tensor]:
    """Output and gradients written out in float64. x_of_base: what the base product takes instead of x."""
    x, A, B, bias, dY = (t.double() for t in (*case.inputs(), case.grad))
    D = torch.ones_like(x) if case.keep is None else case.keep.double() / case.share
    dS = SCALE * dY @ B
    return {
        "y": (x if x_of_base is None else x_of_base) @ case.W.T + bias + SCALE * (x * D) @ A.T @ B.T,
        "x": dY @ case.W + D * (dS @ A),
        "A": dS.T @ (x * D),
        "B": SCALE * dY.T @ ((x * D) @ A.T),
        "bias": dY.sum(0),
    }


def check(actual: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    for name in NAMES:
        assert actual[name].shape == want[name].shape, name
        if not actual[name].numel():
            continue
        error = float((actual[name].double() - want[name]).abs().max())
        largest = float(want[name].abs().max())
        assert error <= tolerance * largest, f"{name}: error {error:.3g}, largest value {largest:.3g}"


def tolerance_of(kind: str, dtype: torch.dtype) -> float:
    return TOLERANCE[torch.float32 if kind != "dense" and dtype == torch.float64 else dtype]


@pytest.fixture
def force_plan(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    def force(forward: str, backward: str) -> None:
        monkeypatch.setattr(plan, "choose", lambda *args, **kwargs: Plan(forward, backward))

    return force


@pytest.mark.parametrize(
    "shape", [(0, 50, 130, 8), (1, 130, 50, 1), (63, 130, 50, 64), (63, 50, 97, 100), (1000, 50, 130, 16)]
)
@EACH_DROPOUT
@EACH_KIND
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_values_and_gradients_at_odd_shapes(
    device: torch.device, backend: str, dtype: torch.dtype, kind: str, dropout: float, shape: tuple[int, int, int, int]
) -> None:
    case = problem(kind, shape, dtype, device, backend=backend, dropout=dropout)
    actual = run_op(case, backend)
    assert all(value.dtype == dtype for value in actual.values())
    check(actual, truth(case), tolerance_of(kind, dtype))


@pytest.mark.parametrize("kind", ["dense", "int8"])
@EACH_DROPOUT
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_columns_in_whole_bytes(
    device: torch.device, backend: str, dtype: torch.dtype, dropout: float, kind: str
) -> None:
    case = problem(kind, (129, 96, 256, 8), dtype, device, backend=backend, dropout=dropout)
    check(run_op(case, backend), truth(case), tolerance_of(kind, dtype))


@pytest.mark.parametrize("backward", ["merged", "split"])
@pytest.mark.parametrize("forward", ["merged", "split"])
@EACH_KIND
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_every_plan(
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
def test_library_plan_of_nf4(device: torch.device, force_plan: Any, backend: str, dropout: float) -> None:
    force_plan("library", "split")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    case = problem("nf4", (63, 128, 130, 8), dtype, device, backend=backend, dropout=dropout)
    check(run_op(case, backend), truth(case), TOLERANCE[dtype])


@pytest.mark.parametrize("threshold", [0.0, 2.0])
@EACH_DROPOUT
@EACH_BACKEND
def test_library_plan_of_int8(
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
    # A write that is undone still counts: the backward of whoever saved x then fails.
    version = case.x._version
    call(case, case.inputs(), backend)
    assert case.x._version == version


@EACH_KIND
@pytest.mark.parametrize(
    ("forward", "backward", "dropout"), [("merged", "merged", 0.0), ("split", "split", 0.0), ("split", "split", 0.3)]
)
@pytest.mark.parametrize(("backend", "dtype"), SIXTEEN_BITS)
def test_errs_no_more_than_the_unfused_formula(
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
def test_a_small_adapter_is_not_rounded_away(
    device: torch.device, force_plan: Any, backend: str, dtype: torch.dtype, ratio: float, autocast: bool, kind: str,
    how: str,
) -> None:  # fmt: skip
    """|BA| is an eighth to a quarter of the spacing of 16-bit numbers near W. Added to an output that was rounded before,
    half of the adapter is lost; a weight merged in float32 and rounded once carries all of it on average, and so does
    an output that is rounded once."""
    case = problem(kind, (512, 512, 512, 16), dtype, device)
    B = case.B.double() * (ratio / SCALE * case.W.norm() / (case.B.double() @ case.A.double()).norm())
    case = replace(case, B=B.to(dtype), bias=torch.zeros_like(case.bias))
    BA, W = SCALE * case.B.double() @ case.A.double(), case.W.double()
    parts = {
        "y": (case.x.double() @ W.T, case.x.double() @ BA.T),
        "x": (case.grad.double() @ W, case.grad.double() @ BA),
    }

    def gain(found: dict[str, Tensor], name: str) -> float:
        base, adapter = parts[name]
        return float(((found[name].double() - base) * adapter).sum() / adapter.square().sum())

    force_plan(how, how)
    with torch.autocast(device.type, dtype=dtype, enabled=autocast):
        fused = run_op(case, backend)
    unfused = run_unfused(case)
    for name in parts:
        passed, added = gain(fused, name), gain(unfused, name)
        assert 0.9 <= passed <= 1.1, f"{name}: {how} passes {passed:.3f} of the adapter, base then add {added:.3f}"
        assert abs(passed - 1) < abs(added - 1)


def test_reference_passes_gradcheck() -> None:
    g = torch.Generator().manual_seed(0)
    sizes = ((4, 10), (7, 10), (2, 10), (7, 2), (7,))
    inputs = [torch.randn(size, generator=g, dtype=torch.float64).requires_grad_() for size in sizes]
    keep = torch.rand(4, 10, generator=g) > 0.3
    for options in ({}, {"keep": keep, "keep_scale": 1 / 0.7}):
        function = functools.partial(lora_linear_reference, scale=SCALE, **options)
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_reference_equals_the_formula(device: torch.device) -> None:
    case = problem("nf4", (63, 50, 130, 8), torch.float64, device, dropout=0.3)
    options = {"scale": SCALE, "keep": case.keep, "keep_scale": 1 / case.share}
    actual = run(lambda x, A, B, b: lora_linear_reference(x, case.W, A, B, b, **options), case.inputs(), case.grad)
    check(actual, truth(case), TOLERANCE[torch.float64])


@EACH_WAY
def test_gradcheck(force_plan: Any, how: str, dropout: float) -> None:
    force_plan(how, how)
    case = problem("dense", (5, 10, 7, 2), torch.float64, torch.device("cpu"), dropout=dropout)
    leaves = [t.clone().requires_grad_() for t in case.inputs()]
    assert torch.autograd.gradcheck(lambda *leaves: call(case, leaves, "torch"), leaves)


def _columns_apart(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1).flatten(-2)[..., ::2]


def _transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


@pytest.mark.parametrize("layout", [_columns_apart, _transposed])
@EACH_WAY
@EACH_BACKEND
def test_strided_inputs_and_gradients(
    device: torch.device, force_plan: Any, backend: str, how: str, dropout: float, layout: Callable[[Tensor], Tensor]
) -> None:
    force_plan(how, how)
    case = problem("int8", (63, 50, 130, 8), torch.float32, device, backend=backend, dropout=dropout)
    strided = replace(case, grad=layout(case.grad))
    leaves = [layout(t).detach().requires_grad_() for t in case.inputs()[:3]] + [case.bias.clone().requires_grad_()]
    assert not any(t.is_contiguous() for t in (*leaves[:3], strided.grad))
    y = call(case, leaves, backend)
    grads = torch.autograd.grad(y, leaves, strided.grad)
    check(dict(zip(NAMES, (y.detach(), *grads), strict=True)), truth(case), TOLERANCE[torch.float32])


@EACH_DROPOUT
@EACH_BACKEND
def test_gradient_of_a_sum(device: torch.device, backend: str, dropout: float) -> None:
    """``sum`` sends back one number seen as a matrix, with strides of 0."""
    case = problem("nf4", (63, 50, 130, 8), torch.float32, device, backend=backend, dropout=dropout)
    case = replace(case, grad=torch.ones(1, 1, device=device).expand(63, 130))
    leaves = [t.clone().requires_grad_() for t in case.inputs()]
    y = call(case, leaves, backend)
    y.sum().backward()
    want = truth(case)
    check(dict(zip(NAMES, (y.detach(), *(t.grad for t in leaves)), strict=True)), want, TOLERANCE[torch.float32])


@EACH_DROPOUT
@EACH_BACKEND
def test_more_and_fewer_dimensions(device: torch.device, backend: str, dropout: float) -> None:
    """[T, B, K] seen as [B, T, K], and [K]."""
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


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 2), (0, 3)])
@EACH_WAY
@EACH_BACKEND
def test_only_the_gradients_asked_for(
    device: torch.device, force_plan: Any, backend: str, how: str, dropout: float, wanted: tuple[int, ...]
) -> None:
    force_plan(how, how)
    case = problem("nf4", (20, 50, 33, 8), torch.float32, device, backend=backend, dropout=dropout)
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(case.inputs())]
    y = call(case, leaves, backend)
    y.backward(case.grad)
    want = truth(case)
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in wanted)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), want[NAMES[i + 1]], rtol=0, atol=1e-4)


def test_no_bias_and_no_gradient(device: torch.device) -> None:
    case = problem("dense", (20, 50, 33, 8), torch.float32, device)
    y = lora_linear(case.x, case.base, case.A, case.B, scale=SCALE)
    assert not y.requires_grad
    torch.testing.assert_close(y.double(), truth(case)["y"] - case.bias.double(), rtol=0, atol=1e-5)


@EACH_WAY
@EACH_BACKEND
def test_adapter_in_float32_under_16_bits(
    device: torch.device, force_plan: Any, backend: str, how: str, dropout: float
) -> None:
    """Factors and bias keep their type, and so do their gradients."""
    force_plan(how, how)
    case = problem("nf4", (63, 50, 130, 8), torch.float16, device, backend=backend, dropout=dropout)
    wide = replace(case, A=case.A.float(), B=case.B.float(), bias=case.bias.float())
    actual = run_op(wide, backend)
    assert [actual[name].dtype for name in NAMES] == [torch.float16] * 2 + [torch.float32] * 3
    check(actual, truth(case), TOLERANCE[torch.float16])


@EACH_KIND
@EACH_WAY
@EACH_BACKEND
def test_second_backward_gives_the_same_gradients(
    device: torch.device, force_plan: Any, backend: str, how: str, dropout: float, kind: str
) -> None:
    """Also after another call has taken the same scratch memory."""
    force_plan(how, how)
    case = problem(kind, (63, 50, 130, 8), torch.float32, device, backend=backend, dropout=dropout)
    other = problem(kind, (7, 50, 130, 4), torch.float32, device)
    leaves = [t.clone().requires_grad_() for t in case.inputs()]
    y = call(case, leaves, backend)
    first = torch.autograd.grad(y, leaves, case.grad, retain_graph=True)
    run_op(other, backend, scale=-3.0, dropout=0.0)
    second = torch.autograd.grad(y, leaves, case.grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("loss", [lambda y: y.square().sum(), torch.sum], ids=["square", "sum"])
@EACH_DROPOUT
@EACH_BACKEND
def test_double_backward_is_refused(
    device: torch.device, backend: str, dropout: float, loss: Callable[[Tensor], Tensor]
) -> None:
    """As in a gradient penalty. What flows back from ``sum`` needs no gradient itself, but the result depends on A."""
    case = problem("dense", (5, 10, 7, 2), torch.float32, device, backend=backend, dropout=dropout)
    leaves = [t.clone().requires_grad_() for t in case.inputs()]
    y = call(case, leaves, backend)
    (gradient,) = torch.autograd.grad(loss(y), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        (loss(y) + gradient.square().sum()).backward()


@pytest.mark.parametrize(
    ("how", "dropout", "kind"),
    [
        *((how, dropout, kind) for how, dropout in [("merged", 0.0), ("split", 0.0), ("split", 0.3)] for kind in KINDS),
        *(("library", 0.0, kind) for kind in KINDS if kind != "dense"),
    ],
)
@EACH_BACKEND
def test_inputs_are_left_alone(
    device: torch.device, force_plan: Any, backend: str, how: str, dropout: float, kind: str
) -> None:
    force_plan(how, "merged" if how == "merged" else "split")
    case = problem(kind, (63, 128, 130, 8), torch.float16, device, backend=backend, dropout=dropout)
    leaves = [t.clone().requires_grad_() for t in case.inputs()]
    seed = torch.tensor(SEED)
    watched = [*leaves, case.grad, seed, *case.base.tensors()]
    before = [t.detach().clone() for t in watched]
    versions = [t._version for t in watched]
    y = call(case, leaves, backend, seed=seed)
    y.backward(case.grad)
    assert all(torch.equal(a, b) for a, b in zip(watched, before, strict=True))
    assert versions == [t._version for t in watched]


def _saved_bytes(case: Case, backend: str) -> int:
    """Bytes of the memory that autograd holds for backward beyond the inputs themselves."""
    leaves = [t.clone().requires_grad_() for t in case.inputs()]
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(case, leaves, backend)
    own = {t.untyped_storage().data_ptr() for t in leaves}
    assert leaves[0].untyped_storage().data_ptr() in held, "the measure must see x"
    return sum(size for pointer, size in held.items() if pointer not in own)


@EACH_KIND
@EACH_WAY
@EACH_BACKEND
def test_what_is_saved(
    device: torch.device, force_plan: Any, backend: str, how: str, dropout: float, kind: str
) -> None:
    """x A^T where the output is made of it, and under dropout one bit per element of x."""
    M, K, R = 63, 130, 4
    force_plan(how, how)
    case = problem(kind, (M, K, 50, R), torch.float16, device, backend=backend, dropout=dropout)
    S_bytes, mask_bytes = 2 * M * R if how == "split" else 0, M * -(-K // 8) if dropout else 0
    assert _saved_bytes(case, backend) == S_bytes + mask_bytes


def _mask_of(M: int, K: int, dropout: float, seed: int, backend: str, device: torch.device, R: int = 4) -> Tensor:
    """[M, ceil(K / 8)]: the packed mask that a call draws."""
    _, packed = passes.dropout_down(
        torch.zeros(M, K, device=device), torch.zeros(R, K, device=device), dropout, torch.tensor(seed), backend
    )
    return packed


@NEEDS_TRITON
@pytest.mark.parametrize("seed", [0, 5, 2**31, 2**32 - 1, 2**40 + 3, 2**62 - 1])
@pytest.mark.parametrize("dropout", [0.05, 0.3, 0.9])
def test_triton_mask_is_philox(device: torch.device, dropout: float, seed: int) -> None:
    for M, K in [(63, 130), (1, 1), (65, 50)]:
        want = philox_mask_reference(seed, M, K, dropout)
        assert torch.equal(_mask_of(M, K, dropout, seed, "triton", device).cpu(), want)
        alone = passes.draw_mask(torch.empty(M, K, device=device), dropout, torch.tensor(seed), "triton")
        assert torch.equal(alone.cpu(), want)


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**40 + 3, 2**62 - 1])
def test_pytorchs_philox_is_the_references(device: torch.device, seed: int) -> None:
    """What a GPU without Triton draws."""
    for M, K in [(63, 130), (1, 1), (65, 50)]:
        want, value = philox_mask_reference(seed, M, K, 0.3), torch.tensor(seed, device=device)
        assert torch.equal(passes._philox(slice(0, M), K, _threshold(0.3), value).cpu(), want)
        part = slice(M // 3, M)
        assert torch.equal(passes._philox(part, K, _threshold(0.3), value).cpu(), want[part])


def test_philox_reference_gives_the_published_words() -> None:
    """Known answers of Philox-4x32 with counter and key 0 (Random123, kat_vectors), 7 and 10 rounds: a lane of 16 bits
    is kept at a threshold of itself and dropped at the next."""
    published = {
        7: (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
        10: (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    }
    for rounds, words in published.items():
        for i, lane in enumerate(half for word in words for half in (word & 0xFFFF, word >> 16)):
            kept, dropped = (
                int(philox_mask_reference(0, 1, 8, (lane + more) / 65536, rounds=rounds)) >> i & 1 for more in (0, 1)
            )
            assert (kept, dropped) == (1, 0), f"{rounds} rounds, lane {i}"


@NEEDS_TRITON
@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (128, 32)])
def test_mask_does_not_depend_on_the_tile(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int]
) -> None:
    want = _mask_of(90, 130, 0.3, SEED, "triton", device)
    options = passes.down_options
    other = {"BLOCK_M": tile[0], "BLOCK_K": tile[1]}
    monkeypatch.setattr(passes, "down_options", lambda *args: options(*args) | other)
    assert torch.equal(_mask_of(90, 130, 0.3, SEED, "triton", device), want)
    assert torch.equal(_mask_of(90, 130, 0.3, SEED, "triton", device, R=100), want)


@pytest.mark.parametrize("dropout", [0.05, 0.5])
@EACH_BACKEND
def test_share_kept(device: torch.device, backend: str, dropout: float) -> None:
    """Within 5 sigma: in all, in each of the 8 places of a byte, and agreeing with the mask of another seed."""
    M, K = 128, 400
    share = 1 - _threshold(dropout) / 65536

    def within(kept: Tensor, expected: float) -> None:
        sigma = (expected * (1 - expected) / kept.numel()) ** 0.5
        assert abs(float(kept.double().mean()) - expected) < 5 * sigma

    first, second = (passes.unpack_mask(_mask_of(M, K, dropout, seed, backend, device), K) for seed in (SEED, SEED + 1))
    within(first, share)
    for place in range(8):
        within(first[:, place::8], share)
    within(first == second, share**2 + (1 - share) ** 2)
    within(first[:, 1:] == first[:, :-1], share**2 + (1 - share) ** 2)
    within(first[1:] == first[:-1], share**2 + (1 - share) ** 2)


@EACH_BACKEND
def test_a_seed_gives_one_mask(device: torch.device, backend: str) -> None:
    first, again, other = (_mask_of(63, 130, 0.3, seed, backend, device) for seed in (SEED, SEED, SEED + 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    case = problem("dense", (63, 50, 130, 8), torch.float32, device, backend=backend, dropout=0.3)
    a, b, c = (run_op(case, backend, seed=torch.tensor(seed)) for seed in (SEED, SEED, SEED + 1))
    assert all(torch.equal(a[name], b[name]) for name in NAMES)
    assert not any(torch.equal(a[name], c[name]) for name in ("y", "x", "A", "B"))


def test_torch_mask_in_pieces(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows beyond the first piece: the same rule for mask, values and gradients."""
    monkeypatch.setattr(passes, "_PIECE", dict.fromkeys(passes._PIECE, 1000))
    case = problem("dense", (63, 50, 130, 8), torch.float64, device, dropout=0.3)
    check(run_op(case, "torch"), truth(case), TOLERANCE[torch.float64])


@EACH_BACKEND
def test_dropout_mask_is_the_one_drawn(device: torch.device, backend: str) -> None:
    case = problem("dense", (60, 50, 130, 8), torch.float32, device, backend=backend, dropout=0.3)
    keep, keep_scale = dropout_mask(case.x.view(5, 12, 50), 0.3, torch.tensor(SEED), backend=backend)
    assert torch.equal(keep.view(60, 50), case.keep)
    assert keep_scale == pytest.approx(1 / case.share, rel=1e-15)


def test_unpack_mask(device: torch.device) -> None:
    packed = torch.tensor([[0b00000001, 0b10000010], [0b11111110, 0b00000000]], dtype=torch.uint8, device=device)
    got = passes.unpack_mask(packed, 10).int().tolist()
    assert got == [[1, 0, 0, 0, 0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1, 1, 1, 0, 0]]


@EACH_BACKEND
def test_checkpointing_replays_the_mask(device: torch.device, backend: str) -> None:
    case = problem("nf4", (63, 50, 130, 8), torch.float32, device)

    def layer(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        y = lora_linear(
            x, case.base, A, B, scale=SCALE, dropout=0.3, seed=runtime.new_seed(x.device), backend=backend
        )  # fmt: skip
        return torch.tanh(y)

    def grads(**options: Any) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in case.inputs()[:3]]
        torch.manual_seed(0)
        y = checkpoint(layer, *leaves, use_reentrant=False, **options) if options else layer(*leaves)
        return list(torch.autograd.grad(y, leaves, case.grad))

    plain = grads()
    assert all(torch.equal(a, b) for a, b in zip(plain, grads(preserve_rng_state=True), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain, grads(preserve_rng_state=False), strict=True))


@pytest.mark.parametrize(("how", "wanted"), [("merged", 1), ("split", 2)])
def test_a_recomputed_forward_makes_s_once(
    device: torch.device, force_plan: Any, monkeypatch: pytest.MonkeyPatch, how: str, wanted: int
) -> None:
    """Activation checkpointing throws away what the first forward saves. Where the output needs no S, backward makes it."""
    force_plan(how, how)
    case = problem("nf4", (63, 50, 130, 8), torch.float32, device)
    made: list[Tensor] = []
    down = op._down
    monkeypatch.setattr(op, "_down", lambda x, A: (made.append(x), down(x, A))[1])
    leaves = [t.clone().requires_grad_() for t in case.inputs()]

    def layer(*tensors: Tensor) -> Tensor:
        return torch.tanh(call(case, tensors, "torch"))

    found = torch.autograd.grad(checkpoint(layer, *leaves, use_reentrant=False), leaves, case.grad)
    assert len(made) == wanted
    plain = torch.autograd.grad(layer(*leaves), leaves, case.grad)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    made.clear()
    with torch.no_grad():
        layer(*leaves)
    assert len(made) == wanted - 1, "without backward only what the output needs"


@pytest.mark.gpu
@NEEDS_TRITON
def test_a_graph_draws_a_fresh_mask_at_each_replay() -> None:
    """Captured once; each replay has the mask of a seed of its own, and that mask is the NumPy reference's."""
    device = torch.device("cuda")
    case = problem("dense", (64, 48, 128, 8), torch.float16, device)

    def forward() -> tuple[Tensor, Tensor]:
        seed = runtime.new_seed(device)
        y = lora_linear(case.x, case.base, case.A, case.B, scale=SCALE, dropout=0.5, seed=seed)
        return y, seed

    torch.manual_seed(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, seed = forward()
    seeds = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        seeds.append(int(seed))
        keep = passes.unpack_mask(philox_mask_reference(seeds[-1], 64, 48, 0.5), 48).to(device)
        want = lora_linear_reference(
            case.x.double(), case.W, case.A.double(), case.B.double(), scale=SCALE, keep=keep, keep_scale=2.0
        )
        assert float((y.double() - want).abs().max()) <= TOLERANCE[torch.float16] * float(want.abs().max())
    assert len(set(seeds)) == 3


def test_the_seed_stays_where_it_is(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value is never asked for on the way to a kernel: on a GPU that would wait for the device, and be a constant of a
    captured graph."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the kernels need Triton")
    seen: list[Any] = []
    monkeypatch.setattr(runtime, "launch", lambda kernel, grid, *args, **options: seen.append(args))
    seed = torch.tensor(SEED, device=device)
    x, A = torch.zeros(63, 130, device=device), torch.zeros(4, 130, device=device)
    passes.dropout_down(x, A, 0.3, seed, "triton")
    passes.draw_mask(x, 0.3, seed, "triton")
    assert len(seen) == 2
    for args in seen:
        assert any(arg is seed for arg in args) and SEED not in [arg for arg in args if isinstance(arg, int)]


def test_new_seed_follows_the_default_generator() -> None:
    torch.manual_seed(0)
    first, second = runtime.new_seed(), runtime.new_seed()
    torch.manual_seed(0)
    assert int(runtime.new_seed()) == int(first) != int(second)
    assert first.dtype == torch.int64 and first.shape == () and first.device.type == "cpu"


@pytest.mark.gpu
def test_new_seed_follows_the_generator_of_its_device() -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    first, second = runtime.new_seed(device), runtime.new_seed(device)
    torch.manual_seed(0)
    assert int(runtime.new_seed(device)) == int(first) != int(second)
    assert first.dtype == torch.int64 and first.shape == () and first.device.type == "cuda"


@EACH_KIND
@EACH_WAY
@EACH_BACKEND
def test_training_after_inference_mode(
    device: torch.device, force_plan: Any, backend: str, how: str, dropout: float, kind: str
) -> None:
    """An evaluation first, under inference mode: memory it allocated must serve training too."""
    force_plan(how, how)
    case = problem(kind, (63, 50, 130, 8), torch.float32, device, backend=backend, dropout=dropout)
    runtime.release_scratch()
    try:
        with torch.inference_mode():
            lora_linear(case.x, case.base, case.A, case.B, scale=SCALE, backend=backend)
        check(run_op(case, backend), truth(case), TOLERANCE[torch.float32])
    finally:
        runtime.release_scratch()


def test_a_measured_plan_cannot_merge_dropout(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A table that asks for it is refused, or has no effect: the gradients stay right."""
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
def test_sixteen_bit_weights_are_never_merged(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    weight_dtype: torch.dtype,
    dtype: torch.dtype,
    merged: bool,
) -> None:
    """A measured plan asks for it; only where W is not on the 16-bit grid of x does it get it."""
    row = plan.key_of("dense", device, M=63, N=130, K=50, dropout=False)._asdict()
    table = tmp_path / "plans.json"
    table.write_text(json.dumps({"plans": [row | {"forward": "merged", "backward": "merged"}]}), encoding="utf-8")
    asked: list[bool] = []

    def as_float(*args: Any, low_rank: Any = None, **kwargs: Any) -> Tensor:
        asked.append(low_rank is not None)
        return _AS_FLOAT(*args, low_rank=low_rank, **kwargs)

    monkeypatch.setattr(op, "as_float", as_float)
    case = problem("dense", (63, 50, 130, 8), weight_dtype, device)
    case = replace(case, x=case.x.to(dtype), grad=case.grad.to(dtype))
    plan.use_table(table)
    try:
        run_op(case, "torch")
    finally:
        plan.use_table(None)
    assert asked == [merged, merged]


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
def test_deliberate_faults_are_caught(
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


@pytest.mark.parametrize(
    ("x", "A", "B", "found"),
    [
        ((4, 49), (8, 50), (130, 8), r"found \[4, 49\], \[8, 50\] and \[130, 8\]"),
        ((4, 50), (8, 49), (130, 8), r"\[8, 49\]"),
        ((4, 50), (8, 50), (129, 8), r"\[129, 8\]"),
        ((4, 50), (8, 50), (130, 7), r"\[130, 7\]"),
    ],
)
def test_shapes_that_do_not_fit(device: torch.device, x: Any, A: Any, B: Any, found: str) -> None:
    base, _ = weight("dense", 130, 50, torch.float32, device)
    with pytest.raises(ValueError, match=found):
        lora_linear(*(torch.zeros(x, device=device), base), *(torch.zeros(s, device=device) for s in (A, B)), scale=1.0)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"dropout": 1.0, "seed": torch.tensor(1)}, r"\[0, 1\), found 1.0"),
        ({"dropout": -0.1, "seed": torch.tensor(1)}, "found -0.1"),
        ({"dropout": 0.1}, "new_seed"),
        ({"backend": "cuda"}, "found 'cuda'"),
        ({"bias_N": torch.zeros(129)}, "129"),
    ],
)
def test_options_that_do_not_fit(device: torch.device, options: dict[str, Any], found: str) -> None:
    case = problem("dense", (4, 50, 130, 8), torch.float32, device)
    options = {k: v.to(device) if k == "bias_N" else v for k, v in options.items()}
    with pytest.raises(ValueError, match=found):
        lora_linear(case.x, case.base, case.A, case.B, scale=1.0, **options)


@NEEDS_TRITON
def test_triton_refuses_float64(device: torch.device) -> None:
    case = problem("dense", (4, 50, 130, 8), torch.float64, device)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        lora_linear(case.x, case.base, case.A, case.B, scale=1.0, backend="triton")


@EACH_KIND
@EACH_DROPOUT
@EACH_BACKEND
def test_opcheck(device: torch.device, backend: str, dropout: float, kind: str) -> None:
    case = problem(kind, (9, 50, 33, 4), torch.float32, device, backend=backend, dropout=dropout)
    tensors, name, numbers, threshold = op._pack(case.base)
    rest = (tensors, name, numbers, threshold, SCALE, dropout, backend)
    seed = torch.tensor(SEED) if dropout else None
    leaves = [t.clone().requires_grad_() for t in case.inputs()]
    torch.library.opcheck(torch.ops.peftlab.lora_linear.default, (*leaves, seed, *rest))
    with torch.no_grad():
        _, S, packed = torch.ops.peftlab.lora_linear(*leaves, seed, *rest)
    torch.library.opcheck(
        torch.ops.peftlab.lora_linear_backward.default, (case.grad, *case.inputs()[:3], S, packed, *rest)
    )


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Inductor's CPU code needs a C++ compiler, and half a minute for the first graph.
COMPILERS = ["aot_eager"] + (["inductor"] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("compiler", COMPILERS)
@EACH_KIND
@EACH_DROPOUT
@EACH_BACKEND
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_whole(device: torch.device, backend: str, dropout: float, kind: str, compiler: str) -> None:
    """One graph, the seed drawn within it, and the results of eager code."""
    case = problem(kind, (10, 50, 33, 4), torch.float32, device)

    def layer(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        seed = runtime.new_seed() if dropout else None
        y = lora_linear(
            2 * x.view(2, 5, 50), case.base, A, B, bias_N=bias, scale=SCALE, dropout=dropout, seed=seed, backend=backend
        )
        return torch.tanh(y).view(10, 33)

    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    results = []
    for function in (layer, compiled):
        torch.manual_seed(0)
        results.append(run(function, case.inputs(), case.grad))
    eager, graph = results
    for name in NAMES:
        torch.testing.assert_close(graph[name], eager[name], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_for_any_number_of_rows(device: torch.device) -> None:
    graphs = []

    def counting(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    base, _ = weight("dense", 33, 50, torch.float32, device)
    compiled = torch.compile(
        lambda x, A, B: lora_linear(x, base, A, B, scale=SCALE, backend="torch"), fullgraph=True, dynamic=True,
        backend=counting,
    )  # fmt: skip
    for M in (3, 7, 20):
        case = problem("dense", (M, 50, 33, 4), torch.float32, device)
        want = lora_linear(case.x, base, case.A, case.B, scale=SCALE, backend="torch")
        torch.testing.assert_close(compiled(case.x, case.A, case.B), want, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
