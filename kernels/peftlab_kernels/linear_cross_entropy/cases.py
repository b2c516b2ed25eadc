"""What to compile, check and time for ``linear_cross_entropy``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from peftlab_kernels.cases import NUM_CLASSES, Compiled, HeadProblem, Loss, LossInputs, PlainLoss, TimedLoss
from peftlab_kernels.heads import Head
from peftlab_kernels.linear_cross_entropy.op import linear_cross_entropy, rows_options
from peftlab_kernels.lora_linear import DenseWeight

COMPILED = [
    Compiled("cross_entropy_rows_kernel", "", f"*T *i64 *fp32 *fp32 i16 i16 {2 * ' fp32'}",
             lambda dtype, rank: {"HAS_WEIGHT": True, "HAS_CAP": True, "HAS_GRAD": True, **rows_options(NUM_CLASSES)},
             matrix=False),
]  # fmt: skip


def _fused(x: Tensor, head: Head, inputs: LossInputs, **options: Any) -> Tensor:
    return linear_cross_entropy(x, head, inputs.targets, **options).total


def _eager(logits: Tensor, inputs: LossInputs) -> Tensor:
    return F.cross_entropy(logits, inputs.targets, reduction="sum")


LOSSES = {"cross-entropy": Loss(_fused, _eager)}


def _make(p: HeadProblem) -> Callable[[], Tensor]:
    head = Head(DenseWeight(p.w))
    return lambda: linear_cross_entropy(p.x, head, p.t).total


def _full_logits(p: HeadProblem) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(F.linear(p.x, p.w).float(), p.t, reduction="sum")


PLAIN = PlainLoss("full logits", _full_logits, bytes_per_logit=44, softmaxes=2, peak=12)
TIMED_LOSSES = {
    "cross-entropy, frozen head": TimedLoss(
        tokens=4096,
        hidden=4096,
        make=_make,
        plain=PLAIN,
        bytes_per_logit=10,
        targets={"full logits": (1.30, None)},
        more=((4096, 576, 49152),),  # of SmolLM2
    ),
    "cross-entropy, trained head": TimedLoss(
        tokens=4096,
        hidden=4096,
        make=_make,
        plain=PLAIN,
        bytes_per_logit=10,
        trained=True,
        targets={
            "full logits": (1.20, None),
            "Liger": (4.0, None),
            "Liger CuTe": (0.97, None),
            "QuACK": (0.83, None),
        },
    ),
}
