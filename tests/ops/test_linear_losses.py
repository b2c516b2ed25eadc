"""linear_cross_entropy and linear_kl against formulas in float64: values, every gradient, rounding, memory, compilation."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peftlab_kernels import heads
from peftlab_kernels import linear_kl as kl
from peftlab_kernels.heads import Head
from peftlab_kernels.linear_cross_entropy import head_logits_reference, linear_cross_entropy
from peftlab_kernels.linear_cross_entropy import op as ce_op
from peftlab_kernels.linear_kl import DIVERGENCES, DenseTeacher, OnlineTeacher, SparseTeacher, linear_kl
from peftlab_kernels.linear_kl import op as kl_op
from peftlab_kernels.lora_linear import DenseWeight, Int8Weight
from peftlab_kernels.nf4_dequant import NF4Weight, nf4_dequant_reference
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from peftlab.models.bnb import import_bitsandbytes

Budget = Callable[..., None]
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
# Triton's interpreter multiplies the bit patterns of bfloat16 (triton#11584); these kernels compute in float32 only.
BACKENDS = [
    pytest.param("torch", torch.float64, id="torch-fp64"),
    pytest.param("torch", torch.float32, id="torch-fp32"),
    pytest.param("torch", torch.bfloat16, id="torch-bf16"),
    pytest.param("triton", torch.float32, id="triton-fp32", marks=NEEDS_TRITON),
    pytest.param("triton", torch.float16, id="triton-fp16", marks=NEEDS_TRITON),
]
if torch.cuda.is_available():
    BACKENDS.append(pytest.param("triton", torch.bfloat16, id="triton-bf16", marks=NEEDS_TRITON))
EACH_BACKEND = pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
EACH_DIVERGENCE = pytest.mark.parametrize("divergence", DIVERGENCES)
# Beyond the eager error, relative to the largest value. Eager 16-bit code rounds logits as often as the fused one, but its
# softmax gradient never in 16 bits when it flows through float(): the fused gradient of the logits is rounded once more.
SLACK = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_CPU = pytest.mark.skipif(DEVICE.type != "cpu", reason="counts the CPU's allocations")
N, H, V, R, HT = 13, 24, 131, 4, 16


@dataclass(frozen=True)
class Case:
    """A head, the float64 values of its weight, and what goes in. trained: which of the leaves want a gradient."""

    head: Head
    W: Tensor
    hidden: Tensor
    target: Tensor
    adapter_hidden: Tensor | None = None
    trained: tuple[str, ...] = ("hidden",)
    weights: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def leaves(self) -> dict[str, Tensor]:
        A, B, _ = self.head.low_rank or (None, None, 0.0)
        weight = self.head.weight.weight if isinstance(self.head.weight, DenseWeight) else None
        found = {
            "hidden": self.hidden, "adapter_hidden": self.adapter_hidden, "weight": weight, "bias": self.head.bias,
            "A": A, "B": B,
        }  # fmt: skip
        return {name: found[name] for name in self.trained}  # type: ignore[misc]

    def with_leaves(self, leaves: dict[str, Tensor]) -> Case:
        head = self.head
        if "weight" in leaves:
            head = replace(head, weight=DenseWeight(leaves["weight"]))
        if "bias" in leaves:
            head = replace(head, bias=leaves["bias"])
        if "A" in leaves:
            assert head.low_rank is not None
            head = replace(head, low_rank=(leaves["A"], leaves["B"], head.low_rank[2]))
        return replace(
            self,
            head=head,
            hidden=leaves.get("hidden", self.hidden),
            adapter_hidden=leaves.get("adapter_hidden", self.adapter_hidden),
        )

    def logits(self, dtype: torch.dtype | None) -> Tensor:
        """By the reference in the type of the hidden states, or in ``dtype`` throughout."""
        head, cast = self.head, (lambda t: t) if dtype is None else (lambda t: t if t is None else t.to(dtype))
        weight = head.weight.weight if isinstance(head.weight, DenseWeight) else self.W.to(self.hidden.dtype)
        if dtype is not None and not isinstance(head.weight, DenseWeight):
            weight = self.W
        low_rank = head.low_rank
        if low_rank is not None:
            low_rank = (cast(low_rank[0]), cast(low_rank[1]), low_rank[2])
        z = head_logits_reference(
            cast(self.hidden), cast(weight).to(cast(self.hidden).dtype), cast(head.bias), low_rank,
            softcap=head.softcap, scale=head.scale, adapter_hidden=cast(self.adapter_hidden),
        )  # fmt: skip
        return z[:, : head.num_logits]


@functools.cache
def stored(kind: str, rows: int, columns: int, dtype: torch.dtype, seed: int = 1) -> tuple[Any, Tensor]:
    values = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5 * 3).to(DEVICE)
    bnb = import_bitsandbytes().functional
    if kind == "dense":
        return DenseWeight(values.to(dtype)), values.to(dtype).double()
    if kind == "int8":
        q, row_absmax, _ = bnb.int8_vectorwise_quant(values.half())
        return Int8Weight(q, row_absmax), q.double() * row_absmax.double()[:, None] / 127
    packed, state = bnb.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    second = (state.state2.code, state.state2.absmax, state.offset)
    W = nf4_dequant_reference(
        packed, state.absmax, state.code.double(), (rows, columns), nested=tuple(x.double() for x in second),
        dtype=torch.float64,
    )  # fmt: skip
    return NF4Weight(packed, state.absmax, state.code, (rows, columns), 64, second), W


def make_case(name: str, dtype: torch.dtype, *, n: int = N, seed: int = 0, std: float = 1.0) -> Case:
    """By name: the storage, and what is on the head, joined by ``+``."""
    kind, *extras = name.split("+")
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=g) * scale).to(dtype).to(DEVICE)

    weight, W = stored(kind, V, H, dtype)
    head, trained = Head(weight), ["hidden"]
    adapter_hidden = None
    hidden = normal(n, H, scale=std)
    if "bias" in extras:
        head, trained = replace(head, bias=normal(V)), [*trained, "bias"]
    if "lora" in extras or "dropped" in extras:
        factors = (normal(R, H, scale=H**-0.5, dtype=torch.float32), normal(V, R, dtype=torch.float32), 0.7)
        head, trained = replace(head, low_rank=factors), [*trained, "A", "B"]
    if "dropped" in extras:
        adapter_hidden, trained = (
            hidden * (torch.rand(n, H, generator=g) > 0.3).to(DEVICE),
            [*trained, "adapter_hidden"],
        )
    if "softcap" in extras:
        head = replace(head, softcap=4.0, scale=1.5)
    if "padded" in extras:
        head = replace(head, num_classes=V - 9)
    if "trained" in extras:
        trained.append("weight")
    target = torch.randint(head.num_logits, (n,), generator=g).to(DEVICE)
    weights = (torch.rand(n, generator=g) + 0.5).to(DEVICE)
    return Case(head, W, hidden, target, adapter_hidden, tuple(trained), weights)


HEADS = [
    "dense", "dense+bias+softcap", "dense+trained", "dense+trained+bias+softcap+padded", "dense+lora+softcap",
    "dense+lora+dropped+padded", "nf4", "nf4+bias+lora", "int8+softcap", "int8+lora+padded",
]  # fmt: skip
EACH_HEAD = pytest.mark.parametrize("name", HEADS)


def gradients(case: Case, total: Callable[[Case], Tensor]) -> dict[str, Tensor]:
    """The value and, by name, the gradients of ``total``, times 0.5: what flows back is not always 1."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in case.leaves().items()}
    value = total(case.with_leaves(leaves))
    found = torch.autograd.grad(0.5 * value, list(leaves.values()))
    return {"total": value.detach(), **dict(zip(leaves, found, strict=True))}


