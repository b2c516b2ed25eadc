"""The output head of a causal language model, applied only to chosen positions."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.errors import RecipeError
from peftlab.tasks.outputs import OutputHead

# Their full logits exist twice in float32: for 4,096 tokens over 128,256 classes they would briefly take 8 GB.
VERIFIED_TOKENS = 32


class LMHead:
    """Runs decoder and head of a transformers causal LM separately, so that logits exist only for chosen positions.

    The first call compares the start of a row with the model's own forward. Where layers stand between the decoder and the
    head (ModernBERT's decoder), the hidden states are what the model gives its head in its own forward. An architecture whose
    logits are not ``cap(scale * head(hidden))`` is an error rather than a silently different loss.

    Args:
        head_loss: summed cross-entropy of the head module on chosen hidden states, without their logits in memory, or None
            for an unsupported head, as ``adapters.HeadLoss``.
    """

    def __init__(self, head_loss: Callable[..., Tensor | None]) -> None:
        self._head_loss = head_loss
        # Whether the decoder's states are the input of the head, by the id of the model.
        self._is_direct: dict[int, bool] = {}

    def hidden_states(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """[B, T, H] last hidden states, before the head."""
        base = base_of(model)
        if id(base) not in self._is_direct:
            self._is_direct[id(base)] = self._verify(model, base, inputs)
        if not self._is_direct[id(base)]:
            states = _input_of_head(model, base, inputs)
            assert states is not None
            return states
        if _has_own_forward(model):
            return _hidden_of_forward(model, base, inputs)
        hidden: Tensor = _decoder(base)(**inputs, use_cache=False)[0]
        return hidden

    def output_head(self, model: nn.Module) -> OutputHead:
        base = base_of(model)
        softcap, scale = logit_transform(base.config)
        return OutputHead(base.get_output_embeddings(), softcap, scale)

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """[N, V] float32 logits (float64 stays) of ``hidden`` [N, H]."""
        return self.output_head(model).logits(hidden)

    def cross_entropy_sum(self, model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
        """[] float32 nats (float64 stays) over the tokens of ``hidden`` [N, H]."""
        head = self.output_head(model)
        loss = self._head_loss(head.module, hidden, targets, softcap=head.softcap, scale=head.scale)
        return F.cross_entropy(head.logits(hidden), targets, reduction="sum") if loss is None else loss

    def _own_logits(self, base: Any, row: dict[str, Tensor]) -> Tensor:
        """[T, V] the logits of a batch of one row."""
        return self.logits(base, _decoder(base)(**row, use_cache=False)[0][0])

    @torch.no_grad()
    def _verify(self, model: nn.Module, base: Any, inputs: dict[str, Tensor]) -> bool:
        """Whether the decoder's states are the input of the head. Raises: RecipeError if neither they nor what the model gives
        its head lead to its own logits."""
        row = {name: value[:1, :VERIFIED_TOKENS] for name, value in inputs.items()}
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.autocast(row["input_ids"].device.type, enabled=False):
                want = base(**row, use_cache=False).logits[0].float()
                ours = self._own_logits(base, row)
                if _differ(ours, want):
                    states = _input_of_head(base, base, row)
                    if states is not None and not _differ(self.logits(model, states[0]), want):
                        return False
        finally:
            for module, training in modes.items():
                module.training = training
        if _differ(ours, want):
            raise RecipeError(
                f"{type(base).__name__}: logits of chosen positions differ from the model's own by "
                f"{float((want - ours).abs().max()):.3g} (largest logit {float(want.abs().max()):.3g}); peftlab does not support "
                "this architecture's output transform",
                key="model.name",
            )
        return True


def base_of(model: nn.Module) -> Any:
    """The transformers model, without an adapter's wrapper."""
    return cast(Callable[[], nn.Module], model.get_base_model)() if hasattr(model, "get_base_model") else model


def _has_own_forward(model: Any) -> bool:
    """Whether the adapter acts in the forward of its PEFT model, and not only in the layers: virtual tokens, and mixtures that
    run the model twice."""
    from peft.tuners.tuners_utils import BaseTuner

    config = getattr(model, "active_peft_config", None)
    if config is None:
        return False
    tuner = model.base_model
    if getattr(config, "alora_invocation_tokens", None):  # PEFT finds them in the input of its own forward
        return True
    return bool(
        config.is_prompt_learning or (isinstance(tuner, BaseTuner) and type(tuner).forward is not BaseTuner.forward)
    )


def _hidden_of_forward(model: Any, base: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[B, T, H] last hidden states of the row's own tokens, from the model's whole forward with a single logit."""
    seen: list[Tensor] = []
    hook = _decoder(base).register_forward_hook(lambda module, args, output: seen.append(output[0]))
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    try:
        model(**inputs, use_cache=False, **few)
    finally:
        hook.remove()
    return seen[-1][:, -inputs["input_ids"].shape[1] :]


def _differ(logits: Tensor, want: Tensor) -> bool:
    return not float((want - logits).abs().max()) <= 0.01 * max(float(want.abs().max()), 1.0)


def _input_of_head(model: Any, base: Any, inputs: dict[str, Tensor]) -> Tensor | None:
    """[B, T, H] what the model gives its head at the row's own tokens, from its whole forward with a single logit; None if it
    does not call its head."""
    with input_of(base.get_output_embeddings()) as seen:
        model(**inputs, use_cache=False)
    return seen[-1][:, -inputs["input_ids"].shape[1] :] if seen else None


@contextlib.contextmanager
def input_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """A list that receives the input [B, T, H] of ``layer``, which then computes a single position."""
    seen: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(args[0])
        return (args[0][:1, :1], *args[1:])

    hook = layer.register_forward_pre_hook(take)
    try:
        yield seen
    finally:
        hook.remove()


def _decoder(base: Any) -> nn.Module:
    # Llama 4's prefix is that of the model with images, which its text model does not have.
    decoder: nn.Module = getattr(base, base.base_model_prefix, None) or base.model
    return decoder


def logit_transform(config: Any) -> tuple[float | None, float]:
    """Soft-cap and scale, under the names in transformers' families: Gemma 2, RecurrentGemma, Cohere, Granite."""
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0)
    if divisor := getattr(text, "logits_scaling", None):
        scale /= float(divisor)
    softcap = getattr(text, "final_logit_softcapping", None) or getattr(text, "logits_soft_cap", None)
    return softcap, scale
