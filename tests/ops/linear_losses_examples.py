"""Shared by the tests of linear_cross_entropy and linear_kl: heads, teachers, formulas, error budgets."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from peftlab_kernels.heads import Head
from peftlab_kernels.linear_cross_entropy import head_logits_reference, linear_cross_entropy
from peftlab_kernels.linear_kl import DIVERGENCES, DenseTeacher, OnlineTeacher, SparseTeacher, linear_kl
from peftlab_kernels.lora_linear import DenseWeight, Int8Weight
from peftlab_kernels.nf4_dequant import NF4Weight, nf4_dequant_reference
from torch import Tensor

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
# Allowed beyond the eager error, relative to the largest value. Eager 16-bit code rounds logits as often as the fused
# one. Its softmax gradient is never in 16 bits when it flows through float(); the fused gradient of the logits is
# rounded once more.
SLACK = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_CPU = pytest.mark.skipif(DEVICE.type != "cpu", reason="counts the CPU's allocations")
N, H, V, R, HT = 13, 24, 131, 4, 16


@dataclass(frozen=True)
class Case:
    """A head, the float64 values of its weight, and the inputs. trained: the leaves that need a gradient."""

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
        tensors = {
            "hidden": self.hidden, "adapter_hidden": self.adapter_hidden, "weight": weight, "bias": self.head.bias,
            "A": A, "B": B,
        }  # fmt: skip
        return {name: tensors[name] for name in self.trained}  # type: ignore[misc]

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
        """Logits by the reference, in the type of the hidden states or in ``dtype`` throughout."""
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
    """A case by name: the storage and the parts of the head, joined by ``+``."""
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
    """The value and, by name, the gradients of ``total`` times 0.5, because the incoming gradient is not always 1."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in case.leaves().items()}
    value = total(case.with_leaves(leaves))
    grads = torch.autograd.grad(0.5 * value, list(leaves.values()))
    return {"total": value.detach(), **dict(zip(leaves, grads, strict=True))}


def check(
    budget: Budget, case: Case, op: Callable[[Case], Tensor], formula: Callable[[Case, torch.dtype | None], Tensor]
) -> None:
    """``formula``: the sum from the reference's logits, in the type of the case and, as the truth, in float64."""
    actual, eager = gradients(case, op), gradients(case, lambda c: formula(c, None))
    truth = {name: t.double() for name, t in gradients(case, lambda c: formula(c, torch.float64)).items()}
    assert actual.keys() == truth.keys()
    for name, want in truth.items():
        assert name == "total" or actual[name].dtype == case.leaves()[name].dtype
        slack = SLACK[case.hidden.dtype]
        if case.hidden.dtype == torch.float64 and not isinstance(case.head.weight, DenseWeight):
            slack = SLACK[torch.float32]  # decoded in float32, whatever type the hidden states have
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
    """The divergences from probabilities, by definition."""

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