def check(
    budget: Budget, case: Case, op: Callable[[Case], Tensor], formula: Callable[[Case, torch.dtype | None], Tensor]
) -> None:
    """``formula``: the sum from the reference's logits, in the type of the case, and (float64) as the truth."""
    actual, eager = gradients(case, op), gradients(case, lambda c: formula(c, None))
    truth = {name: t.double() for name, t in gradients(case, lambda c: formula(c, torch.float64)).items()}
    assert actual.keys() == truth.keys()
    for name, want in truth.items():
        assert name == "total" or actual[name].dtype == case.leaves()[name].dtype
        slack = SLACK[case.hidden.dtype]
        if case.hidden.dtype == torch.float64 and not isinstance(case.head.weight, DenseWeight):
            slack = SLACK[torch.float32]  # decoded in float32, whatever the hidden states are
        elif name == "total" and case.hidden.dtype.itemsize == 2:
            slack /= 4  # a sum, in which eager errors of 16-bit logits may cancel by luck
        budget(actual[name].reshape(-1), eager[name].reshape(-1), want.reshape(-1), slack=slack)


def ce(case: Case, **options: Any) -> Any:
    return linear_cross_entropy(
        case.hidden, case.head, case.target, weights=case.weights, adapter_hidden=case.adapter_hidden, **options
    )


def ce_formula(case: Case, dtype: torch.dtype | None) -> Tensor:
    """Minus the weighted sum of log softmax at the targets, written out."""
    z = case.logits(dtype)
    log_q = z - (z - z.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True).log() - z.amax(-1, keepdim=True)
    factors = torch.ones(len(z)).to(z) if case.weights is None else case.weights.to(z)
    return -(log_q[torch.arange(len(z)), case.target] * factors).sum()


