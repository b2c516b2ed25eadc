"""Floating-point operations of a step, counted from the shapes of one forward pass.

The rule, with 2 M K N operations for a product [M, K] x [K, N]:

    linear layer    2 M K N forward; the same for the gradient of its input, if needed, and of its weight, if trained
                    (LoRA's factors count as separate linear layers)
    attention       4 T^2 W forward for a row of T tokens in a layer of total head width W, 8 T^2 W backward

Norms, activations, softmax, the optimizer, dequantizing and recomputation are not counted: the share of the peak is the
share of the machine used for the model's products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Counted:
    """Operations of the linear layers in one forward pass and its backward pass."""

    forward: float
    backward: float


def of_rows(one: Counted, two: Counted, rows: int) -> Counted:
    """Extrapolates the operations of ``rows`` rows from those of one and two: DoRA computes the norm of a weight once,
    independent of the number of rows."""
    more = rows - 1
    return Counted(
        one.forward + more * (two.forward - one.forward), one.backward + more * (two.backward - one.backward)
    )


@contextmanager
def _hooked(model: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    from transformers.pytorch_utils import Conv1D

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_linears(model: nn.Module, forward: Callable[[], object]) -> Counted:
    """Counts the operations of all linear layers that ``forward`` runs. It must call the modules themselves, so it needs
    PEFT's path (run.kernels=reference)."""
    operations = {"forward": 0.0, "backward": 0.0}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = args[0]
        products = 2.0 * x.numel() * output.shape[-1]
        weight: Any = module.weight
        operations["forward"] += products
        if torch.is_grad_enabled():
            operations["backward"] += products * (int(x.requires_grad) + int(weight.requires_grad))

    with _hooked(model, hook):
        forward()
    return Counted(operations["forward"], operations["backward"])


def attention_width(config: Any) -> int:
    """Returns W summed over the attention layers of a transformers config; 0 if unknown."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0) or 0
    if not isinstance(
        heads, int
    ):  # one number per stage, as in SegFormer, whose stages see different numbers of positions
        return 0
    head = getattr(text, "head_dim", None) or (getattr(text, "hidden_size", 0) // heads if heads else 0)
    return int((getattr(text, "num_hidden_layers", 0) or 0) * heads * head)


def training_flops(linears: Counted, *, rows: int, length: int, width: int) -> float:
    """Returns the operations of a step. Args: linears: for ``rows`` rows of ``length`` tokens. width: of attention."""
    return linears.forward + linears.backward + 12.0 * rows * length**2 * width


def generation_flops(prompt: Counted, token: Counted, *, rows: int, length: int, new_tokens: int, width: int) -> float:
    """Returns the operations of generating ``new_tokens`` tokens after prompts of ``length``: the prompt once, then one token
    at a time with a cache.

    Args: prompt: for ``rows`` prompts, with logits for the last token only. token: for one token per row.
    """
    context = sum(range(length + 1, length + new_tokens))
    attention = 4.0 * rows * width * (length**2 + context)
    return prompt.forward + (new_tokens - 1) * token.forward + attention
