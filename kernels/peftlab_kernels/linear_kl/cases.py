"""What to compile, check and time for ``linear_kl``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftlab_kernels.cases import NUM_CLASSES, Compiled, HeadProblem, Loss, LossInputs, PlainLoss, TimedLoss
from peftlab_kernels.heads import Head
from peftlab_kernels.linear_cross_entropy.op import rows_options
from peftlab_kernels.linear_kl.op import TAILS, DenseTeacher, OnlineTeacher, SparseTeacher, linear_kl
from peftlab_kernels.linear_kl.reference import DIVERGENCES, token_divergence
from peftlab_kernels.lora_linear import DenseWeight

NUM_STORED = 64
HARD = {"HAS_HARD": True, "HAS_WEIGHT": True, "HAS_CAP": True, "HAS_GRAD": True}

COMPILED = [
    *(Compiled("divergence_rows_kernel", name, f"*T *T *i64 {3 * ' *fp32'} i16 i16 i16 {8 * ' fp32'}",
               lambda dtype, rank, kind=kind: {"KIND": kind, "TEACHER_HAS_CAP": True, **HARD, **rows_options(NUM_CLASSES)},  # type: ignore[misc]
               matrix=False)
      for kind, name in enumerate(DIVERGENCES)),
    *(Compiled("sparse_rows_kernel", f"{name}, 64 classes", f"*T *i64 *fp32 *i64 {3 * ' *fp32'} i16 i16 i16 {5 * ' fp32'}",
               lambda dtype, rank, tail=tail: {"TAIL": tail, "BLOCK_K": 64, **HARD, **rows_options(NUM_CLASSES)},  # type: ignore[misc]
               matrix=False)
      for tail, name in enumerate(TAILS)),
]  # fmt: skip

# Total variation is tested on a CPU only: its gradient jumps where p = q, and other roundings move that point.
CHECKED = ("forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "jsd")
SHARE = 0.3


def _dense(kind: str, x: Tensor, head: Head, inputs: LossInputs, **options: Any) -> Tensor:
    return linear_kl(
        x, head, DenseTeacher(inputs.teacher_logits), inputs.targets, divergence=kind, share=SHARE,
        temperature=inputs.temperature, hard_weight=inputs.hard_weight, **options,
    ).total  # fmt: skip


def _eager_dense(kind: str, logits: Tensor, inputs: LossInputs) -> Tensor:
    soft = token_divergence(
        logits, inputs.teacher_logits.to(logits), kind=kind, share=SHARE, temperature=inputs.temperature
    ).sum()
    return _mixed(soft, logits, inputs)


def _stored(x: Tensor, head: Head, inputs: LossInputs, **options: Any) -> Tensor:
    teacher = SparseTeacher(inputs.ids, inputs.probs.float())
    return linear_kl(
        x, head, teacher, inputs.targets, share=SHARE, temperature=inputs.temperature, hard_weight=inputs.hard_weight,
        **options,
    ).total  # fmt: skip


def _eager_stored(logits: Tensor, inputs: LossInputs) -> Tensor:
    """KL over the stored classes and one class for all others."""
    z, ids, p = logits / inputs.temperature, inputs.ids, inputs.probs.to(logits)
    log_rest = z.scatter(1, ids, -torch.inf).logsumexp(-1) - z.logsumexp(-1)
    rest = (1 - p.sum(-1)).clamp_min(1e-30)
    soft = (p * (p.log() - z.log_softmax(-1).gather(1, ids))).sum() + (rest * (rest.log() - log_rest)).sum()
    return _mixed(soft, logits, inputs)


def _mixed(soft: Tensor, logits: Tensor, inputs: LossInputs) -> Tensor:
    hard, share = F.cross_entropy(logits, inputs.targets, reduction="sum"), inputs.hard_weight
    return share * hard + (1 - share) * inputs.temperature**2 * soft


LOSSES = {
    **{kind: Loss(partial(_dense, kind), partial(_eager_dense, kind)) for kind in CHECKED},
    f"top-{NUM_STORED} + tail": Loss(_stored, _eager_stored),
}


def _teacher(p: HeadProblem) -> OnlineTeacher:
    assert p.tx is not None and p.tw is not None
    return OnlineTeacher(p.tx, Head(DenseWeight(p.tw)))


def _online(p: HeadProblem) -> Callable[[], Tensor]:
    head, teacher = Head(DenseWeight(p.w)), _teacher(p)
    return lambda: linear_kl(p.x, head, teacher).total


def _jsd(p: HeadProblem) -> Callable[[], Tensor]:
    head, teacher = Head(DenseWeight(p.w)), _teacher(p)
    return lambda: linear_kl(p.x, head, teacher, p.t, divergence="jsd", share=0.5, hard_weight=p.hard_weight).total


def _top(p: HeadProblem) -> Callable[[], Tensor]:
    assert p.tx is not None and p.tw is not None
    head = Head(DenseWeight(p.w))
    with torch.no_grad():  # in parts: the measurement excludes the teacher's logits
        parts = [F.linear(part, p.tw).float().softmax(-1).topk(NUM_STORED) for part in torch.split(p.tx, 1024)]
    sparse = SparseTeacher(torch.cat([f.indices for f in parts]), torch.cat([f.values for f in parts]))
    return lambda: linear_kl(p.x, head, sparse).total


def _lean_kl(p: HeadProblem) -> Callable[[], Tensor]:
    """KL with as few passes and tensors as plain PyTorch needs."""

    def loss() -> Tensor:
        assert p.tx is not None and p.tw is not None
        with torch.no_grad():
            target = F.linear(p.tx, p.tw).float().softmax(-1)
        return F.kl_div(F.linear(p.x, p.w).float().log_softmax(-1), target, reduction="sum")

    return loss


def _jsd_and_ce(p: HeadProblem) -> Callable[[], Tensor]:
    """HFJSDLoss at temperature 1 and beta 0.5: half JSD and half cross-entropy.

    Source: the baseline of Liger's own benchmark, ``test/chunked_loss/test_jsd_loss.py`` and ``test/utils.py`` (linkedin/Liger-Kernel at
    ead96b618e5c).
    """

    def loss() -> Tensor:
        assert p.tx is not None and p.tw is not None
        student = (p.x @ p.w.t()).float()
        with torch.no_grad():
            teacher = (p.tx @ p.tw.t()).float()
        hard = F.cross_entropy(student, p.t)
        log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
        log_m = torch.logsumexp(torch.stack([log_q + math.log(0.5), log_p + math.log(0.5)]), 0)
        parts = [F.kl_div(log_m, log, reduction="none", log_target=True) for log in (log_q, log_p)]
        return 0.5 * hard + 0.5 * (0.5 * parts[1] + 0.5 * parts[0]).sum(-1).mean()

    return loss


LEAN = PlainLoss("lean KL", _lean_kl, bytes_per_logit=102, softmaxes=2, peak=20)
TIMED_LOSSES = {
    "distillation, frozen head": TimedLoss(
        tokens=8192,
        hidden=4096,
        teacher=4096,
        make=_online,
        plain=LEAN,
        bytes_per_logit=16,
        targets={
            "lean KL": (1.50, 15.0),
            "Liger JSD": (1.80, 3.0),
            "Liger KLDiv": (1.00, 3.0),
            "Liger chunked JSD": (1.45, 3.0),
        },
    ),
    # Liger's own benchmark of JSD also halves the student's width.
    "JSD + labels, frozen head": TimedLoss(
        tokens=8192,
        hidden=2048,
        teacher=4096,
        hard_weight=0.5,
        make=_jsd,
        plain=PlainLoss("JSD + CE", _jsd_and_ce, bytes_per_logit=394, softmaxes=3, peak=64, mean=True),
        bytes_per_logit=18,
        rows_ms=7.0,  # from instructions counted in PTX; its bytes take less
        targets={"JSD + CE": (4.0, 50.0), "Liger chunked JSD": (1.45, 3.0)},
    ),
    f"top-{NUM_STORED} + tail, frozen head": TimedLoss(
        tokens=8192,
        hidden=4096,
        teacher=4096,
        stored=True,
        make=_top,
        plain=LEAN,
        bytes_per_logit=10,
        targets={"lean KL": (2.20, 15.0), "Liger chunked JSD": (2.00, None)},
    ),
}
