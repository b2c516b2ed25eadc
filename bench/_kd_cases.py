"""Cases of kd_conformance.py: small models, what they are trained on, and what has to come out, in float64.

A model's logits are ``softcap(scale * W E[token])``, so that the truth can be summed token by token and padding or
micro-batches change nothing that a model computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

V, HIDDEN, PAD = 13, 6, 0
IGNORED = -100
# Largest relative difference of loss or gradient norm; float32 sums stay below 1e-5.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Text:
    """Token ids of which those from ``prompt`` on are trained; ``trained=False`` for a text cut off in its prompt."""

    ids: tuple[int, ...]
    prompt: int = 1
    trained: bool = True

    @property
    def labels(self) -> list[int]:
        return [i if self.trained and at >= self.prompt else IGNORED for at, i in enumerate(self.ids)]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Each trained token behind the one it is predicted from."""
        return [(self.ids[i - 1], label) for i, label in enumerate(self.labels) if i and label != IGNORED]


# In a row of one repeated token every position has the same logits: a shift of the mask cannot show. For cases that
# are about something else.
UNIFORM = (Text((3,) * 6), Text((8,) * 6), Text((11,) * 6))
UNEVEN = (Text((3,) * 9), Text((8,) * 4), Text((11,) * 3))
TEXTS = (Text((3, 4, 5, 6, 7), 4), Text((8, 9, 1), 1), Text((2, 2, 10, 11, 12, 3, 1), 3))


@dataclass(frozen=True)
class Settings:
    """The objective in peftlab's names; ``t2``: the factor T^2 is part of what has to come out."""

    kind: str = "forward_kl"
    temperature: float = 1.0
    share: float = 0.5
    hard_weight: float = 0.0
    t2: bool = True


class Decoder(nn.Module):
    def __init__(self, embeddings: Tensor, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(embeddings)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=self.dropout(self.weight[input_ids]))


class LM(nn.Module):
    """Answers what trainers ask of a transformers causal LM."""

    def __init__(
        self, seed: int, *, columns: int = V, dtype: torch.dtype = torch.float32, dropout: float = 0.0, **transform: Any
    ) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.base_model = Decoder(torch.randn(V, HIDDEN, generator=g).to(dtype), dropout)
        self.head = nn.Linear(HIDDEN, columns, bias=False, dtype=dtype)
        self.head.weight.data = torch.randn(columns, HIDDEN, generator=g).to(dtype)
        self.config = _Config(vocab_size=columns, eos_token_id=1, **transform)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def logits(self, hidden: Tensor) -> Tensor:
        z = self.head(hidden) * (self.config.logit_scale or 1.0)
        cap = self.config.final_logit_softcapping
        return z if cap is None else cap * torch.tanh(z / cap)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        logits = self.logits(self.base_model(input_ids).last_hidden_state)
        loss = None
        if labels is not None:
            flat = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            loss = F.cross_entropy(*flat, ignore_index=IGNORED)
        return CausalLMOutput(loss=loss, logits=logits)


@dataclass
class _Config:
    vocab_size: int
    eos_token_id: int
    logit_scale: float | None = None
    final_logit_softcapping: float | None = None
    model_type: str = "toy"

    def get_text_config(self) -> _Config:
        return self


@dataclass
class Problem:
    """One optimizer step: models, micro-batches of texts, objective."""

    student: LM
    teacher: LM
    settings: Settings
    micro_batches: Sequence[Sequence[Text]] = (UNIFORM,)
    left: bool = False
    extra_padding: int = 0

    @property
    def num_targets(self) -> int:
        return sum(len(text.pairs) for texts in self.micro_batches for text in texts)

    def batches(self) -> list[dict[str, Tensor]]:
        """Padded ``input_ids``, ``attention_mask``, ``labels`` [B, T] per micro-batch."""
        out = []
        for texts in self.micro_batches:
            length = max(len(text.ids) for text in texts) + self.extra_padding
            rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
            for text in texts:
                missing = length - len(text.ids)
                filled = zip(([*text.ids], [1] * len(text.ids), text.labels), (PAD, 0, IGNORED), strict=True)
                for name, (values, filler) in zip(rows, filled, strict=True):
                    pad = [filler] * missing
                    rows[name].append(pad + values if self.left else values + pad)
            out.append({name: torch.tensor(values) for name, values in rows.items()})
        return out


