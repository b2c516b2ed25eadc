"""Floating-point operations that a step needs, counted from the shapes of one forward pass.

The rule, with 2 M K N operations for a product [M, K] x [K, N]:

    linear layer    2 M K N forward; as many again for the gradient of its input where that is needed, and of its
                    weight where that is trained (LoRA's factors are linear layers of their own)
    attention       4 T^2 W forward of a row of T tokens in a layer whose heads are W wide together, 8 T^2 W backward

Norms, activations, softmax, the optimizer, dequantizing and what is computed twice to save memory are left out: a share of
the peak says how much of the machine went into the model's own products.
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
    """Operations of the linear layers in one forward pass and in its backward pass."""

    forward: float
    backward: float


def of_rows(one: Counted, two: Counted, rows: int) -> Counted:
    """Of ``rows`` rows at once, from those of one and of two: DoRA's norm of a weight is computed once, however many
    there are."""
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
    """The operations of all linear layers that ``forward`` runs; their calls must be calls of the modules, so that it has
    to take PEFT's own path (run.kernels=reference)."""
    found = {"forward": 0.0, "backward": 0.0}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = args[0]
        products = 2.0 * x.numel() * output.shape[-1]
        weight: Any = module.weight
        found["forward"] += products
        if torch.is_grad_enabled():
            found["backward"] += products * (int(x.requires_grad) + int(weight.requires_grad))

    with _hooked(model, hook):
        forward()
    return Counted(found["forward"], found["backward"])


def attention_width(config: Any) -> int:
    """W summed over the attention layers of a transformers config; 0 where it does not say."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0) or 0
    head = getattr(text, "head_dim", None) or (getattr(text, "hidden_size", 0) // heads if heads else 0)
    return int((getattr(text, "num_hidden_layers", 0) or 0) * heads * head)


def training_flops(linears: Counted, *, rows: int, length: int, width: int) -> float:
    """Operations of a step. Args: linears: of ``rows`` rows of ``length`` tokens. width: of attention."""
    return linears.forward + linears.backward + 12.0 * rows * length**2 * width


def generation_flops(prompt: Counted, token: Counted, *, rows: int, length: int, new_tokens: int, width: int) -> float:
    """Operations of writing ``new_tokens`` tokens after prompts of ``length``: the prompt once, then a token at a time
    over a cache.

    Args: prompt: of ``rows`` prompts, with logits for the last token alone. token: of one token of each row.
    """
    context = sum(range(length + 1, length + new_tokens))
    attention = 4.0 * rows * width * (length**2 + context)
    return prompt.forward + (new_tokens - 1) * token.forward + attention
