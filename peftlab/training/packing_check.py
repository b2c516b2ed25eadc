"""The leak test of packing (contract C4): whether this model, with this attention, keeps packed documents apart."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.tasks import Example, Task, collate_packed
from peftlab.training.parity import coarsest_dtype

# Enough documents for a first, a middle and a last one; long enough that attention has something to see.
_DOCUMENTS, _TOKENS = 4, 24


class _Tolerance(NamedTuple):
    """Differences of logits that are rounding, relative to the largest logit: other neighbours in the same shapes, and
    packed against padded, which are two shapes and perhaps two attention kernels."""

    neighbours: float
    alone: float


# A document that sees its neighbour is off by tens of percent in a trained model. Int8 rounds the activations of all
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
    """None when packed documents give the logits they have alone, whatever is next to them; else why they do not.

    Runs the first few ``examples``, cut short, in eval mode: packed, packed with the first and with the last of them
    replaced by other tokens, and padded. With fewer than two documents there is nothing to compare.

    Args: autocast: context the loop runs in.
    """
    documents = [_cut(example) for example in examples if len(example) > 1][:_DOCUMENTS]
    if len(documents) < 2:
        return None
    base: Any = cast(Callable[[], nn.Module], model.get_base_model)() if hasattr(model, "get_base_model") else model
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
            f"other tokens in one row change the logits of the rows packed with it by {leak:.2g} of the largest (rounding: "
            f"{tolerance.neighbours:g}), so {who} does not keep rows apart"
        )
    shift = _difference(packed, alone, size)
    if not shift <= tolerance.alone:
        return (
            f"packed rows have other logits than alone, by {shift:.2g} of the largest (rounding: {tolerance.alone:g}), so "
            f"{who} does not start each row anew"
        )
    return None


def _cut(example: Example) -> Example:
    """The first tokens of ``example``, all but one trained: logits then exist for every position but the last."""
    ids = example.ids[:_TOKENS]
    return replace(example, ids=ids, trained=np.arange(len(ids)) > 0, weight=float(len(ids) - 1))


def _other(example: Example, num_tokens: int) -> Example:
    """``example`` with another token in every place."""
    return replace(example, ids=(example.ids + 1) % num_tokens)


def _has_int8(model: nn.Module) -> bool:
    return any(p.dtype == torch.int8 for p in model.parameters())


def _difference(found: Tensor, expected: Tensor, size: float) -> float:
    return float((found - expected).abs().max()) / max(size, 1e-30)
