"""gpu-check: what the fused losses are compared with, each the same loss on the same tensors.

Source: Liger 0.8.5 and QuACK 0.6.5, the wheels on PyPI, read 2026-11-28. Liger's Triton and compiled losses have run, on a CPU in Triton's
interpreter: gradients within 6e-3 of ours at 32 x 64 x 304. The CuTe DSL and QuACK need a GPU and are only read.
``liger_kernel/transformers/fused_linear_cross_entropy.py``, ``fused_linear_jsd.py``, ``fused_linear_kl_div.py``;
``liger_kernel/chunked_loss/jsd_loss.py``; ``liger_kernel/ops/cutedsl/ops/fused_linear_cross_entropy_sm90.py``;
``quack/linear_cross_entropy.py``. "JSD + CE" is the baseline of Liger's own benchmark, HFJSDLoss of
``test/chunked_loss/test_jsd_loss.py`` and ``test/utils.py`` (linkedin/Liger-Kernel at ead96b618e5c).

Liger reads LIGER_KERNEL_IMPL when ``liger_kernel.ops`` is imported, and again at every call of an op that it dispatches. It is not
set here: where the CuTe DSL is installed, on Hopper and later, its dispatcher takes that for what is inside JSD and cross-entropy,
and the row says which (``implementation``). The whole cross-entropy in CuTe DSL is imported from its own module, which the variable
does not touch, so that both can be timed in one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.gpu_check.base import Device
from bench.gpu_check.loss_model import CE_TRAINED, JSD, KL, TEACHER_HIDDEN, TOP

NUM_STORED = 64
CHUNK_ROWS = 4096  # of QuACK, its own default


@dataclass(frozen=True)
class Problem:
    """x [N, H] and w [V, H] of the student, t [N]; tx [N, G] and tw [V, G] of the teacher, None for a cross-entropy."""

    case: str
    x: Any
    w: Any
    t: Any
    tx: Any
    tw: Any

    @property
    def distils(self) -> bool:
        return self.tx is not None

    @property
    def leaves(self) -> list[Any]:
        return [self.x, self.w] if self.w.requires_grad else [self.x]


@dataclass(frozen=True)
class Rival:
    """make: its loss of a problem. packages: without which it is not tried. mean: it is one over tokens, ours a sum.
    op: what Liger's dispatcher chooses an implementation for."""

    make: Callable[[Problem], Callable[[], Any]]
    packages: tuple[str, ...] = ()
    mean: bool = False
    op: str = ""


def make_problem(device: Device, case: str, shape: tuple[int, int, int]) -> Problem:
    import torch

    num_tokens, hidden, vocab = shape
    dtype = torch.bfloat16

    def head(size: int, seed: int) -> Any:
        return (device.randn(vocab, size, seed=seed) / size**0.5).to(dtype)

    x = device.randn(num_tokens, hidden, seed=0, dtype=dtype).requires_grad_()
    w = head(hidden, 1).requires_grad_(case == CE_TRAINED)
    t = torch.randint(0, vocab, (num_tokens,), device=device.kind)
    if case not in (KL, JSD, TOP):
        return Problem(case, x, w, t, None, None)
    size = device.pick(TEACHER_HIDDEN, hidden)
    return Problem(case, x, w, t, device.randn(num_tokens, size, seed=2, dtype=dtype), head(size, 3))


def ours(problem: Problem) -> Callable[[], Any]:
    """The loss of the case, a sum over tokens. What a teacher has stored is made here, before anything is timed."""
    import torch
    from torch.nn import functional as F

    from peftlab import ops

    p, head = problem, ops.Head(ops.DenseWeight(problem.w))
    if not p.distils:
        return lambda: ops.linear_cross_entropy(p.x, head, p.t).total
    if p.case == TOP:
        with torch.no_grad():  # in parts: the teacher's logits are not what is measured
            parts = [F.linear(part, p.tw).float().softmax(-1).topk(NUM_STORED) for part in p.tx.split(1024)]
        sparse = ops.SparseTeacher(torch.cat([f.indices for f in parts]), torch.cat([f.values for f in parts]))
        return lambda: ops.linear_kl(p.x, head, sparse).total
    teacher = ops.OnlineTeacher(p.tx, ops.Head(ops.DenseWeight(p.tw)))
    if p.case == KL:
        return lambda: ops.linear_kl(p.x, head, teacher).total
    return lambda: ops.linear_kl(p.x, head, teacher, p.t, divergence="jsd", share=0.5, hard_weight=0.5).total


