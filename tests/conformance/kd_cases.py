"""Cases of kd_conformance.py as data: optimizer steps of small models, and losses of given logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.conformance.kd_problems import LM, UNIFORM, Problem, Settings, Text, V

# Largest relative difference of loss or gradient norm; float32 sums stay below 1e-5.
TOLERANCE = 1e-4

UNEVEN = (Text((3,) * 9), Text((8,) * 4), Text((11,) * 3))
TEXTS = (Text((3, 4, 5, 6, 7), 4), Text((8, 9, 1), 1), Text((2, 2, 10, 11, 12, 3, 1), 3))


@dataclass(frozen=True)
class Case:
    """Args: what: for the table. make: returns new models and texts each time; the worst of several problems counts.
    with_or_without_t2: the step loss may or may not have the factor T^2. gradients_only: another case checks the value,
    so that for example a loss without the teacher's entropy fails once."""

    name: str
    what: str
    make: Callable[[], list[Problem]]
    tolerance: float = TOLERANCE
    with_or_without_t2: bool = False
    gradients_only: bool = False


def _plain(kind: str, *shares: float, **settings: Any) -> Callable[[], list[Problem]]:
    return lambda: [Problem(LM(0), LM(1), Settings(kind, share=share, **settings)) for share in shares or (0.5,)]


def _teacher_in_training() -> list[Problem]:
    teacher = LM(1, dropout=0.5)
    teacher.train()
    return [Problem(LM(0), teacher, Settings())]


def _padded(**sides: int) -> Callable[[], list[Problem]]:
    def make() -> list[Problem]:
        student, teacher = (LM(seed, columns=V + sides.get(side, 0)) for seed, side in ((0, "student"), (1, "teacher")))
        return [Problem(student, teacher, Settings())]

    return make


CASES = (
    Case("forward KL", "KL(p, q) in nats with the teacher's entropy", _plain("forward_kl")),
    Case("reverse KL", "KL(q, p)", _plain("reverse_kl")),
    Case("JSD 0.5", "m = 0.5 p + 0.5 q", _plain("jsd", 0.5)),
    Case("JSD 0.1", "m = 0.1 p + 0.9 q", _plain("jsd", 0.1)),
    Case("JSD ends", "0 is forward, 1 is reverse KL", _plain("jsd", 0.0, 1.0)),
    Case(
        "skew KL",
        "forward and reverse, 0.1",
        lambda: _plain("skew_forward_kl", 0.1)() + _plain("skew_reverse_kl", 0.1)(),
    ),
    Case("total variation", "half the L1 distance", _plain("tvd")),
    Case("perfect student", "loss and gradient 0, forward KL", lambda: [Problem(LM(1), LM(1), Settings())]),
    Case(
        "temperature", "T = 2 on both sides, T^2 or not", _plain("forward_kl", temperature=2.0), with_or_without_t2=True
    ),
    Case("T^2", "T = 2 with the factor", _plain("forward_kl", temperature=2.0)),
    Case(
        "CE mix",
        "0.3 CE + 0.7 D at T = 2, CE without T, T^2 or not",
        _plain("forward_kl", temperature=2.0, hard_weight=0.3),
        with_or_without_t2=True,
    ),
    Case(
        "first and last token",
        "prompts masked, labels shifted",
        lambda: [Problem(LM(0), LM(1), Settings(), (TEXTS,))],
        gradients_only=True,
    ),
    Case(
        "padding",
        "left and right, amount",
        lambda: [Problem(LM(0), LM(1), Settings(), (UNEVEN,), left=left, extra_padding=2) for left in (False, True)],
        gradients_only=True,
    ),
    Case(
        "accumulation",
        "uneven micro-batches equal one batch",
        lambda: [Problem(LM(0), LM(1), Settings(), ((UNEVEN[0],), UNEVEN[1:]))],
        gradients_only=True,
    ),
    Case(
        "no target in a micro-batch",
        "finite, changes nothing",
        lambda: [Problem(LM(0), LM(1), Settings(), ((Text((3, 3, 3), trained=False),), UNIFORM))],
        gradients_only=True,
    ),
    Case("teacher left in train mode", "its dropout is off", _teacher_in_training, gradients_only=True),
    Case(
        "soft-cap and logit scale",
        "of the teacher's config",
        lambda: [Problem(LM(0), LM(1, final_logit_softcapping=1.5, logit_scale=0.5), Settings())],
        gradients_only=True,
    ),
    Case("teacher's columns padded", "3 more, as Qwen2.5 has", _padded(teacher=3), gradients_only=True),
    Case("student's columns padded", "3 more", _padded(student=3), gradients_only=True),
)


@dataclass(frozen=True)
class LogitCase:
    """A loss on given logits: ``make`` returns student and teacher logits [N, V], stored classes k or None, and the
    expected loss in nats per token."""

    name: str
    what: str
    make: Callable[[], tuple[Tensor, Tensor, int | None, Tensor]]
    tolerance: float = TOLERANCE


def _bucket(z_s: Tensor, z_t: Tensor, k: int) -> Tensor:
    q, p = z_s.double().softmax(-1), z_t.double().softmax(-1)
    rows = []
    for n, chosen in enumerate(p.topk(k).indices.tolist()):
        others = [v for v in range(p.shape[1]) if v not in chosen]
        groups = [[v] for v in chosen] + ([others] if others else [])
        sums = [(p[n, g].sum(), q[n, g].sum()) for g in groups]
        rows.append(sum(a * torch.log(a / b) for a, b in sums))
    return torch.stack([torch.as_tensor(row) for row in rows])


def _bfloat16() -> tuple[Tensor, Tensor, None, Tensor]:
    g = torch.Generator().manual_seed(0)
    z_t = (4 * torch.randn(16, 2000, generator=g)).bfloat16()
    z_s = (z_t + 0.3 * torch.randn(16, 2000, generator=g)).bfloat16()
    log_q, log_p = z_s.double().log_softmax(-1), z_t.double().log_softmax(-1)
    return z_s, z_t, None, (log_p.exp() * (log_p - log_q)).sum(-1)


def _stored(k: int) -> tuple[Tensor, Tensor, int, Tensor]:
    """Student and teacher have the same most likely classes, so it does not matter whose are kept."""
    g = torch.Generator().manual_seed(0)
    z_t = torch.randn(8, 20, generator=g)
    z_t[:, :4] += 6
    z_s = z_t + 0.5 * torch.randn(8, 20, generator=g)
    return z_s, z_t, k, _bucket(z_s, z_t, k)


def _small_rest() -> tuple[Tensor, Tensor, int, Tensor]:
    """The student gives 3e-11 to the classes that are not kept, the teacher a tenth."""
    z_s = torch.tensor([[25.0, 24.0, 0.0, 0.0]])
    z_t = torch.tensor([[3.0, 2.0, 0.0, 0.0]])
    return z_s, z_t, 2, _bucket(z_s, z_t, 2)


LOGIT_CASES = (
    LogitCase("bfloat16 logits", "float32 inside, without autocast", _bfloat16, tolerance=1e-3),
    LogitCase("top-k with tail", "k = 4 of 20, one class for the others", lambda: _stored(4)),
    LogitCase("k = V", "all classes kept equals dense", lambda: _stored(20)),
    LogitCase("tail below 6e-8", "student's rest 3e-11", _small_rest, tolerance=1e-3),
)
