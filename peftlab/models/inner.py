"""Records inner states of a running model: hidden states of layers, and queries, keys and values of their attention."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peftlab.errors import RecipeError
from peftlab.models.load import base_model
from peftlab.models.student.stack import find_stack

# Name in transformers' attention interface of sdpa attention that also records its inputs.
_RECORDED_SDPA = "peftlab_sdpa"


@dataclass(frozen=True)
class Attention:
    """The attention inputs of one layer, with rotary positions applied.

    Attributes:
        query: [B, A, T, D]. key, value: [B, K, T, D], where K divides A.
        mask: [B, 1 or A, T, T], bool or added to the scores; None: every key, or with ``causal`` those up to the query.
        scaling: factor on the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scaling: float

    def row(self, index: int, tokens: slice) -> Attention:
        """The part of one text, B = 1: the ``tokens`` of row ``index``."""
        query, key, value = (x[index : index + 1, :, tokens] for x in (self.query, self.key, self.value))
        mask = self.mask
        if mask is not None:
            mask = mask[index if len(mask) > 1 else 0, :, tokens, tokens][None]
        return replace(self, query=query, key=key, value=value, mask=mask)

    def scores(self) -> Tensor:
        """[B, A, T, T] in float32 (float64 stays), before mask and softmax."""
        query, key = (x if x.dtype == torch.float64 else x.float() for x in (self.query, self.key))
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return query @ key.transpose(-1, -2) * self.scaling

    def visible(self) -> Tensor:
        """[B, 1 or A, T, T] bool, True where a query sees a key."""
        if self.mask is not None:
            return self.mask if self.mask.dtype == torch.bool else self.mask > torch.finfo(self.mask.dtype).min / 2
        seen = torch.ones(1, 1, *(2 * [self.query.shape[2]]), dtype=torch.bool, device=self.query.device)
        return seen.tril() if self.causal else seen


@dataclass
class InnerStates:
    """By layer, counted from 0: ``hidden`` [B, T, H], the output of the layer, and its ``attention``."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Attention] = field(default_factory=dict)


_recording: ContextVar[tuple[InnerStates, int] | None] = ContextVar("_recording", default=None)


@contextlib.contextmanager
def recording(model: Any, *, hidden: Collection[int] = (), attention: Collection[int] = ()) -> Iterator[InnerStates]:
    """Collects the inner states of the last forward pass of ``model`` (a transformers model, or a PEFT model) inside the
    block; they are part of its graph. The model is restored afterwards.

    Args: hidden, attention: layers to record.
    Raises: RecipeError if attention is requested but the model does not use transformers' sdpa attention.
    """
    base = base_model(model)
    layers, states = find_stack(base).layers, InnerStates()
    with contextlib.ExitStack() as stack:
        for index in hidden:
            hook = layers[index].register_forward_hook(_keep_output(states, index))
            stack.callback(hook.remove)
        for index in attention:
            for hook in _attention_hooks(layers[index], states, index):
                stack.callback(hook.remove)
        if attention:
            stack.enter_context(_recording_attention(base))
        yield states
    if missing := sorted(set(attention) - set(states.attention)):
        raise RecipeError(
            f"{type(base).__name__} does not use transformers' attention interface (layer {missing[0]}), so its attention "
            "cannot be compared; use hidden_cosine or hidden_mse",
            key="distill.losses",
        )


def _keep_output(states: InnerStates, index: int) -> Any:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        states.hidden[index] = output[0] if isinstance(output, tuple) else output

    return keep


def _attention_hooks(layer: nn.Module, states: InnerStates, index: int) -> Iterator[Any]:
    """Sets where the attention records while ``layer`` runs."""
    tokens = []
    yield layer.register_forward_pre_hook(lambda *_: tokens.append(_recording.set((states, index))))
    yield layer.register_forward_hook(lambda *_: _recording.reset(tokens.pop()), always_call=True)


def _recorded_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Any:
    if (target := _recording.get()) is not None:
        states, index = target
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        states.attention[index] = Attention(query, key, value, mask, bool(causal), scaling)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


@contextlib.contextmanager
def _recording_attention(base: Any) -> Iterator[None]:
    before = base.config._attn_implementation
    if before != "sdpa":
        raise RecipeError(
            f"attention losses need sdpa attention, found {before!r}; set model.attention: sdpa",
            key="model.attention",
        )
    AttentionInterface.register(_RECORDED_SDPA, _recorded_sdpa)
    AttentionMaskInterface.register(_RECORDED_SDPA, sdpa_mask)
    base.config._attn_implementation = _RECORDED_SDPA
    try:
        yield
    finally:
        base.config._attn_implementation = before