def _full_logits(p: Problem) -> Callable[[], Any]:
    from torch.nn import functional as F

    return lambda: F.cross_entropy(F.linear(p.x, p.w).float(), p.t, reduction="sum")


def _lean_kl(p: Problem) -> Callable[[], Any]:
    """As few passes and tensors as plain PyTorch can do with."""
    import torch
    from torch.nn import functional as F

    def loss() -> Any:
        with torch.no_grad():
            target = F.linear(p.tx, p.tw).float().softmax(-1)
        return F.kl_div(F.linear(p.x, p.w).float().log_softmax(-1), target, reduction="sum")

    return loss


def _jsd_and_ce(p: Problem) -> Callable[[], Any]:
    """HFJSDLoss at temperature 1 and beta 0.5, half of it and half of the cross-entropy."""
    import torch
    from torch.nn import functional as F

    def loss() -> Any:
        student = (p.x @ p.w.t()).float()
        with torch.no_grad():
            teacher = (p.tx @ p.tw.t()).float()
        hard = F.cross_entropy(student, p.t)
        log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
        log_m = torch.logsumexp(torch.stack([log_q + math.log(0.5), log_p + math.log(0.5)]), 0)
        parts = [F.kl_div(log_m, log, reduction="none", log_target=True) for log in (log_q, log_p)]
        return 0.5 * hard + 0.5 * (0.5 * parts[1] + 0.5 * parts[0]).sum(-1).mean()

    return loss


def _liger(p: Problem) -> Callable[[], Any]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda: fused(p.w, p.x, p.t)


def _liger_cute(p: Problem) -> Callable[[], Any]:
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    return lambda: liger_fused_linear_cross_entropy_sm90(p.x, p.w, p.t, reduction="sum")


def _quack(p: Problem) -> Callable[[], Any]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda: chunked_linear_cross_entropy(p.x, p.w, p.t, chunk_size=CHUNK_ROWS, reduction="sum")


def _liger_jsd(p: Problem) -> Callable[[], Any]:
    """beta 0 is forward KL."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    fused = LigerFusedLinearJSD(jsd_beta=0.0)
    return lambda: fused(p.x, p.w, p.tx, p.tw, None)


def _liger_kl_div(p: Problem) -> Callable[[], Any]:
    """It wants the teacher's probabilities whole; the product and the softmax that make them are part of the time, as in ours."""
    import torch
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss
    from torch.nn import functional as F

    fused = LigerFusedLinearKLDivLoss(reduction="sum")

    def loss() -> Any:
        with torch.no_grad():
            target = F.linear(p.tx, p.tw).softmax(-1)  # in float32 inside, and 16 bits out: Liger reads those
        return fused(p.x, p.w, target)

    return loss


def _liger_chunked_jsd(p: Problem) -> Callable[[], Any]:
    """Compiled by torch, as is its default; it makes dW of a frozen head too. Without labels beta 0, forward KL."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    labels = p.case == JSD
    weights = {"weight_hard_loss": 0.5 * labels, "weight_soft_loss": 0.5 if labels else 1.0}
    fused = LigerFusedLinearJSDLoss(**weights, beta=0.5 * labels)
    return lambda: fused(p.x, p.w, p.tx, p.tw, p.t)


_CUTE = ("liger_kernel", "cutlass")
RIVALS = {
    "full logits": Rival(_full_logits),
    "lean KL": Rival(_lean_kl),
    "JSD + CE": Rival(_jsd_and_ce, mean=True),
    "Liger": Rival(_liger, ("liger_kernel",), op="cross_entropy_loss_and_grad"),
    "Liger CuTe": Rival(_liger_cute, _CUTE),
    "QuACK": Rival(_quack, ("quack", "cutlass")),
    "Liger JSD": Rival(_liger_jsd, ("liger_kernel",), mean=True, op="jsd_loss_and_grad"),
    "Liger KLDiv": Rival(_liger_kl_div, ("liger_kernel",), op="kl_loss_and_grad"),
    "Liger chunked JSD": Rival(_liger_chunked_jsd, ("liger_kernel",), mean=True),
}


def implementation(rival: Rival) -> str:
    """Which of its implementations Liger's dispatcher takes for the rows of logits; empty where it does not choose."""
    if not rival.op:
        return ""
    try:
        from liger_kernel.backends import resolve_impl

        return str(resolve_impl(rival.op).impl_name)
    except Exception:  # of any kind: it is told beside a figure that stands without it
        return ""
