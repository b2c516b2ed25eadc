"""Teacher distributions of which a few classes per row are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from peftlab.errors import RecipeError

Tail = Literal["bucket", "renormalized", "none"]
TAILS: tuple[str, ...] = get_args(Tail)


@dataclass(frozen=True, eq=False, slots=True)
class SparseTarget:
    """Teacher probabilities of k classes per row, at the temperature they were taken.

    A row of fewer than k classes is filled up with an id it already has, at probability 0. Other ids occur once.

    Args:
        ids: [N, k] int64. probs: [N, k] float32; weights for ``none``.
        temperature: of the teacher's softmax. What is kept cannot be brought to another one: that needs all classes.
        tail: what stands for the classes that are not kept, see ``losses.sparse_divergence``.
    Raises: ValueError on shapes, types, ``tail`` or temperature.
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
            raise ValueError(f"expected a tail out of {', '.join(TAILS)}, found {self.tail!r}")
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
        """The k most probable classes of each row of ``logits`` [N, V]; without a tail they are no distribution.

        Raises: ValueError for ``none``, RecipeError for a k that is not in 1..V.
        """
        if tail == "none":
            raise ValueError(
                "expected bucket or renormalized: the largest k probabilities as they are sum to less than 1"
            )
        if not 1 <= k <= logits.shape[-1]:
            raise RecipeError(f"expected to keep 1 to {logits.shape[-1]:,} classes per token, found {k:,}")
        exact = logits if logits.dtype == torch.float64 else logits.float()
        log_p, ids = (exact / temperature).log_softmax(-1).topk(k, dim=-1)
        return cls(ids, log_p.exp(), temperature, tail)

    def rows(self, chosen: slice | Tensor) -> SparseTarget:
        return SparseTarget(self.ids[chosen], self.probs[chosen], self.temperature, self.tail)

    def to(self, device: torch.device | str) -> SparseTarget:
        return SparseTarget(self.ids.to(device), self.probs.to(device), self.temperature, self.tail)

    def require_temperature(self, temperature: float) -> None:
        """Raises: RecipeError when the target was taken at another temperature."""
        if temperature != self.temperature:
            raise RecipeError(
                f"the teacher's {self.num_classes:,} classes per token were stored at temperature {self.temperature:g} and "
                f"the loss asks for {temperature:g}: probabilities of some classes cannot be brought to another "
                f"temperature. Set the temperature to {self.temperature:g}, or store the teacher again"
            )
