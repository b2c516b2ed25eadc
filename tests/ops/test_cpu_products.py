"""Products with operands rounded for a processor's matrix units, against the float64 formula of the rounded values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from peftlab_kernels import runtime
from peftlab_kernels.lora_linear import BaseWeight, DenseWeight, Int8Weight, cpu_products, lora_linear
from peftlab_kernels.nf4_dequant import NF4Weight, nf4_dequant_reference
from torch import Tensor

from peftlab.models.bnb import import_bitsandbytes

K, N, R, SCALE = 64, 48, 4, 0.7
# One row, below, at and above a multiple of the step of rows, a block, several blocks.
ROWS = (1, 31, 32, 33, 512, 513, 1100)
EACH_KIND = pytest.mark.parametrize("kind", ["dense", "nf4", "int8"])


@pytest.fixture(autouse=True)
def here(any_processor: None) -> Iterator[None]:
    yield
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16", "the setting of the process is as before"


def bf16_units() -> bool:
    """Whether a product rounds its operands here."""
    x = torch.full((64, 64), 1.0) + 2.0**-12
    with cpu_products._bf16_operands():
        return bool((x @ torch.eye(64) != x).any())


@dataclass(frozen=True)
class Case:
    x: Tensor
    base: BaseWeight
    W_NK: Tensor
    A_RK: Tensor
    B_NR: Tensor
    bias: Tensor
    back: Tensor


def make(kind: str, M: int, *, threshold: float = 0.0) -> Case:
    generator = torch.Generator().manual_seed(M)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W_NK = randn(N, K)
    base: BaseWeight = DenseWeight(W_NK)
    if kind == "int8":
        absmax = W_NK.abs().amax(1)
        base = Int8Weight((W_NK / absmax[:, None] * 127).round().to(torch.int8), absmax, threshold)
        W_NK = base.weight.double() * absmax.double()[:, None] / 127
    if kind == "nf4":
        packed = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, generator=generator)
        absmax = 1 + torch.rand(N * K // 64, generator=generator)
        code = import_bitsandbytes().functional.get_4bit_type("nf4", device="cpu")
        base = NF4Weight(packed, absmax, code, (N, K))
        W_NK = nf4_dequant_reference(packed, absmax, code, (N, K))
    return Case(randn(M, K), base, W_NK.double(), randn(R, K), randn(N, R), randn(N), randn(M, N))


def run(case: Case, backend: str) -> tuple[Tensor, ...]:
    """y and the gradients of x, A, B and the bias."""
    leaves = [t.clone().requires_grad_() for t in (case.x, case.A_RK, case.B_NR, case.bias)]
    x, A, B, bias = leaves
    y = lora_linear(x, case.base, A, B, scale=SCALE, bias_N=bias, backend=backend)
    return y.detach(), *torch.autograd.grad(y, leaves, case.back)


def bf16(value: Tensor) -> Tensor:
    return value.float().to(torch.bfloat16).double() if bf16_units() else value.double()


def int8_rows(x: Tensor, threshold: float) -> Tensor:
    """LLM.int8 on the columns below the threshold, exactly, row by row."""
    x = x.double()
    apart = (x.abs() >= threshold).any(0) if threshold else torch.zeros(x.shape[1], dtype=torch.bool)
    out = x.clone()
    for row in out:
        inside = torch.where(apart, 0.0, row)
        step = float((inside.abs().max().float() / 127).double())
        row.copy_(torch.where(apart, row, (inside / step).round() * step if step else inside))
    return out


def expected(case: Case, operands: str, threshold: float = 0.0) -> tuple[Tensor, ...]:
    x, A, B, dY = (t.double() for t in (case.x, case.A_RK, case.B_NR, case.back))
    if operands == "bf16":
        product, back = bf16(case.x) @ bf16(case.W_NK).t(), bf16(case.back) @ bf16(case.W_NK)
    else:
        product, back = int8_rows(case.x, threshold) @ case.W_NK.t(), dY @ case.W_NK
    y = product + case.bias.double() + SCALE * (x @ A.t()) @ B.t()
    dS = SCALE * dY @ B
    return y, back + dS @ A, dS.t() @ x, SCALE * dY.t() @ (x @ A.t()), dY.sum(0)


def errors(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> list[float]:
    return [float((g.double() - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True)]


# float32 sums of K = 64 terms, or of 1,100 rows in the gradients. An int8 value between two steps may go either way,
# which is one step (1/127 of the row's largest value) times one weight.
BUDGET = {"bf16": 2e-6, "int8": 3e-4}


@pytest.mark.parametrize("M", ROWS)
@EACH_KIND
def test_cpu_products_bf16_equal_the_product_of_rounded_operands(kind: str, M: int) -> None:
    case = make(kind, M)
    worst = errors(run(case, "cpu-bf16"), expected(case, "bf16"))
    assert max(worst) <= BUDGET["bf16"], worst


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_cpu_products_int8_equal_the_product_of_rounded_rows(M: int, threshold: float) -> None:
    case = make("int8", M, threshold=threshold)
    worst = errors(run(case, "cpu-int8"), expected(case, "int8", threshold))
    assert max(worst) <= BUDGET["int8"], worst


@pytest.mark.parametrize(("backend", "most"), [("cpu-bf16", 6e-3), ("cpu-int8", 2e-2)])
def test_cpu_products_round_no_more_than_their_type(backend: str, most: float) -> None:
    """The exact formula is the reference. A bfloat16 has 8 bits, an int8 7."""
    case = make("int8", 300)
    exact, rounded = run(case, "auto"), run(case, backend)
    differ = [float((a - b).norm() / a.norm()) for a, b in zip(exact, rounded, strict=True)]
    assert max(differ) < most
    assert differ[0] > 1e-4 or (backend == "cpu-bf16" and not bf16_units())
    assert max(differ[2:]) < 1e-6, "the adapter's own products stay exact"


def test_cpu_products_multiply_columns_with_outliers_apart() -> None:
    """A single column of 80 would leave one or two steps to the other values of its rows."""
    case = make("int8", 200, threshold=6.0)
    case.x[:, 5] = 80.0
    case.x[17] = 0.0  # a row without a largest value
    assert isinstance(case.base, Int8Weight)
    exact = run(case, "auto")[0]
    apart = float((run(case, "cpu-int8")[0] - exact).norm())
    together = replace(case, base=replace(case.base, threshold=0.0))
    assert 8 * apart < float((run(together, "cpu-int8")[0] - exact).norm())


@pytest.mark.parametrize("fault", ["row scale", "last block", "weight scale"])
def test_cpu_products_deliberate_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("int8", 33)
    if fault == "row scale":
        right = cpu_products._quantize_rows
        monkeypatch.setattr(
            cpu_products, "_quantize_rows", lambda r, s: (lambda q, t: (q, t.mean().expand_as(t)))(*right(r, s))
        )
    elif fault == "weight scale":
        monkeypatch.setattr(cpu_products, "_STEPS_INT8", 128.0)
    else:
        monkeypatch.setattr(cpu_products, "_blocks", lambda M: iter([(0, 32, 32)]))
    assert max(errors(run(case, "cpu-int8"), expected(case, "int8"))) > 3 * BUDGET["int8"]


def test_cpu_products_ignore_old_values_in_scratch_memory() -> None:
    case = make("dense", 33)
    clean = run(case, "cpu-bf16")
    for held in runtime._buffers.held.values():
        if held.is_floating_point():
            held.fill_(float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(clean, run(case, "cpu-bf16"), strict=True))


def test_cpu_products_refuse_other_weights_and_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("dense", 8)
    with pytest.raises(ValueError, match="cpu-int8 cannot run: the weight is not stored in int8 but as DenseWeight"):
        run(case, "cpu-int8")
    monkeypatch.setattr(runtime, "operands_problem", lambda backend: "the processor has none of AMX")
    with pytest.raises(ValueError, match="cpu-bf16 cannot run: the processor has none of AMX"):
        run(case, "cpu-bf16")


def test_cpu_products_leave_float64_exact() -> None:
    case = make("dense", 40)
    x, A, B = (t.double() for t in (case.x, case.A_RK, case.B_NR))
    y = lora_linear(x, DenseWeight(case.W_NK), A, B, scale=SCALE, backend="cpu-bf16")
    assert torch.equal(y, lora_linear(x, DenseWeight(case.W_NK), A, B, scale=SCALE))


def test_cpu_products_name_the_missing_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    runtime.operands_problem.cache_clear()  # an earlier test may have asked
    for name in ("amx_tile", "avx512_bf16", "vnni"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: False, raising=False)
    try:
        assert runtime.operands_problem("cpu-bf16") == "the processor has none of AMX, AVX512-BF16"
        assert runtime.operands_problem("cpu-int8") == "the processor has none of AVX512-VNNI"
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True, raising=False)
        monkeypatch.setattr(runtime, "int8_saturates", lambda: True)
        runtime.operands_problem.cache_clear()
        assert runtime.operands_problem("cpu-int8") == "its int8 products overflow 16-bit sums"
    finally:
        monkeypatch.undo()
        runtime.operands_problem.cache_clear()
