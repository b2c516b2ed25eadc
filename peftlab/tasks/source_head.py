"""The output head of an encoder-decoder, applied only to chosen positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.errors import RecipeError
from peftlab.tasks.lm_head import LMHead, base_of, input_of
from peftlab.tasks.outputs import OutputHead


class SourceHead(LMHead):
    """The hidden states of an encoder-decoder are what its own forward gives its head: T5 scales them, others do not. The
    head itself sees only the first position there, so that no logits of the whole vocabulary are computed.
    """

    def hidden_states(self, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor | None = None) -> Tensor:
        """[B, T, H] what the head reads at the positions of the decoder. Args: labels: [B, T], to compare their shift."""
        base = base_of(model)
        if id(base) not in self._is_direct:
            self._verify_shift(base, inputs, labels)
            self._is_direct[id(base)] = self._verify(model, base, inputs)
        return _read_by_head(model, base, inputs)[:, -inputs["decoder_input_ids"].shape[1] :]

    def values(self, model: nn.Module, hidden: Tensor) -> tuple[Tensor, OutputHead | None]:
        """``values`` and ``head`` of ``Outputs`` for [N, H] hidden states: logits without a head if the model adds a bias."""
        if _bias(model) is None:
            return hidden, self.output_head(model)
        return self.logits(model, hidden), None

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        logits, bias = super().logits(model, hidden), _bias(model)
        return logits if bias is None else logits + bias

    def cross_entropy_sum(self, model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
        if _bias(model) is None:
            return super().cross_entropy_sum(model, hidden, targets)
        return F.cross_entropy(self.logits(model, hidden), targets, reduction="sum")

    def _own_logits(self, base: Any, row: dict[str, Tensor]) -> Tensor:
        return self.logits(base, _read_by_head(base, base, row)[0])

    @torch.no_grad()
    def _verify_shift(self, base: Any, inputs: dict[str, Tensor], labels: Tensor | None) -> None:
        """Raises RecipeError if the model itself starts its decoder otherwise."""
        shift = getattr(base, "prepare_decoder_input_ids_from_labels", None)
        if shift is None or labels is None:
            return
        scored = labels != -100
        if not torch.equal(shift(labels=labels)[scored], inputs["decoder_input_ids"][scored]):
            raise RecipeError(
                f"{type(base).__name__} starts its targets with other tokens than decoder_start_token_id of its config; "
                "peftlab does not support this",
                key="model.name",
            )


def _bias(model: nn.Module) -> Tensor | None:
    """[V] what BART and Marian add to the logits, outside their head; None if it is 0."""
    bias: Tensor | None = getattr(base_of(model), "final_logits_bias", None)
    return None if bias is None or not bool(bias.any()) else bias[0]


def _read_by_head(model: nn.Module, base: Any, inputs: dict[str, Tensor]) -> Tensor:
    with input_of(base.get_output_embeddings()) as seen:
        model(**inputs, use_cache=False)
    return seen[-1]
