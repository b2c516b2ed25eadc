"""Mean activations of chosen modules over a sample, and the largest of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.models.student.importance import Outputs

# Rows that are float64 at a time: 59 MB at 14,336 neurons.
_ROWS = 512


class Observer:
    """Hooks that see the unpadded positions of a running model, as rows of its dtype.

    A two-dimensional keyword argument ``attention_mask`` of the model marks padding; activations of another shape than
    [batch, length, width], such as a pooler's, are seen whole.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._mask: Tensor | None = None
        self._handles: list[Any] = []
        self.num_positions = 0

    def inputs_of(self, module: nn.Module, see: Callable[[Tensor], None]) -> None:
        """``see`` gets the [n, width] input rows of ``module`` at each call."""
        self._handles.append(module.register_forward_pre_hook(lambda _, args: see(self._rows(args[0]))))

    def outputs_of(self, module: nn.Module, see: Callable[[Tensor], None]) -> None:
        """``see`` gets the [n, width] output rows of ``module`` at each call."""
        self._handles.append(module.register_forward_hook(lambda _, __, output: see(self._rows(output))))

    @torch.no_grad()
    def run(self, sample: Outputs) -> None:
        """Runs the model in eval mode over the sample, then removes the hooks, also after an error."""
        training = self._model.training
        self._model.eval()
        self._handles.append(self._model.register_forward_pre_hook(self._take_mask, with_kwargs=True))
        try:
            for output in sample(self._model):
                self.num_positions += len(output)
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._model.train(training)

    def _take_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _rows(self, activations: Tensor) -> Tensor:
        if self._mask is not None and self._mask.shape == activations.shape[:-1]:
            return activations[self._mask]
        return activations.reshape(-1, activations.shape[-1])


class Total:
    """The mean over all rows of a function of them, in float64."""

    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        self._of = of
        self._sum: Tensor | None = None
        self._num_rows = 0

    def __call__(self, rows: Tensor) -> None:
        for block in torch.split(rows, _ROWS):
            part = self._of(block.double()).sum(0)
            self._sum = part if self._sum is None else self._sum + part
        self._num_rows += len(rows)

    @property
    def mean(self) -> Tensor:
        if self._sum is None or not self._num_rows:
            raise ValueError("the sample did not run a module to be measured")
        return self._sum / self._num_rows


def magnitude(rows: Tensor) -> Tensor:
    """|x| of each channel."""
    return rows.abs()


def head_norms(num_heads: int) -> Callable[[Tensor], Tensor]:
    """A function from rows [n, num_heads * head_dim] to the L2 norm of each head, [n, num_heads]."""
    return lambda rows: rows.view(len(rows), num_heads, -1).norm(dim=-1)


def largest(scores: Tensor, count: int) -> Tensor:
    """The indices of the ``count`` largest entries, ascending; the first among equal ones."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def largest_heads(scores: Tensor, *, num_groups: int, keep_groups: int, keep_in_group: int) -> tuple[Tensor, Tensor]:
    """The heads and groups to keep, with equally many heads per group: (heads, groups), both ascending.

    A group is the query heads that share a key/value head. The best heads of each group are chosen, then the groups with
    the largest sums over them.

    Args: scores: [num_heads].
    """
    grouped = scores.view(num_groups, -1)
    best = [largest(group, keep_in_group) for group in grouped]
    groups = largest(torch.stack([group[kept].sum() for group, kept in zip(grouped, best, strict=True)]), keep_groups)
    heads = torch.cat([best[g] + g * grouped.shape[1] for g in groups.tolist()])
    return heads, groups