Outcome = tuple[float, Tensor, Tensor]


def gradients(problem: Problem, loss: Tensor | float) -> Outcome:
    """Loss and gradients of the student, after ``backward`` of all micro-batches."""
    parameters = problem.student.base_model.weight, problem.student.head.weight
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return float(loss), grads[0].double(), grads[1].double()


def truth(problem: Problem) -> Outcome:
    """The step loss of the contract and its gradients, in float64, over the shared columns."""
    embeddings, head = (
        p.detach().double().requires_grad_() for p in (problem.student.base_model.weight, problem.student.head.weight)
    )
    teacher, settings = problem.teacher, problem.settings
    total = torch.zeros((), dtype=torch.float64)
    for before, token in (pair for texts in problem.micro_batches for text in texts for pair in text.pairs):
        z = _transformed(head[:V] @ embeddings[before], problem.student)
        z_t = teacher.head.weight.detach().double()[:V] @ teacher.base_model.weight.detach().double()[before]
        hard = torch.logsumexp(z, -1) - z[token]
        total = (
            total
            + settings.hard_weight * hard
            + (1 - settings.hard_weight) * _soft(z, _transformed(z_t, teacher), settings)
        )
    loss = total / problem.num_targets
    loss.backward()
    assert embeddings.grad is not None and head.grad is not None
    return float(loss.detach()), embeddings.grad, head.grad


def _transformed(z: Tensor, model: LM) -> Tensor:
    z = z * (model.config.logit_scale or 1.0)
    cap = model.config.final_logit_softcapping
    return z if cap is None else cap * torch.tanh(z / cap)


def _soft(z_s: Tensor, z_t: Tensor, settings: Settings) -> Tensor:
    temperature, a = settings.temperature, settings.share
    q, p = (torch.exp(z / temperature) / torch.exp(z / temperature).sum() for z in (z_s, z_t))
    m = a * p + (1 - a) * q

    def kl(x: Tensor, y: Tensor) -> Tensor:
        return (x * torch.log(x / y)).sum()

    value = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "skew_forward_kl": lambda: kl(p, m),
        "skew_reverse_kl": lambda: kl(q, (1 - a) * p + a * q),
        "jsd": lambda: kl(p, q) if a == 0 else kl(q, p) if a == 1 else a * kl(p, m) + (1 - a) * kl(q, m),
        "tvd": lambda: (p - q).abs().sum() / 2,
    }[settings.kind]()
    return value * temperature**2 if settings.t2 else value


def deviation(found: Outcome, want: Outcome) -> float:
    """Largest relative difference of the loss and of the gradients; of padded columns the gradient has to be 0."""
    grads = [F.pad(want[2], (0, 0, 0, found[2].shape[0] - want[2].shape[0])), found[2]]
    pairs = [(torch.tensor(found[0]), torch.tensor(want[0])), (found[1], want[1]), (grads[1], grads[0])]
    worst = 0.0
    for got, expected in pairs:
        if not torch.isfinite(got).all():
            return math.inf
        worst = max(worst, float((got - expected).norm() / max(float(expected.norm()), 1e-2)))
    return worst


@dataclass(frozen=True)
class Case:
    """Args: what: for the table. make: new models and texts each time; of several problems the worst counts.
    with_or_without_t2: the step loss may have the factor T^2 or not."""

    name: str
    what: str
    make: Callable[[], list[Problem]]
    tolerance: float = TOLERANCE
    with_or_without_t2: bool = False


