"""The leak test of packing (contract C4): whether this model and attention keep packed documents separate."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.models import base_model
from peftlab.tasks import Example, Task, collate_packed
from peftlab.training.parity import coarsest_dtype

# Enough documents for a first, middle and last one; long enough for attention to matter.
_DOCUMENTS, _TOKENS = 4, 24


class _Tolerance(NamedTuple):
    """Logit differences allowed as rounding, relative to the largest logit. neighbours: other neighbours, same shapes.
    alone: packed against padded, with different shapes and perhaps different attention kernels."""

    neighbours: float
    alone: float


# In a trained model, a document that sees its neighbour is off by tens of percent. Int8 rounds the activations of all
# rows together.
_TOLERANCES = {
    torch.float32: _Tolerance(1e-5, 1e-3),
    torch.float16: _Tolerance(1e-3, 1e-2),
    torch.bfloat16: _Tolerance(1e-3, 5e-2),
    torch.int8: _Tolerance(5e-2, 1e-1),
}


def check_packing(
    model: nn.Module, task: Task, examples: Sequence[Example], *, device: Any, autocast: Any = contextlib.nullcontext
) -> str | None:
    """Returns None if packed documents get the same logits as alone, whatever their neighbours; else the reason.

    Runs the first few ``examples``, shortened, in eval mode: packed, packed with other tokens in the first or the last of
    them, and padded. Returns None for fewer than two documents.

    Args: autocast: the context of the training loop.
    """
    documents = [_cut(example) for example in examples if len(example) > 1][:_DOCUMENTS]
    if len(documents) < 2:
        return None
    base = base_model(model)
    who = f"{type(base).__name__} with {base.config._attn_implementation} attention"
    num_tokens = base.get_input_embeddings().weight.shape[0]
    first, last = _other(documents[0], num_tokens), _other(documents[-1], num_tokens)
    tolerance = _TOLERANCES[torch.int8 if _has_int8(model) else coarsest_dtype(model, autocast, device)]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), autocast():
            alone = task.outputs(model, task.collate(documents, device)).logits()
            try:
                packed, after_first, before_last = (
                    task.outputs(model, collate_packed(part, device=device)).logits()
                    for part in (documents, [first, *documents[1:]], [*documents[:-1], last])
                )
            except TypeError as error:
                if "position_ids" not in str(error):
                    raise
                return f"{who} takes no position ids"
    finally:
        for module, training in modes.items():
            module.training = training
    size = float(alone.abs().max())
    num_first, num_last = len(first) - 1, len(last) - 1
    leak = max(
        _difference(after_first[num_first:], packed[num_first:], size),
        _difference(before_last[:-num_last], packed[:-num_last], size),
    )
    if not leak <= tolerance.neighbours:
        return (
            f"changing one row changes the logits of the rows packed with it by {leak:.2g} of the largest (rounding: "
            f"{tolerance.neighbours:g}), so {who} mixes packed rows"
        )
    shift = _difference(packed, alone, size)
    if not shift <= tolerance.alone:
        return (
            f"the logits of packed and padded rows differ by {shift:.2g} of the largest (rounding: {tolerance.alone:g}), so "
            f"{who} does not reset positions or state for each packed row"
        )
    return None


def _cut(example: Example) -> Example:
    """The first tokens of ``example``, all but one trained, so that every position but the last has logits."""
    ids = example.ids[:_TOKENS]
    return replace(example, ids=ids, trained=np.arange(len(ids)) > 0, weight=float(len(ids) - 1))


def _other(example: Example, num_tokens: int) -> Example:
    """``example`` with every token changed."""
    return replace(example, ids=(example.ids + 1) % num_tokens)


def _has_int8(model: nn.Module) -> bool:
    return any(p.dtype == torch.int8 for p in model.parameters())


def _difference(actual: Tensor, expected: Tensor, size: float) -> float:
    return float((actual - expected).abs().max()) / max(size, 1e-30)
