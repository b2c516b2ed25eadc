"""How far the outputs of two models agree, and outputs condensed to what the comparison needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import binomtest
from torch import Tensor

# Classes kept of each distribution; the remainder is one class. 512 positions take 3 MiB.
_MOST_CLASSES = 512
# Positions whose float64 distributions are in memory at once.
_CHUNK = 64
# Brings the components of a unit vector, about 1 / sqrt(H), to the size of logits.
_VECTOR_TEMPERATURE = 0.05


@dataclass(frozen=True)
class Agreement:
    """Agreement of a model with a reference at held-out positions.

    Attributes:
        kl_mean, kl_max: KL(reference || model) in nats, with the classes beyond the 512 likeliest of the reference taken as
            one: at most the KL over all classes.
        top1: share of positions with the same likeliest class. top1_interval: its 95 % interval (Wilson 1927).
    """

    kl_mean: float
    kl_max: float
    top1: float
    top1_interval: tuple[float, float]
    num_positions: int

    def __str__(self) -> str:
        same = round(self.top1 * self.num_positions)
        low, high = self.top1_interval
        return (
            f"mean KL {self.kl_mean:.3g} nats over {self.num_positions:,} positions, the same top class at {same:,} of them "
            f"({self.top1:.1%}, 95 % interval {low:.1%} to {high:.1%})"
        )

    def failures(self, *, kl_mean: float, top1: float) -> list[str]:
        """What exceeds the limits. Too few positions to tell are no failure: then the interval contains ``top1``."""
        failures = []
        if not self.kl_mean <= kl_mean:
            failures.append(f"{self}; at most {kl_mean:g} nats are allowed")
        elif not self.top1_interval[1] >= top1:
            failures.append(f"{self}; {top1:.1%} are required")
        return failures


@dataclass(frozen=True)
class Distributions:
    """N distributions. log_p: [N, K] float64 of the K likeliest classes, sorted. classes: [N, K] int32 their indices.
    rest: [N] float64 log-probability of all others together; -inf if there are none."""

    log_p: Tensor
    classes: Tensor
    rest: Tensor

    def __len__(self) -> int:
        return len(self.log_p)

    @classmethod
    def of(cls, logits: Tensor) -> Distributions:
        """The distributions of [N, C] float32 logits."""
        parts = []
        for rows in logits.split(_CHUNK):
            log_p = rows.double().log_softmax(-1)
            top, classes = log_p.topk(min(_MOST_CLASSES, log_p.shape[-1]), dim=-1)
            parts.append((top.cpu(), classes.int().cpu(), _rest(log_p, classes).cpu()))
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    @classmethod
    def joined(cls, parts: Sequence[Distributions]) -> Distributions:
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("log_p", "classes", "rest")))

    def __getitem__(self, chosen: slice) -> Distributions:
        return Distributions(self.log_p[chosen], self.classes[chosen], self.rest[chosen])


def agreement(pairs: Iterable[tuple[Distributions, Tensor]]) -> Agreement:
    """Compares a model's [n, C] float32 logits with the reference at the same n positions, a part at a time."""
    kl, same = [], []
    for reference, logits in pairs:
        if len(reference) != len(logits):
            raise ValueError(f"expected logits at {len(reference)} positions, found {len(logits)}")
        for start in range(0, len(logits), _CHUNK):
            part = reference[start : start + _CHUNK]
            log_q = logits[start : start + _CHUNK].double().log_softmax(-1).cpu()
            classes = part.classes.long()
            # A class that does not exist has no probability in both models: 0 * (-inf - -inf) would be nan.
            exists = part.log_p > -math.inf
            ratio = torch.where(exists, part.log_p - log_q.gather(-1, classes), 0.0)
            terms = part.log_p.exp() * ratio
            tail = torch.where(part.rest > -math.inf, part.rest.exp() * (part.rest - _rest(log_q, classes)), 0.0)
            kl.append(terms.sum(-1) + tail)
            same.append(log_q.gather(-1, classes[:, :1])[:, 0] >= log_q.amax(-1))
    all_kl, all_same = torch.cat(kl), torch.cat(same)
    hits, count = int(all_same.sum()), len(all_kl)
    interval = binomtest(hits, count).proportion_ci(method="wilson")
    return Agreement(
        float(all_kl.mean()), float(all_kl.max()), hits / count, (float(interval.low), float(interval.high)), count
    )


def as_logits(vectors: Tensor) -> Tensor:
    """Vectors [n, H] as logits: equal vectors give equal logits, and the largest component stays distinct for vectors of texts
    that are close. A number (H = 1) is the logit of one class beside another of 0."""
    if vectors.shape[-1] == 1:
        return torch.nn.functional.pad(vectors.float(), (1, 0))
    return torch.nn.functional.normalize(vectors.float(), dim=-1) / _VECTOR_TEMPERATURE


def _rest(log_p: Tensor, classes: Tensor) -> Tensor:
    """[N] log-probability of all classes except [N, K] ``classes``."""
    if classes.shape[-1] == log_p.shape[-1]:
        return torch.full((len(log_p),), -math.inf, dtype=log_p.dtype, device=log_p.device)
    return log_p.scatter(-1, classes.long(), -math.inf).logsumexp(-1)
