"""Optimizer steps of kd_conformance.py: small models, their training texts, and the expected result in float64.

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


@dataclass(frozen=True)
class Text:
    """Token ids, trained from ``prompt`` on. ``trained=False`` is a text that is cut off in its prompt."""

    ids: tuple[int, ...]
    prompt: int = 1
    trained: bool = True

    @property
    def labels(self) -> list[int]:
        return [i if self.trained and at >= self.prompt else IGNORED for at, i in enumerate(self.ids)]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Pairs of a trained token and, before it, the token that predicts it."""
        return [(self.ids[i - 1], label) for i, label in enumerate(self.labels) if i and label != IGNORED]


# In a row of one repeated token every position has the same logits, so a shift of the mask cannot show. For cases that
# test something else.
UNIFORM = (Text((3,) * 6), Text((8,) * 6), Text((11,) * 6))


@dataclass(frozen=True)
class Settings:
    """The objective in peftlab's names; ``t2``: the expected loss has the factor T^2."""

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
    """A model with the interface that trainers need of a transformers causal LM."""

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


def deviation(outcome: Outcome, want: Outcome, *, gradients_only: bool = False) -> float:
    """Largest relative difference of the loss and of the gradients. The gradient of padded columns must be 0."""
    head = F.pad(want[2], (0, 0, 0, outcome[2].shape[0] - want[2].shape[0]))
    pairs = [(outcome[1], want[1]), (outcome[2], head)]
    if not gradients_only:
        pairs.append((torch.tensor(outcome[0]), torch.tensor(want[0])))
    if not math.isfinite(outcome[0]) or not all(torch.isfinite(got).all() for got, _ in pairs):
        return math.inf
    return max(float((got - expected).norm() / max(float(expected.norm()), 1e-2)) for got, expected in pairs)


class NotOffered(Exception):
    """The system has no such setting."""


def beta(problem: Problem) -> float:
    """The settings as the beta of a generalized JSD."""
    kind, share = problem.settings.kind, problem.settings.share
    if kind == "jsd":
        return share
    ends = {"forward_kl": 0.0, "reverse_kl": 1.0}
    if kind not in ends:
        raise NotOffered
    return ends[kind]


def without_labels(problem: Problem) -> None:
    if problem.settings.hard_weight:
        raise NotOffered


def accumulated(
    problem: Problem, micro_batch_loss: Callable[[dict[str, Tensor]], Tensor], factor: float = 1.0
) -> Outcome:
    loss = torch.zeros(())
    for batch in problem.batches():
        part = micro_batch_loss(batch) * factor
        part.backward()
        loss = loss + part.detach()
    return gradients(problem, loss)
