"""linear_cross_entropy and linear_kl against formulas in float64: values, every gradient, layouts, refused inputs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peftlab_kernels import linear_kl as kl
from peftlab_kernels.linear_cross_entropy import head_logits_reference, linear_cross_entropy
from peftlab_kernels.linear_kl import DIVERGENCES, DenseTeacher, linear_kl
from peftlab_kernels.lora_linear import DenseWeight
from torch import Tensor
from torch.nn import functional as F

from tests.ops.linear_losses_examples import (
    EACH_BACKEND,
    EACH_DIVERGENCE,
    EACH_HEAD,
    NEEDS_TRITON,
    Budget,
    H,
    N,
    Taught,
    V,
    ce,
    ce_formula,
    check,
    distilled,
    gradients,
    kl_formula,
    make_case,
    make_teacher,
)


@EACH_HEAD
@EACH_BACKEND
def test_linear_cross_entropy_equals_the_formula(
    assert_within_budget: Budget, name: str, backend: str, dtype: torch.dtype
) -> None:
    case = make_case(name, dtype)
    check(assert_within_budget, case, lambda c: ce(c, chunk=5, backend=backend).total, ce_formula)


@EACH_DIVERGENCE
@pytest.mark.parametrize(
    ("way", "hard_weight", "temperature"), [("online", 0.0, 2.0), ("online", 0.3, 1.0), ("dense", 0.3, 2.0)]
)
@EACH_BACKEND
def test_linear_kl_divergences_equal_the_formula(
    assert_within_budget: Budget, divergence: str, way: str, hard_weight: float, temperature: float, backend: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    if divergence == "tvd" and dtype.itemsize == 2:
        way = (
            "dense"  # its gradient jumps where p = q; both sides jump in the same place only with equal teacher logits
        )
    case = make_case("dense+trained+softcap" if way == "online" else "dense+padded", dtype)
    taught = make_teacher(case, way)
    options: dict[str, Any] = {
        "divergence": divergence, "share": 0.3, "temperature": temperature, "hard_weight": hard_weight, "chunk": 5,
    }  # fmt: skip
    check(
        assert_within_budget,
        case,
        lambda c: distilled(c, taught, backend=backend, **options).total,
        lambda c, d: kl_formula(c, d, taught, **options),
    )


@EACH_HEAD
@EACH_BACKEND
def test_linear_kl_of_every_head_equals_the_formula(
    assert_within_budget: Budget, name: str, backend: str, dtype: torch.dtype
) -> None:
    case = make_case(name, dtype)
    taught = make_teacher(case, "online")
    options: dict[str, Any] = {"temperature": 1.5, "hard_weight": 0.2, "chunk": 6}
    check(
        assert_within_budget,
        case,
        lambda c: distilled(c, taught, backend=backend, **options).total,
        lambda c, d: kl_formula(c, d, taught, **options),
    )


@settings(max_examples=25, deadline=None)
@example(n=1, chunk=1, seed=3, name="dense+softcap")
@given(
    n=st.integers(1, 9),
    chunk=st.integers(1, 12),
    seed=st.integers(0, 99),
    name=st.sampled_from(["dense+softcap", "dense+trained+bias", "nf4+lora"]),
)
def test_linear_losses_do_not_depend_on_chunks(n: int, chunk: int, seed: int, name: str) -> None:
    case = replace(make_case(name, torch.float64, n=n, seed=seed))
    taught = make_teacher(case, "online")
    whole = gradients(case, lambda c: distilled(c, taught, hard_weight=0.4, chunk=n).total)
    parts = gradients(case, lambda c: distilled(c, taught, hard_weight=0.4, chunk=chunk).total)
    for key, want in whole.items():
        torch.testing.assert_close(parts[key], want, rtol=1e-5 if "nf4" in name else 1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
@pytest.mark.parametrize("n", [0, 1])
def test_linear_losses_of_no_or_one_token_are_finite(n: int, backend: str) -> None:
    case = make_case("dense+trained+bias", torch.float32, n=n)
    for total in (
        lambda c: ce(c, backend=backend).total,
        lambda c: distilled(c, make_teacher(c, "online"), backend=backend).total,
        lambda c: distilled(c, make_teacher(c, "sparse"), backend=backend).total,
    ):
        grads = gradients(case, total)
        assert grads["hidden"].shape == (n, H)
        assert all(torch.isfinite(t).all() for t in grads.values())
        assert n or not grads["weight"].any()


@EACH_BACKEND
def test_linear_losses_of_extreme_logits_are_finite_and_right(
    assert_within_budget: Budget, backend: str, dtype: torch.dtype
) -> None:
    std = 300.0 if dtype == torch.float16 else 3000.0
    case = make_case("dense", dtype, std=std)
    assert float(case.logits(torch.float64).abs().max()) > 3 * std
    check(assert_within_budget, case, lambda c: ce(c, backend=backend).total, ce_formula)
    taught = make_teacher(case, "online")
    for divergence in DIVERGENCES:
        options = {"divergence": divergence, "share": 0.3, "hard_weight": 0.5}
        grads = gradients(case, lambda c, o=options: distilled(c, taught, backend=backend, **o).total)
        want = kl.token_divergence(case.logits(torch.float64), taught.logits, kind=divergence, share=0.3)
        soft = distilled(case, taught, backend=backend, **options).soft
        assert soft is not None and all(torch.isfinite(t).all() for t in grads.values())
        if dtype.itemsize > 2:  # 16-bit logits of this size are whole nats apart
            torch.testing.assert_close(soft.double(), want, rtol=1e-5, atol=1e-5 * float(want.max()))


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
def test_linear_losses_do_not_change_their_inputs(backend: str) -> None:
    case = make_case("dense+trained+bias+lora+dropped+softcap", torch.float32)
    for way in ("online", "dense", "sparse"):
        taught = make_teacher(case, way)
        values = [v for v in vars(taught.teacher).values() if isinstance(v, Tensor)]
        tensors = [*case.leaves().values(), case.target, case.weights, *values]
        before = [t.detach().clone() for t in tensors]
        gradients(case, lambda c, t=taught: distilled(c, t, hard_weight=0.5, backend=backend).total)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_linear_losses_take_non_contiguous_inputs(assert_within_budget: Budget) -> None:
    case = make_case("dense", torch.float32)
    wide = torch.stack([case.hidden, case.hidden * 0], dim=-1)[..., 0]
    weight = case.head.weight.weight.T.contiguous().T
    assert not wide.is_contiguous() and not weight.is_contiguous()
    case = replace(case, hidden=wide, head=replace(case.head, weight=DenseWeight(weight)))
    check(assert_within_budget, case, lambda c: ce(c).total, ce_formula)
    taught = make_teacher(case, "dense")
    strided = Taught(DenseTeacher(taught.teacher.logits.T.contiguous().T), taught.logits)
    for backend in ["torch", *(["triton"] if importlib.util.find_spec("triton") else [])]:
        check(
            assert_within_budget,
            case,
            lambda c, b=backend: distilled(c, strided, backend=b).total,
            lambda c, d: kl_formula(c, d, taught),
        )


def _bad() -> Iterator[Any]:
    case = make_case("dense", torch.float32)
    hidden, head, t = case.hidden, case.head, case.target
    sparse = make_teacher(case, "sparse").teacher
    online = make_teacher(case, "online").teacher
    yield lambda: linear_cross_entropy(hidden[:, :-1], head, t), rf"hidden \[N, {H}\].*found \[{N}, {H - 1}\]"
    yield lambda: linear_cross_entropy(hidden[None], head, t), rf"found \[1, {N}, {H}\]"
    yield lambda: linear_cross_entropy(hidden, head, t[:-1]), rf"targets \[{N}\], found \[{N - 1}\]"
    yield lambda: linear_cross_entropy(hidden, head, t, weights=t[:2].float()), r"weights .* found \[2\]"
    yield lambda: linear_cross_entropy(hidden, replace(head, bias=torch.zeros(5)), t), rf"bias \[{V}\], found \[5\]"
    yield lambda: linear_cross_entropy(hidden, replace(head, softcap=0.0), t), "softcap above 0"
    yield lambda: linear_cross_entropy(hidden, replace(head, num_classes=V + 1), t), f"1 to {V} classes"
    yield lambda: linear_cross_entropy(hidden, head, t, adapter_hidden=hidden[:2]), "adapter_hidden"
    yield lambda: linear_kl(hidden, head, online, divergence="kl"), "forward_kl, reverse_kl"
    yield lambda: linear_kl(hidden, head, online, temperature=0.0), "temperature above 0"
    yield lambda: linear_kl(hidden, head, online, divergence="jsd", share=1.5), r"share in \[0, 1\]"
    yield lambda: linear_kl(hidden, head, online, hard_weight=0.5), "hard_weight needs targets"
    yield lambda: linear_kl(hidden, head, online, t, hard_weight=1.5), r"hard_weight in \[0, 1\]"
    yield lambda: linear_kl(hidden, head, sparse, divergence="reverse_kl"), "forward_kl only"
    yield lambda: linear_kl(hidden, head, replace(sparse, tail="cut")), "none, bucket, renormalized"
    yield lambda: linear_kl(hidden, head, replace(sparse, probs=sparse.probs[:, :2])), "ids and probs"
    yield (
        lambda: linear_kl(hidden, head, DenseTeacher(torch.zeros(N, V + 1))),
        rf"\[{N}, {V}\], found \[{N}, {V + 1}\]; .* num_classes",
    )
    yield lambda: linear_kl(hidden, head, replace(online, hidden=online.hidden[:2])), rf"found \[2, {V}\]"


@pytest.mark.parametrize("number", range(18))
def test_linear_losses_refuse_inputs_that_do_not_fit(number: int) -> None:
    bad = list(_bad())
    assert len(bad) == 18
    call, error = bad[number]
    with pytest.raises(ValueError, match=error):
        call()


@EACH_DIVERGENCE
def test_linear_losses_references_pass_gradcheck(divergence: str) -> None:
    g = torch.Generator().manual_seed(0)
    sizes = ((3, 5), (7, 5), (7,), (2, 5), (7, 2), (3, 7))
    inputs = [torch.randn(size, generator=g, dtype=torch.float64).requires_grad_() for size in sizes]

    def loss(h: Tensor, w: Tensor, b: Tensor, A: Tensor, B: Tensor, teacher: Tensor) -> Tensor:
        z = head_logits_reference(h, w, b, (A, B, 0.7), softcap=4.0, scale=0.9)
        soft = kl.token_divergence(z, teacher, kind=divergence, temperature=1.5, share=0.3)
        return soft + F.cross_entropy(z, torch.arange(3), reduction="none")

    assert torch.autograd.gradcheck(loss, inputs)
