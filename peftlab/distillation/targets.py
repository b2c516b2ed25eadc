"""Sparse teacher distributions, with a few classes per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from peftlab.errors import RecipeError

Tail = Literal["bucket", "renormalized", "none"]
TAILS: tuple[str, ...] = get_args(Tail)
# Bytes of cumulative sums over the classes, in float64, that exist at once.
_CHUNK_BYTES = 128 * 2**20


@dataclass(frozen=True, eq=False, slots=True)
class SparseTarget:
    """Teacher probabilities of k classes per row, at a fixed temperature.

    A row with fewer than k classes is padded with one of its ids, at probability 0. Other ids occur once.

    Args:
        ids: [N, k] int64. probs: [N, k] float32; weights for ``none``.
        temperature: temperature of the teacher's softmax. Converting to another one would need all classes.
        tail: how classes that are not kept are treated, see ``losses.sparse_divergence``.
    Raises: ValueError on invalid shapes, dtypes, ``tail`` or temperature.
    """

    ids: Tensor
    probs: Tensor
    temperature: float = 1.0
    tail: Tail = "bucket"

    def __post_init__(self) -> None:
        if self.ids.dim() != 2 or self.ids.shape != self.probs.shape:
            raise ValueError(
                f"expected ids and probabilities [N, k], found {list(self.ids.shape)} and {list(self.probs.shape)}"
            )
        if self.ids.dtype != torch.int64 or self.probs.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"expected ids int64 and probabilities float32, found {self.ids.dtype} and {self.probs.dtype}"
            )
        if self.tail not in TAILS:
            raise ValueError(f"expected tail to be one of {', '.join(TAILS)}, found {self.tail!r}")
        if not self.temperature > 0:
            raise ValueError(f"expected a temperature above 0, found {self.temperature}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_classes(self) -> int:
        return self.ids.shape[1]

    @classmethod
    @torch.no_grad()
    def from_logits(cls, logits: Tensor, k: int, *, temperature: float = 1.0, tail: Tail = "bucket") -> SparseTarget:
        """The k most probable classes of each row of ``logits`` [N, V]; without a tail they are not a distribution.

        Raises: ValueError for ``none``, RecipeError if k is not in 1..V.
        """
        if tail == "none":
            raise ValueError("expected bucket or renormalized: the largest k probabilities alone sum to less than 1")
        if not 1 <= k <= logits.shape[-1]:
            raise RecipeError(f"expected to keep 1 to {logits.shape[-1]:,} classes per token, found {k:,}")
        log_p, ids = _log_probs(logits, temperature).topk(k, dim=-1)
        return cls(ids, log_p.exp(), temperature, tail)

    @classmethod
    @torch.no_grad()
    def sampled(
        cls, logits: Tensor, draws: int, *, temperature: float = 1.0, generator: torch.Generator
    ) -> SparseTarget:
        """``draws`` classes of each row drawn with replacement from softmax(logits / T); probs = count / draws.

        Unbiased: E[probs] is the softmax, so the mean gradient over draws is the dense one. The ids of a row ascend.
        A row that is not a distribution (NaN, no class) gets NaN, as in ``from_logits``.

        Args: logits: [N, V], on any device. generator: on the CPU, so that every device draws the same.
        Raises: RecipeError for less than one draw.
        Source: Anshumann et al. 2025 (arXiv 2503.16870), section 3, proposal distribution p.
        """
        log_p = _log_probs(logits, temperature)
        ids, counts = _drawn(log_p.exp(), draws, generator)
        weights = (counts / draws).to(log_p.dtype)
        return cls(ids, weights.masked_fill(log_p.amax(-1, keepdim=True).isnan(), math.nan), temperature, "none")

    @classmethod
    @torch.no_grad()
    def head_and_samples(
        cls, logits: Tensor, k: int, draws: int, *, temperature: float = 1.0, generator: torch.Generator
    ) -> SparseTarget:
        """The k most probable classes, then ``draws`` classes of the others with count / draws of their mass.

        Unbiased like ``sampled``, with variance only from the others. A row without other classes has k classes.

        Args: as ``sampled``. Raises: RecipeError for less than one draw, or if k is not in 1..V-1.
        """
        if not 1 <= k < logits.shape[-1]:
            raise RecipeError(
                f"expected to keep 1 to {logits.shape[-1] - 1:,} classes per token and to draw from the others, found {k:,}"
            )
        log_p = _log_probs(logits, temperature)
        head, ids = log_p.topk(k, dim=-1)
        others = log_p.scatter(-1, ids, -math.inf).exp()
        drawn, counts = _drawn(others, draws, generator)
        weights = others.sum(-1, keepdim=True) * (counts / draws).to(log_p.dtype)
        drawn = torch.where(weights > 0, drawn, ids[:, :1])
        return cls(torch.cat([ids, drawn], -1), torch.cat([head.exp(), weights], -1), temperature, "none")

    @classmethod
    def concatenated(cls, parts: Sequence[SparseTarget]) -> SparseTarget:
        """The rows of all ``parts``, which share one temperature and tail; narrower ones are padded."""
        width = max(part.num_classes for part in parts)
        ids = [torch.cat([p.ids, p.ids[:, :1].expand(-1, width - p.num_classes)], 1) for p in parts]
        probs = [torch.nn.functional.pad(p.probs, (0, width - p.num_classes)) for p in parts]
        return cls(torch.cat(ids), torch.cat(probs), parts[0].temperature, parts[0].tail)

    def rows(self, chosen: slice | Tensor) -> SparseTarget:
        return SparseTarget(self.ids[chosen], self.probs[chosen], self.temperature, self.tail)

    def to(self, device: torch.device | str) -> SparseTarget:
        return SparseTarget(self.ids.to(device), self.probs.to(device), self.temperature, self.tail)

    def require_temperature(self, temperature: float) -> None:
        """Raises: RecipeError if the target has another temperature."""
        if temperature != self.temperature:
            raise RecipeError(
                f"the teacher's {self.num_classes:,} classes per token were stored at temperature {self.temperature:g}, but "
                f"the loss needs {temperature:g}: stored probabilities cannot be converted to another temperature. Set the "
                f"temperature to {self.temperature:g}, or store the teacher again"
            )


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return (exact / temperature).log_softmax(-1)


def _drawn(weights: Tensor, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids [N, m] drawn in proportion to ``weights`` [N, V], and their counts; m is the largest number of different ids.

    A row with fewer is padded with its first id, count 0. A class of weight 0 is drawn only if all are 0.

    Draws invert the distribution function. Only the uniform numbers come from the generator, so one CPU seed serves every
    device, unlike ``torch.multinomial``, whose float32 would also lose classes below 6e-8.
    """
    if draws < 1:
        raise RecipeError(f"expected at least 1 draw per token, found {draws}")
    num_rows, num_classes = weights.shape
    uniform = torch.rand(num_rows, draws, dtype=torch.float64, generator=generator)
    chosen = torch.empty(num_rows, draws, dtype=torch.int64)
    size = max(1, _CHUNK_BYTES // (8 * num_classes))
    for start in range(0, num_rows, size):
        rows = slice(start, start + size)
        below = weights[rows].cumsum(-1, dtype=torch.float64)
        total = below[:, -1:].contiguous()
        drawn = torch.searchsorted(below, uniform[rows].to(below.device) * total, right=True)
        # The product may round up to the whole sum, which belongs to the last class with a weight.
        last = torch.searchsorted(below, total).clamp_max(num_classes - 1)
        chosen[rows] = torch.minimum(drawn, last).cpu()
    chosen = chosen.sort(-1).values
    new = torch.ones_like(chosen, dtype=torch.bool)
    new[:, 1:] = chosen[:, 1:] != chosen[:, :-1]
    slots = new.cumsum(-1) - 1
    width = int(slots.max()) + 1 if num_rows else 1
    ids = chosen[:, :1].repeat(1, width).scatter_(1, slots, chosen)
    counts = torch.zeros(num_rows, width).scatter_add_(1, slots, torch.ones_like(slots, dtype=torch.float32))
    return ids.to(weights.device), counts.to(weights.device)