def _plain(kind: str, *shares: float, **settings: Any) -> Callable[[], list[Problem]]:
    return lambda: [Problem(LM(0), LM(1), Settings(kind, share=share, **settings)) for share in shares or (0.5,)]


def _perfect() -> list[Problem]:
    return [Problem(LM(1), LM(1), Settings(kind)) for kind in ("forward_kl", "reverse_kl", "jsd")]


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
    Case("JSD", "0.5 and 0.1", _plain("jsd", 0.5, 0.1)),
    Case("JSD ends", "0 is forward, 1 is reverse KL", _plain("jsd", 0.0, 1.0)),
    Case(
        "skew KL",
        "forward and reverse, 0.1",
        lambda: _plain("skew_forward_kl", 0.1)() + _plain("skew_reverse_kl", 0.1)(),
    ),
    Case("total variation", "half the L1 distance", _plain("tvd")),
    Case("perfect student", "loss and gradient 0", _perfect),
    Case(
        "temperature", "T = 2 on both sides, T^2 or not", _plain("forward_kl", temperature=2.0), with_or_without_t2=True
    ),
    Case("T^2", "T = 2 with the factor", _plain("forward_kl", temperature=2.0)),
    Case("CE mix", "0.3 CE + 0.7 T^2 D at T = 2, CE without T", _plain("forward_kl", temperature=2.0, hard_weight=0.3)),
    Case(
        "first and last token", "prompts masked, labels shifted", lambda: [Problem(LM(0), LM(1), Settings(), (TEXTS,))]
    ),
    Case(
        "padding",
        "left and right, amount",
        lambda: [Problem(LM(0), LM(1), Settings(), (UNEVEN,), left=left, extra_padding=2) for left in (False, True)],
    ),
    Case(
        "accumulation",
        "uneven micro-batches equal one batch",
        lambda: [Problem(LM(0), LM(1), Settings(), ((UNEVEN[0],), UNEVEN[1:]))],
    ),
    Case(
        "no target in a micro-batch",
        "finite, changes nothing",
        lambda: [Problem(LM(0), LM(1), Settings(), ((Text((3, 3, 3), trained=False),), UNIFORM))],
    ),
    Case("teacher left in train mode", "its dropout is off", _teacher_in_training),
    Case(
        "soft-cap and logit scale",
        "of the teacher's config",
        lambda: [Problem(LM(0), LM(1, final_logit_softcapping=1.5, logit_scale=0.5), Settings())],
    ),
    Case("teacher's columns padded", "3 more, as Qwen2.5 has", _padded(teacher=3)),
    Case("student's columns padded", "3 more", _padded(student=3)),
)


@dataclass(frozen=True)
class LogitCase:
    """A loss on logits as they are: ``make`` gives student and teacher logits [N, V], stored classes k or None and what
    has to come out, in nats per token."""

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
    """The student has the same most likely classes, so that it does not matter whose are kept."""
    g = torch.Generator().manual_seed(0)
    z_t = torch.randn(8, 20, generator=g)
    z_t[:, :4] += 6
    z_s = z_t + 0.5 * torch.randn(8, 20, generator=g)
    return z_s, z_t, k, _bucket(z_s, z_t, k)


def _small_rest() -> tuple[Tensor, Tensor, int, Tensor]:
    """The student gives 3e-11 to what is not kept, the teacher a tenth."""
    z_s = torch.tensor([[25.0, 24.0, 0.0, 0.0]])
    z_t = torch.tensor([[3.0, 2.0, 0.0, 0.0]])
    return z_s, z_t, 2, _bucket(z_s, z_t, 2)


LOGIT_CASES = (
    LogitCase("bfloat16 logits", "log-softmax in float32", _bfloat16, tolerance=1e-3),
    LogitCase("top-k with tail", "k = 4 of 20, one class for the others", lambda: _stored(4)),
    LogitCase("k = V", "all classes kept equals dense", lambda: _stored(20)),
    LogitCase("tail below 6e-8", "student's rest 3e-11", _small_rest, tolerance=1e-3),
)
