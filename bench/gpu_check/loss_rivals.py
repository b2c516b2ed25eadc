"""gpu-check: the rivals of the fused losses. Each computes the same loss on the same tensors.

Source: Liger 0.8.5 and QuACK 0.6.5, the wheels on PyPI, read 2026-11-28. Liger's Triton and compiled losses were run on a CPU in Triton's
interpreter: gradients are within 6e-3 of ours at 32 x 64 x 304. The CuTe DSL and QuACK need a GPU; their code was only read.
``liger_kernel/transformers/fused_linear_cross_entropy.py``, ``fused_linear_jsd.py``, ``fused_linear_kl_div.py``;
``liger_kernel/chunked_loss/jsd_loss.py``; ``liger_kernel/ops/cutedsl/ops/fused_linear_cross_entropy_sm90.py``;
``quack/linear_cross_entropy.py``. The same losses in plain PyTorch are in the cases.py of the ops.

Liger reads LIGER_KERNEL_IMPL when ``liger_kernel.ops`` is imported, and again at every call of a dispatched op. It is not set
here. If the CuTe DSL is installed, Liger's dispatcher uses it on Hopper and later inside JSD and cross-entropy, and the row records
that (``implementation``). The whole cross-entropy in CuTe DSL is imported from its own module, which ignores the variable, so both
can be timed in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peftlab_kernels.cases import HeadProblem, TimedLoss
from torch.nn import functional as F

from bench.gpu_check.base import Device

CHUNK_ROWS = 4096  # QuACK's own default


@dataclass(frozen=True)
class Rival:
    """make: its loss of a problem. packages: it is not tried without them. mean: it averages over tokens, where ours sums.
    op: the op for which Liger's dispatcher chooses an implementation."""

    make: Callable[[HeadProblem], Callable[[], Any]]
    packages: tuple[str, ...] = ()
    mean: bool = False
    op: str = ""


def make_problem(device: Device, timed: TimedLoss, shape: tuple[int, int, int]) -> HeadProblem:
    """Random tensors. shape: tokens, width of the student, classes."""
    num_tokens, hidden, vocab = shape
    dtype = torch.bfloat16

    def head(size: int, seed: int) -> Any:
        return (device.randn(vocab, size, seed=seed) / size**0.5).to(dtype)

    x = device.randn(num_tokens, hidden, seed=0, dtype=dtype).requires_grad_()
    w = head(hidden, 1).requires_grad_(timed.trained)
    t = torch.randint(0, vocab, (num_tokens,), device=device.kind)
    if timed.teacher is None:
        return HeadProblem(x, w, t)
    size = device.pick(timed.teacher, hidden)
    tx = device.randn(num_tokens, size, seed=2, dtype=dtype)
    return HeadProblem(x, w, t, tx, head(size, 3), timed.hard_weight)


def _liger(p: HeadProblem) -> Callable[[], Any]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda: fused(p.w, p.x, p.t)


def _liger_cute(p: HeadProblem) -> Callable[[], Any]:
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    return lambda: liger_fused_linear_cross_entropy_sm90(p.x, p.w, p.t, reduction="sum")


def _quack(p: HeadProblem) -> Callable[[], Any]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda: chunked_linear_cross_entropy(p.x, p.w, p.t, chunk_size=CHUNK_ROWS, reduction="sum")


def _liger_jsd(p: HeadProblem) -> Callable[[], Any]:
    """beta 0 is forward KL."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    fused = LigerFusedLinearJSD(jsd_beta=0.0)
    return lambda: fused(p.x, p.w, p.tx, p.tw, None)


def _liger_kl_div(p: HeadProblem) -> Callable[[], Any]:
    """It needs all of the teacher's probabilities. As in ours, the time includes the product and the softmax that compute them."""
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss

    fused = LigerFusedLinearKLDivLoss(reduction="sum")

    def loss() -> Any:
        assert p.tx is not None and p.tw is not None
        with torch.no_grad():
            target = F.linear(p.tx, p.tw).softmax(-1)  # float32 inside, 16 bits out: Liger reads 16 bits
        return fused(p.x, p.w, target)

    return loss


def _liger_chunked_jsd(p: HeadProblem) -> Callable[[], Any]:
    """Compiled by torch, its default. It computes dW of a frozen head too. Without labels beta is 0: forward KL."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    labels = p.hard_weight > 0
    weights = {"weight_hard_loss": p.hard_weight, "weight_soft_loss": 1 - p.hard_weight}
    fused = LigerFusedLinearJSDLoss(**weights, beta=0.5 * labels)
    return lambda: fused(p.x, p.w, p.tx, p.tw, p.t)


_CUTE = ("liger_kernel", "cutlass")
RIVALS = {
    "Liger": Rival(_liger, ("liger_kernel",), op="cross_entropy_loss_and_grad"),
    "Liger CuTe": Rival(_liger_cute, _CUTE),
    "QuACK": Rival(_quack, ("quack", "cutlass")),
    "Liger JSD": Rival(_liger_jsd, ("liger_kernel",), mean=True, op="jsd_loss_and_grad"),
    "Liger KLDiv": Rival(_liger_kl_div, ("liger_kernel",), op="kl_loss_and_grad"),
    "Liger chunked JSD": Rival(_liger_chunked_jsd, ("liger_kernel",), mean=True),
}


def rival_of(timed: TimedLoss, name: str) -> Rival:
    """The rival with this name: a library's loss, or the plain PyTorch loss of the op's cases.py."""
    plain = timed.plain
    return Rival(plain.make, mean=plain.mean) if name == plain.name else RIVALS[name]


def implementation(rival: Rival) -> str:
    """The implementation that Liger's dispatcher uses for the rows of logits; empty if it does not choose."""
    if not rival.op:
        return ""
    try:
        from liger_kernel.backends import resolve_impl

        return str(resolve_impl(rival.op).impl_name)
    except Exception:  # of any kind: the figure does not depend on it
        return ""