def divergence_of(p: Tensor, q: Tensor, kind: str, share: float) -> Tensor:
    """From probabilities, as the definitions are written."""

    def kullback(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    m = share * p + (1 - share) * q
    return {
        "forward_kl": lambda: kullback(p, q),
        "reverse_kl": lambda: kullback(q, p),
        "skew_forward_kl": lambda: kullback(p, m),
        "skew_reverse_kl": lambda: kullback(q, (1 - share) * p + share * q),
        "jsd": lambda: share * kullback(p, m) + (1 - share) * kullback(q, m),
        "tvd": lambda: (p - q).abs().sum(-1) / 2,
    }[kind]()


@dataclass(frozen=True)
class Taught:
    """A teacher and its final logits in float64."""

    teacher: Any
    logits: Tensor


def make_teacher(case: Case, way: str, *, temperature: float = 1.0, k: int = 5, tail: str = "bucket") -> Taught:
    dtype, n, classes = case.hidden.dtype, len(case.hidden), case.head.num_logits
    weight, W = stored("dense", V, HT, dtype, seed=5)
    hidden = torch.randn(n, HT, generator=torch.Generator().manual_seed(9)).to(dtype).to(DEVICE)
    head = Head(weight, softcap=case.head.softcap, scale=0.8, num_classes=case.head.num_classes)
    z = 0.8 * (hidden.double() @ W.T)[:, :classes]
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    if way == "online":
        return Taught(OnlineTeacher(hidden, head), z)
    if way == "dense":
        z = z.to(dtype)
        return Taught(DenseTeacher(z), z.double())
    probs, ids = (z / temperature).softmax(-1).topk(min(k, classes))
    return Taught(SparseTeacher(ids, probs.float(), tail), z)


def distilled(case: Case, taught: Taught, **options: Any) -> Any:
    return linear_kl(
        case.hidden, case.head, taught.teacher, case.target, weights=case.weights, adapter_hidden=case.adapter_hidden,
        **options,
    )  # fmt: skip


def kl_formula(
    case: Case, dtype: torch.dtype | None, taught: Taught, *, chunk: int | None = None, **options: Any
) -> Tensor:
    o = {
        "divergence": "forward_kl",
        "share": 0.5,
        "temperature": 1.0,
        "scale_by_t2": True,
        "hard_weight": 0.0,
    } | options
    T, z = o["temperature"], case.logits(dtype)
    q = (z / T).softmax(-1)
    if isinstance(taught.teacher, SparseTeacher):
        soft = sparse_formula(q, taught.teacher)
    else:
        soft = divergence_of((taught.logits.to(z) / T).softmax(-1), q, o["divergence"], o["share"])
    hard = -z.log_softmax(-1)[torch.arange(len(z)), case.target]
    per_token = o["hard_weight"] * hard + (1 - o["hard_weight"]) * (T**2 if o["scale_by_t2"] else 1) * soft
    return (per_token * (1 if case.weights is None else case.weights.to(z))).sum()


def sparse_formula(q: Tensor, teacher: SparseTeacher) -> Tensor:
    p, stored_q = teacher.probs.to(q), q.gather(1, teacher.ids)
    if teacher.tail == "renormalized":
        p, stored_q = p / p.sum(-1, keepdim=True), stored_q / stored_q.sum(-1, keepdim=True)
    loss = (p * (p / stored_q).log()).sum(-1)
    if teacher.tail == "bucket" and p.shape[1] < q.shape[1]:
        missing = 1 - p.sum(-1)
        rest = q.scatter(1, teacher.ids, 0.0).sum(-1)
        loss = loss + missing * (missing / rest).log()
    return loss


@EACH_HEAD
@EACH_BACKEND
def test_cross_entropy_agrees_with_the_formula(
    assert_within_budget: Budget, name: str, backend: str, dtype: torch.dtype
) -> None:
    case = make_case(name, dtype)
    check(assert_within_budget, case, lambda c: ce(c, chunk=5, backend=backend).total, ce_formula)


@EACH_DIVERGENCE
@pytest.mark.parametrize(
    ("way", "hard_weight", "temperature"), [("online", 0.0, 2.0), ("online", 0.3, 1.0), ("dense", 0.3, 2.0)]
)
@EACH_BACKEND
def test_divergences_agree_with_the_formula(
    assert_within_budget: Budget, divergence: str, way: str, hard_weight: float, temperature: float, backend: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    if divergence == "tvd" and dtype.itemsize == 2:
        way = "dense"  # its gradient jumps where p = q: only with equal teacher logits do both sides jump alike
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
def test_distilling_every_head(assert_within_budget: Budget, name: str, backend: str, dtype: torch.dtype) -> None:
    case = make_case(name, dtype)
    taught = make_teacher(case, "online")
    options: dict[str, Any] = {"temperature": 1.5, "hard_weight": 0.2, "chunk": 6}
    check(
        assert_within_budget,
        case,
        lambda c: distilled(c, taught, backend=backend, **options).total,
        lambda c, d: kl_formula(c, d, taught, **options),
    )


@pytest.mark.parametrize("tail", kl.TAILS)
@pytest.mark.parametrize(("k", "temperature", "hard_weight"), [(5, 1.0, 0.0), (1, 2.0, 0.3), (V, 1.0, 0.3)])
@EACH_BACKEND
def test_sparse_teachers_agree_with_the_formula(
    assert_within_budget: Budget, tail: str, k: int, temperature: float, hard_weight: float, backend: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    case = make_case("dense+bias+softcap" if k == 5 else "dense+trained", dtype)
    taught = make_teacher(case, "sparse", temperature=temperature, k=k, tail=tail)
    options: dict[str, Any] = {"temperature": temperature, "hard_weight": hard_weight, "chunk": 5}
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
def test_chunks_and_order_change_nothing(n: int, chunk: int, seed: int, name: str) -> None:
    case = replace(make_case(name, torch.float64, n=n, seed=seed))
    taught = make_teacher(case, "online")
    whole = gradients(case, lambda c: distilled(c, taught, hard_weight=0.4, chunk=n).total)
    parts = gradients(case, lambda c: distilled(c, taught, hard_weight=0.4, chunk=chunk).total)
    for key, want in whole.items():
        torch.testing.assert_close(parts[key], want, rtol=1e-5 if "nf4" in name else 1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
@pytest.mark.parametrize("n", [0, 1])
def test_few_tokens(n: int, backend: str) -> None:
    case = make_case("dense+trained+bias", torch.float32, n=n)
    for total in (
        lambda c: ce(c, backend=backend).total,
        lambda c: distilled(c, make_teacher(c, "online"), backend=backend).total,
        lambda c: distilled(c, make_teacher(c, "sparse"), backend=backend).total,
    ):
        found = gradients(case, total)
        assert found["hidden"].shape == (n, H)
        assert all(torch.isfinite(t).all() for t in found.values())
        assert n or not found["weight"].any()


@EACH_BACKEND
def test_extreme_logits_stay_finite_and_right(assert_within_budget: Budget, backend: str, dtype: torch.dtype) -> None:
    std = 300.0 if dtype == torch.float16 else 3000.0
    case = make_case("dense", dtype, std=std)
    assert float(case.logits(torch.float64).abs().max()) > 3 * std
    check(assert_within_budget, case, lambda c: ce(c, backend=backend).total, ce_formula)
    taught = make_teacher(case, "online")
    for divergence in DIVERGENCES:
        options = {"divergence": divergence, "share": 0.3, "hard_weight": 0.5}
        found = gradients(case, lambda c, o=options: distilled(c, taught, backend=backend, **o).total)
        want = kl.token_divergence(case.logits(torch.float64), taught.logits, kind=divergence, share=0.3)
        soft = distilled(case, taught, backend=backend, **options).soft
        assert soft is not None and all(torch.isfinite(t).all() for t in found.values())
        if dtype.itemsize > 2:  # 16-bit logits of this size are whole nats apart
            torch.testing.assert_close(soft.double(), want, rtol=1e-5, atol=1e-5 * float(want.max()))


@EACH_DIVERGENCE
@EACH_BACKEND
def test_a_perfect_student_has_nothing_to_learn(divergence: str, backend: str, dtype: torch.dtype) -> None:
    case = make_case("dense+softcap", dtype)
    taught = Taught(OnlineTeacher(case.hidden, case.head), case.logits(torch.float64))
    for share in (0.3, 0.0, *([1.0] if divergence == "jsd" else [])):
        options = {"divergence": divergence, "share": share, "temperature": 2.0, "backend": backend}
        found = gradients(case, lambda c, o=options: distilled(c, taught, **o).total)
        assert float(found["total"].abs()) <= 2e-6 * N
        assert float(found["hidden"].abs().max()) <= 2e-6


@EACH_BACKEND
def test_hard_weight_one_is_cross_entropy_to_the_bit(backend: str, dtype: torch.dtype) -> None:
    case = make_case("dense+trained+softcap", dtype)
    one = gradients(case, lambda c: distilled(c, make_teacher(c, "online"), hard_weight=1, backend=backend).total)
    other = gradients(case, lambda c: ce(c, backend=backend).total)
    assert all(torch.equal(one[name], other[name]) for name in other)


@EACH_BACKEND
def test_every_class_stored_is_a_dense_teacher(backend: str, dtype: torch.dtype) -> None:
    case = make_case("dense", dtype)
    dense = gradients(case, lambda c: distilled(c, make_teacher(c, "dense"), backend=backend).total)
    for tail in kl.TAILS:
        taught = make_teacher(case, "sparse", k=V, tail=tail)
        found = gradients(case, lambda c, t=taught: distilled(c, t, backend=backend).total)
        for name, want in dense.items():
            slack = {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(dtype, 1e-5)  # the dense logits are rounded
            torch.testing.assert_close(found[name], want, rtol=slack, atol=slack * float(want.abs().max()))


@pytest.mark.parametrize("tail", kl.TAILS)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
def test_classes_of_probability_zero_fill_up_a_row(tail: str, backend: str) -> None:
    """Rows of fewer classes, as sampling gives: the rest of the row repeats a class that is there already."""
    case = make_case("dense+softcap", torch.float32)
    teacher = make_teacher(case, "sparse", k=4, tail=tail).teacher
    filled = SparseTeacher(
        torch.cat([teacher.ids, teacher.ids[:, 1:2], teacher.ids[:, :1]], 1),
        torch.cat([teacher.probs, torch.zeros(N, 2, device=DEVICE)], 1),
        tail,
    )
    want, found = (
        gradients(case, lambda c, t=t: distilled(c, Taught(t, t.probs), hard_weight=0.2, backend=backend).total)
        for t in (teacher, filled)
    )
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
def test_the_tail_of_a_confident_student_keeps_its_digits(backend: str) -> None:
    """Student tail mass about 1e-9: 1 less the mass of the stored classes would be 0 in float32."""
    case = make_case("dense", torch.float32, n=4)
    logits = torch.full((4, V), -25.0)
    logits[:, :3] = torch.tensor([3.0, 2.0, 1.0])
    head = Head(DenseWeight(logits[0][:, None].to(DEVICE)))
    case = replace(case, head=head, W=logits[0][:, None].double().to(DEVICE), hidden=torch.ones(4, 1, device=DEVICE))
    probs = torch.tensor([[0.5, 0.3, 0.1]]).expand(4, 3).to(DEVICE)
    ids = torch.tensor([[0, 1, 2]]).expand(4, 3).to(DEVICE)
    taught = Taught(SparseTeacher(ids, probs, "bucket"), logits.double())
    soft = distilled(case, taught, backend=backend).soft
    want = sparse_formula(case.logits(torch.float64).softmax(-1), taught.teacher)
    torch.testing.assert_close(soft.double(), want, rtol=1e-6, atol=0)
    short, mass = (1 - case.logits(d).softmax(-1)[0, :3].sum() for d in (torch.float32, torch.float64))
    assert abs(float(short / mass) - 1) > 0.5, "the case must need it"


def assert_caught(
    budget: Budget, case: Case, op: Callable[[Case], Tensor], formula: Callable[[Case, torch.dtype | None], Tensor]
) -> None:
    with pytest.raises(AssertionError, match="error"):
        check(budget, case, op, formula)


FAULTS: dict[str, Callable[[Case, Taught, dict[str, Any]], Any]] = {
    "scale dropped": lambda c, t, o: distilled(replace(c, head=replace(c.head, scale=1.0)), t, **o),
    "softcap dropped": lambda c, t, o: distilled(replace(c, head=replace(c.head, softcap=None)), t, **o),
    "weights dropped": lambda c, t, o: distilled(replace(c, weights=None), t, **o),
    "no T^2": lambda c, t, o: distilled(c, t, scale_by_t2=False, **o),
    "T on the student alone": lambda c, t, o: distilled(
        c, replace(t, teacher=replace(t.teacher, head=replace(t.teacher.head, scale=0.8 * o["temperature"]))), **o
    ),
    "reversed": lambda c, t, o: distilled(c, t, **{**o, "divergence": "reverse_kl"}),
    "targets shifted": lambda c, t, o: distilled(replace(c, target=c.target.roll(1)), t, **o),
    "teacher shifted": lambda c, t, o: distilled(
        c, replace(t, teacher=replace(t.teacher, hidden=t.teacher.hidden.roll(1, 0))), **o
    ),
    "padding counted": lambda c, t, o: distilled(
        replace(c, head=replace(c.head, num_classes=None)),
        replace(t, teacher=replace(t.teacher, head=replace(t.teacher.head, num_classes=None))),
        **o,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@EACH_BACKEND
def test_deliberate_faults_are_caught(
    assert_within_budget: Budget, fault: str, backend: str, dtype: torch.dtype
) -> None:
    case = make_case("dense+softcap+padded", dtype)
    taught = make_teacher(case, "online")
    options: dict[str, Any] = {"temperature": 2.0, "hard_weight": 0.4}

    def formula(c: Case, d: torch.dtype | None) -> Tensor:
        return kl_formula(c, d, taught, **options)

    assert_caught(
        assert_within_budget,
        case,
        lambda c: FAULTS[fault](c, taught, {**options, "backend": backend}).total,
        formula,
    )


CE_FAULTS: dict[str, Callable[[Case], Case]] = {
    "targets shifted": lambda c: replace(c, target=c.target.roll(1)),
    "softcap dropped": lambda c: replace(c, head=replace(c.head, softcap=None)),
    "weights dropped": lambda c: replace(c, weights=None),
    "padding counted": lambda c: replace(c, head=replace(c.head, num_classes=None)),
}


@pytest.mark.parametrize("fault", CE_FAULTS)
@EACH_BACKEND
def test_deliberate_faults_of_the_cross_entropy_are_caught(
    assert_within_budget: Budget, fault: str, backend: str, dtype: torch.dtype
) -> None:
    case = make_case("dense+softcap+padded", dtype)
    assert_caught(assert_within_budget, case, lambda c: ce(CE_FAULTS[fault](c), backend=backend).total, ce_formula)


@EACH_DIVERGENCE
@EACH_BACKEND
def test_a_shifted_teacher_is_caught_in_every_divergence(
    assert_within_budget: Budget, divergence: str, backend: str, dtype: torch.dtype
) -> None:
    case = make_case("dense+softcap", dtype)
    taught = make_teacher(case, "dense")
    shifted = replace(taught, teacher=DenseTeacher(taught.teacher.logits.roll(1, 0)))
    options: dict[str, Any] = {"divergence": divergence, "share": 0.3}
    assert_caught(
        assert_within_budget,
        case,
        lambda c: distilled(c, shifted, backend=backend, **options).total,
        lambda c, d: kl_formula(c, d, taught, **options),
    )


SPARSE_FAULTS: dict[str, Callable[[SparseTeacher], SparseTeacher]] = {
    "tail dropped": lambda t: replace(t, tail="renormalized"),
    "tail of another kind": lambda t: replace(t, tail="none"),
    "classes shifted": lambda t: replace(t, ids=t.ids.roll(1, 1)),
    "one class lost": lambda t: replace(t, ids=t.ids[:, :-1], probs=t.probs[:, :-1]),
}


@pytest.mark.parametrize("fault", SPARSE_FAULTS)
@EACH_BACKEND
def test_deliberate_faults_of_stored_classes_are_caught(
    assert_within_budget: Budget, fault: str, backend: str, dtype: torch.dtype
) -> None:
    case = make_case("dense+softcap", dtype)
    taught = make_teacher(case, "sparse")
    wrong = replace(taught, teacher=SPARSE_FAULTS[fault](taught.teacher))
    assert_caught(
        assert_within_budget,
        case,
        lambda c: distilled(c, wrong, backend=backend).total,
        lambda c, d: kl_formula(c, d, taught),
    )


def _gradient_without_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ce_op.write_gradient
    for module in (ce_op, kl_op):
        monkeypatch.setattr(module, "write_gradient", lambda out, dz, slope, head: right(out, dz, None, head))


def _adapter_gradient_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    right = heads.HeadPass.gradients
    monkeypatch.setattr(
        heads.HeadPass, "gradients", lambda self, head: [g * (g.shape[-1] != R) for g in right(self, head)]
    )


def _last_chunk_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    right = heads.HeadPass.backward
    monkeypatch.setattr(
        heads.HeadPass, "backward", lambda self, part, dz: right(self, part, dz if part.stop < N else dz * 0)
    )


@pytest.mark.parametrize("fault", [_gradient_without_slope, _adapter_gradient_lost, _last_chunk_lost])
def test_deliberate_faults_inside_are_caught(
    assert_within_budget: Budget, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    case = make_case("dense+lora+softcap", torch.float32)
    check(assert_within_budget, case, lambda c: ce(c, chunk=5).total, ce_formula)
    fault(monkeypatch)
    assert_caught(assert_within_budget, case, lambda c: ce(c, chunk=5).total, ce_formula)


def test_of_a_frozen_head_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    right = heads.HeadPass.__init__
    monkeypatch.setattr(
        heads.HeadPass,
        "__init__",
        lambda self, *args, **kwargs: (passes.append(self), right(self, *args, **kwargs))[0] and None,
    )
    case = make_case("dense+bias", torch.float32)
    case.hidden.requires_grad_()
    ce(replace(case)).total.backward()
    (walk,) = passes
    assert walk.dH_NH is not None
    assert walk.dW_VH is walk.dbias_V is walk.dA_RH is walk.dB_VR is None


def test_nothing_is_computed_backward_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("dense+trained", torch.float32)
    case.head.weight.weight.requires_grad_()
    try:
        monkeypatch.setattr(heads.HeadPass, "backward", None)
        with torch.no_grad():
            assert not ce(case).total.requires_grad
            assert not distilled(case, make_teacher(case, "online")).total.requires_grad
    finally:
        case.head.weight.weight.requires_grad_(False)


@pytest.mark.parametrize("way", ["cross-entropy", "online"])
def test_a_head_tied_to_the_embeddings(way: str) -> None:
    """Both uses of one matrix add up, over two micro-batches too."""
    g = torch.Generator().manual_seed(0)
    E = torch.randn(V, H, generator=g, dtype=torch.float64).to(DEVICE).requires_grad_()
    ids, target = (torch.randint(V, (8,), generator=g).to(DEVICE) for _ in range(2))
    teacher = torch.randn(8, V, generator=g, dtype=torch.float64).to(DEVICE)

    def total(part: slice) -> Tensor:
        hidden, head = E[ids[part]].tanh(), Head(DenseWeight(E))
        if way == "online":
            return linear_kl(hidden, head, DenseTeacher(teacher[part])).total
        return linear_cross_entropy(hidden, head, target[part]).total

    logits = E[ids].tanh() @ E.T
    want = F.cross_entropy(logits, target, reduction="sum")
    if way == "online":
        log_p = teacher.log_softmax(-1)
        want = (log_p.exp() * (log_p - logits.log_softmax(-1))).sum()
    (expected,) = torch.autograd.grad(want, E)
    for part in (slice(0, 5), slice(5, 8)):
        total(part).backward()
    torch.testing.assert_close(E.grad, expected, rtol=1e-12, atol=1e-12)


def test_a_teacher_gets_no_gradient() -> None:
    case = make_case("dense", torch.float32)
    taught = make_teacher(case, "dense")
    taught.teacher.logits.requires_grad_()
    case.hidden.requires_grad_()
    distilled(case, taught).total.backward()
    assert taught.teacher.logits.grad is None
    assert case.hidden.grad is not None


def test_second_backward_gives_the_same_gradient_and_second_derivatives_are_refused() -> None:
    case = make_case("dense+softcap", torch.float32)
    case.hidden.requires_grad_()
    for loss in (ce(case).total, distilled(case, make_teacher(case, "online")).total):
        (first,) = torch.autograd.grad(loss, case.hidden, retain_graph=True)
        (second,) = torch.autograd.grad(loss, case.hidden, retain_graph=True)
        assert torch.equal(first, second)
        (first,) = torch.autograd.grad(loss, case.hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(first.square().sum(), case.hidden)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
def test_inputs_are_left_alone(backend: str) -> None:
    case = make_case("dense+trained+bias+lora+dropped+softcap", torch.float32)
    for way in ("online", "dense", "sparse"):
        taught = make_teacher(case, way)
        values = [v for v in vars(taught.teacher).values() if isinstance(v, Tensor)]
        tensors = [*case.leaves().values(), case.target, case.weights, *values]
        before = [t.detach().clone() for t in tensors]
        gradients(case, lambda c, t=taught: distilled(c, t, hard_weight=0.5, backend=backend).total)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_non_contiguous_inputs(assert_within_budget: Budget) -> None:
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


class LargestOutput(TorchDispatchMode):
    """Number of elements of the largest tensor any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_no_tensor_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at inside the operators: from outside each is one call."""
    for module in (ce_op, kl_op):
        name = "linear_cross_entropy_op" if module is ce_op else "linear_kl_op"
        monkeypatch.setattr(module, name, torch.no_grad()(getattr(module, name)._init_fn))
    case = make_case("dense", torch.float32, n=64)
    case.hidden.requires_grad_()
    taught = make_teacher(case, "online")
    for total in (ce, lambda c, **o: distilled(c, taught, **o)):
        with LargestOutput() as largest:
            total(case, chunk=8)
        assert largest.numel == max(8 * V, V * H)
        with LargestOutput() as largest:
            total(case, chunk=64)
        assert largest.numel == 64 * V, "the measure must see the logits"


def _large_allocations(step: Callable[[], Any], numel: int) -> list[int]:
    """Bytes of each allocation of at least ``numel`` float32, and minus them where it is freed, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return [e.nbytes() for e in events if e.name() == "[memory]" and abs(e.nbytes()) >= 4 * numel]


def _trained_loss(way: str, dtype: torch.dtype, *, chunk: int | None) -> tuple[Tensor, Callable[[], Tensor]]:
    """The weight of a trained head, large beside the logits of its 8 tokens, and their loss."""
    classes, width = 4096, 64
    weight = torch.randn(classes, width).to(dtype).requires_grad_()
    head = Head(DenseWeight(weight))
    hidden, target = torch.randn(8, width).to(dtype), torch.randint(classes, (8,))
    teacher = OnlineTeacher(torch.randn(8, 16).to(dtype), Head(DenseWeight(torch.randn(classes, 16).to(dtype))))

    def total() -> Tensor:
        if way == "online":
            return linear_kl(hidden, head, teacher, chunk=chunk).total
        return linear_cross_entropy(hidden, head, target, chunk=chunk).total

    return weight, total


@ON_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["cross-entropy", "online"])
def test_gradient_of_a_trained_head_exists_once(way: str, dtype: torch.dtype) -> None:
    """In float32: not again as zeros for the operator's own outputs, nor as a product with what flows back, nor as that of a
    chunk."""
    weight, total = _trained_loss(way, dtype, chunk=2)
    (expected,) = torch.autograd.grad(total(), weight)
    found: list[Tensor] = []
    sizes = _large_allocations(lambda: found.extend(torch.autograd.grad(0.5 * total(), weight)), weight.numel())
    size = 4 * weight.numel()
    assert sizes == ([size] if dtype == torch.float32 else [size, -size])
    assert torch.equal(found[0], 0.5 * expected)
    loss = total()
    kept = torch.autograd.grad(loss, weight, retain_graph=True)[0].clone()
    assert torch.equal(kept, torch.autograd.grad(2.0 * loss, weight)[0] / 2)


@ON_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["cross-entropy", "online"])
def test_of_one_chunk_the_gradient_of_a_trained_head_is_one_product(way: str, dtype: torch.dtype) -> None:
    """Made in backward, in the type of the weight: no sum over chunks, nothing multiplied afterwards."""
    weight, total = _trained_loss(way, dtype, chunk=None)
    held = weight.numel() * dtype.itemsize
    loss: list[Tensor] = []
    assert _large_allocations(lambda: loss.append(total()), held // 4) == []
    found: list[Tensor] = []
    sizes = _large_allocations(lambda: found.extend(torch.autograd.grad(0.5 * loss[0], weight)), held // 4)
    assert sizes == [held] and found[0].dtype == dtype
    (whole,) = torch.autograd.grad(total(), weight)
    assert torch.equal(found[0], 0.5 * whole)
    again = total()
    kept = torch.autograd.grad(again, weight, retain_graph=True)[0].clone()
    assert torch.equal(kept, torch.autograd.grad(again, weight)[0])


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("way", ["cross-entropy", "online"])
def test_what_flows_back_is_not_rounded_to_16_bits(way: str, chunk: int | None) -> None:
    """A third, in bfloat16, is off by 2 in a thousand in every element alike."""
    case = make_case("dense+trained", torch.bfloat16)

    def total(c: Case) -> Tensor:
        return (
            ce(c, chunk=chunk).total
            if way == "cross-entropy"
            else distilled(c, make_teacher(c, way), chunk=chunk).total
        )

    whole, third = (gradients(case, lambda c, factor=factor: factor * total(c)) for factor in (1.0, 1 / 3))
    for name, gradient in whole.items():
        ratio = float((third[name].double() * gradient.double()).sum() / gradient.double().square().sum())
        assert ratio == pytest.approx(1 / 3, rel=5e-4), name


def test_a_loss_scale_does_not_overflow_float16() -> None:
    """Hidden states of 500 times 65536 are beyond float16, the gradient of the weight is not."""
    g = torch.Generator().manual_seed(0)
    hidden, target = (
        (500 * torch.randn(N, H, generator=g)).half().to(DEVICE),
        torch.randint(V, (N,), generator=g).to(DEVICE),
    )
    weight = (1e-4 * torch.randn(V, H, generator=g)).to(DEVICE).requires_grad_()
    (found,) = torch.autograd.grad(
        65536.0 / N * linear_cross_entropy(hidden, Head(DenseWeight(weight)), target).total, weight
    )
    wide = weight.detach().double().requires_grad_()
    logits = F.linear(hidden.double(), weight.detach().half().double() + 0 * wide + wide - wide.detach())
    (want,) = torch.autograd.grad(65536.0 / N * F.cross_entropy(logits, target, reduction="sum"), wide)
    assert torch.isfinite(found).all()
    assert float((found.double() - want).norm() / want.norm()) < 5e-3


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("divergence", "share", "allowed"),
    [("jsd", 0.1, 2e-7), ("jsd", 0.5, 3e-7), ("skew_forward_kl", 0.5, 5e-7), ("skew_reverse_kl", 0.5, 5e-7)],
)
def test_mixtures_are_as_exact_as_with_a_logarithm(divergence: str, share: float, allowed: float) -> None:
    """Two classes at every ratio of the probabilities, equal ones too. ``tl.log`` in place of the polynomial errs by 1.7e-7,
    2.7e-7 and 4.3e-7; two degrees less would add 1e-6."""
    steps = torch.linspace(-12, 12, 25, dtype=torch.float64)
    student, teacher = (
        torch.stack([t.flatten(), torch.zeros(625, dtype=torch.float64)], 1)
        for t in torch.meshgrid(steps, steps, indexing="ij")
    )
    head = Head(DenseWeight(torch.eye(2, device=DEVICE)))
    found = linear_kl(
        student.float().to(DEVICE), head, DenseTeacher(teacher.float().to(DEVICE)), divergence=divergence, share=share,
        backend="triton",
    ).soft  # fmt: skip
    want = kl.token_divergence(student, teacher, kind=divergence, share=share)
    assert float((found.cpu().double() - want).abs().max()) < allowed
    assert float(found.view(25, 25).diagonal().abs().max()) < 1e-7, "a perfect student"


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_of_a_trained_head_have_types_that_cuda_has(
    monkeypatch: pytest.MonkeyPatch, hidden_dtype: torch.dtype, weight_dtype: torch.dtype, chunk: int | None
) -> None:
    """Of every pair of types: what CUDA's mm may write is the type of its factors, or float32 for 16 bits. The gradient is as
    exact as one of its type can be."""
    asked: list[tuple[torch.dtype, torch.dtype]] = []
    right = heads.product
    monkeypatch.setattr(
        heads, "product", lambda one, other, **o: (asked.append((one.dtype, o["dtype"])), right(one, other, **o))[1]
    )
    g = torch.Generator().manual_seed(0)
    hidden, target = torch.randn(N, H, generator=g).to(hidden_dtype), torch.randint(V, (N,), generator=g)
    weight = (torch.randn(V, H, generator=g) / H**0.5).to(weight_dtype).requires_grad_()
    (found,) = torch.autograd.grad(
        0.3 * linear_cross_entropy(hidden, Head(DenseWeight(weight)), target, chunk=chunk).total, weight
    )
    assert found.dtype == weight_dtype and asked
    for factors, product in asked:
        assert product == factors or (product == torch.float32 and factors.itemsize == 2), (factors, product)
    wide = weight.detach().to(hidden_dtype).double().requires_grad_()
    (want,) = torch.autograd.grad(0.3 * F.cross_entropy(F.linear(hidden.double(), wide), target, reduction="sum"), wide)
    coarsest = max((hidden_dtype, weight_dtype), key=lambda dtype: torch.finfo(dtype).eps)
    assert float((found.double() - want).norm() / want.norm()) < 2 * torch.finfo(coarsest).eps


def test_where_nothing_is_spared_no_chunk_is_larger() -> None:
    """float16 sums in float32 whatever the chunks, and an operator that was not told defers nothing."""
    head = Head(DenseWeight(torch.empty(128256, 4096, dtype=torch.float16, device="meta")))
    wanted, cpu = heads.Wanted(weight=True), torch.device("cpu")
    half = torch.empty(1, 4096, dtype=torch.float16, device="meta")
    assert heads.rows_of(head, half, wanted).spared_bytes == 0
    assert heads.rows_of(head, half.bfloat16(), wanted).spared_bytes == 0, "products in another type"
    assert _trained(torch.bfloat16).spared_bytes > 0
    head = Head(DenseWeight(torch.empty(4096, 64, dtype=torch.bfloat16)))
    hidden = torch.empty(128, 64, dtype=torch.bfloat16)
    assert heads.walk_of(head, hidden, wanted, None) == (128, True)
    told = heads.rows_of(head, hidden, wanted, deferred=False)
    assert told.spared_bytes == 0
    assert heads.size_where_nothing_is_deferred(head, hidden, wanted) == heads.num_tokens_per_chunk(128, told, cpu)


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_head_with_create_graph(dtype: torch.dtype, chunk: int | None) -> None:
    """The first derivative is as without it, the second is refused."""
    case = make_case("dense+trained", dtype)
    hidden, weight = case.hidden.clone().requires_grad_(), case.head.weight.weight.detach().clone().requires_grad_()
    head = replace(case.head, weight=DenseWeight(weight))

    def total() -> Tensor:
        return 0.3 * linear_cross_entropy(hidden, head, case.target, chunk=chunk).total

    want = torch.autograd.grad(total(), (hidden, weight))
    found = torch.autograd.grad(total(), (hidden, weight), create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(found[1].float().square().sum(), hidden)


@ON_CPU
def test_logits_of_one_chunk_exist_at_a_time() -> None:
    classes, width, chunk = 8192, 8, 4
    head = Head(DenseWeight(torch.randn(classes, width)))
    hidden = torch.randn(16, width).requires_grad_()
    sizes = _large_allocations(
        lambda: linear_cross_entropy(hidden, head, torch.randint(classes, (16,)), chunk=chunk), chunk * classes
    )
    held = torch.tensor(sizes).cumsum(0)
    assert len(sizes) >= 8 and held.max() == 4 * chunk * classes


def _options(case: Case) -> list[tuple[Any, tuple[Any, ...]]]:
    """Each operator with the arguments of a call."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    def recorder(op: Any) -> Callable[..., Any]:
        return lambda *args: (calls.append((op, args)), op(*args))[1]

    ce_right, kl_right = ce_op.linear_cross_entropy_op, kl_op.linear_kl_op
    try:
        ce_op.linear_cross_entropy_op, kl_op.linear_kl_op = recorder(ce_right), recorder(kl_right)
        ce(case, chunk=5)
        for way in ("online", "dense", "sparse"):
            distilled(case, make_teacher(case, way), hard_weight=0.3, chunk=5)
    finally:
        ce_op.linear_cross_entropy_op, kl_op.linear_kl_op = ce_right, kl_right
    return calls


@pytest.mark.parametrize("name", ["dense+trained+bias+lora+dropped+softcap", "nf4+lora"])
def test_operators_are_registered_as_they_behave(name: str) -> None:
    case = make_case(name, torch.float32)
    case = case.with_leaves({k: t.detach().clone().requires_grad_() for k, t in case.leaves().items()})
    calls = _options(case)
    assert len(calls) == 4
    for op, args in calls:
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("name", ["dense+softcap", "dense+trained+bias", "nf4+lora"])
def test_compiled_whole(name: str) -> None:
    case = make_case(name, torch.float32)
    taught = make_teacher(case, "online")

    def both(c: Case) -> Tensor:
        return ce(c).total + distilled(c, taught, hard_weight=0.3, temperature=2.0).total

    leaves = {k: t.detach().clone().requires_grad_() for k, t in case.leaves().items()}
    want = torch.autograd.grad(both(case.with_leaves(leaves)), list(leaves.values()))
    compiled = torch.compile(
        lambda *ts: both(case.with_leaves(dict(zip(leaves, ts, strict=True)))), fullgraph=True, backend="aot_eager"
    )
    found = torch.autograd.grad(compiled(*leaves.values()), list(leaves.values()))
    for got, wanted in zip(found, want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
    torch._dynamo.reset()


def test_checkpointing() -> None:
    case = make_case("dense+softcap", torch.float32)
    case.hidden.requires_grad_()
    (want,) = torch.autograd.grad(ce(case).total, case.hidden)
    (found,) = torch.autograd.grad(
        checkpoint(lambda h: ce(replace(case, hidden=h)).total, case.hidden, use_reentrant=False), case.hidden
    )
    assert torch.equal(found, want)


def test_autocast_changes_nothing() -> None:
    case = make_case("dense+lora", torch.float32)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = gradients(case, lambda c: ce(c).total)
    outside = gradients(case, lambda c: ce(c).total)
    assert all(torch.equal(inside[name], outside[name]) for name in outside)


def _card(
    monkeypatch: pytest.MonkeyPatch, total_gib: float, free_gib: float, *, share: float = 1.0, unused_gib: float = 0.0
) -> list[str]:
    """A made-up GPU; the list gets a word for each call to the driver."""
    calls: list[str] = []
    total, free, unused = (int(gib * 2**30) for gib in (total_gib, free_gib, unused_gib))
    for name, value in {
        "get_device_properties": SimpleNamespace(total_memory=total),
        "memory_reserved": unused,
        "memory_allocated": 0,
        "get_per_process_memory_fraction": share,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (calls.append("mem_get_info"), (free, total))[1])
    return calls


@pytest.mark.parametrize(
    ("total_gib", "free_gib", "rows", "expected"),
    [
        (80, 70, heads.Rows(2 * 128256), 4096),
        (80, 70, heads.Rows(2 * 128256, sides=2), 2048),
        (24, 20, heads.Rows(2 * 128256), 1024),
        (24, 20, heads.Rows(2 * 128256, sides=2), 512),
        (24, 0.05, heads.Rows(4 * 128256), 32),
        (8, 7, heads.Rows(2 * 256000), 256),
    ],
)
def test_tokens_per_chunk_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, total_gib: float, free_gib: float, rows: Any, expected: int
) -> None:
    card = torch.device("cuda")
    _card(monkeypatch, total_gib, free_gib)
    assert heads.num_tokens_per_chunk(100_000, rows, card) == expected
    # A process that may take a quarter of a larger card gets the chunks of a card of that size.
    _card(monkeypatch, 4 * total_gib, free_gib, share=0.25)
    assert heads.num_tokens_per_chunk(100_000, rows, card) == expected


def test_the_driver_is_asked_only_while_memory_is_not_reserved_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, card = heads.Rows(2 * 128256), torch.device("cuda")
    calls = _card(monkeypatch, 80, 60)
    assert heads.num_tokens_per_chunk(100_000, rows, card) == 4096 and calls == ["mem_get_info"]
    calls = _card(monkeypatch, 80, 60, unused_gib=3)
    assert heads.num_tokens_per_chunk(100_000, rows, card) == 4096 and calls == []


def _trained(dtype: torch.dtype, hidden_dtype: torch.dtype = torch.bfloat16) -> Any:
    """Rows of a trained head of a Llama-3-8B."""
    head = Head(DenseWeight(torch.empty(128256, 4096, dtype=dtype, device="meta")))
    return heads.rows_of(head, torch.empty(1, 4096, dtype=hidden_dtype, device="meta"), heads.Wanted(weight=True))


def test_a_trained_head_takes_one_chunk_where_that_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum over chunks takes 4 bytes a weight beside the gradient in 16 bits; one chunk takes none."""
    sixteen, wide, card = _trained(torch.bfloat16), _trained(torch.float32), torch.device("cuda")
    assert sixteen.sum_bytes == wide.sum_bytes == sixteen.spared_bytes == 4 * 128256 * 4096 and wide.spared_bytes == 0
    _card(monkeypatch, 24, 10)
    assert heads.num_tokens_per_chunk(8192, sixteen, card) == 8192, "as much as the sum: 2.1 GB"
    assert heads.num_tokens_per_chunk(8193, sixteen, card) == 2048, (
        "a quarter of the sum's bytes, not a share of the card"
    )
    assert heads.num_tokens_per_chunk(8192, wide, card) == 2048
    _card(monkeypatch, 24, 3)
    assert heads.num_tokens_per_chunk(8192, sixteen, card) == 4096, "half of what is free"
    cpu = torch.device("cpu")
    assert heads.num_tokens_per_chunk(8192, sixteen, cpu) == 8192
    assert heads.num_tokens_per_chunk(10_000, _trained(torch.float32, torch.float32), cpu) == 1024


def test_tokens_per_chunk_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert heads.num_tokens_per_chunk(10_000, heads.Rows(4 * 49152), cpu) == 341
    assert heads.num_tokens_per_chunk(10_000, heads.Rows(4 * 49152, sides=2), cpu) == 170
    assert heads.num_tokens_per_chunk(7, heads.Rows(4 * 49152), cpu) == 7
    assert heads.num_tokens_per_chunk(0, heads.Rows(4 * 49152), cpu) == 1


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
def test_what_does_not_fit_is_named(number: int) -> None:
    bad = list(_bad())
    assert len(bad) == 18
    call, found = bad[number]
    with pytest.raises(ValueError, match=found):
        call()


@EACH_DIVERGENCE
def test_references_pass_gradcheck(divergence: str) -> None:
    g = torch.Generator().manual_seed(0)
    sizes = ((3, 5), (7, 5), (7,), (2, 5), (7, 2), (3, 7))
    inputs = [torch.randn(size, generator=g, dtype=torch.float64).requires_grad_() for size in sizes]

    def loss(h: Tensor, w: Tensor, b: Tensor, A: Tensor, B: Tensor, teacher: Tensor) -> Tensor:
        z = head_logits_reference(h, w, b, (A, B, 0.7), softcap=4.0, scale=0.9)
        soft = kl.token_divergence(z, teacher, kind=divergence, temperature=1.5, share=0.3)
        return soft + F.cross_entropy(z, torch.arange(3), reduction="none")

    assert torch.autograd.gradcheck(loss, inputs)
