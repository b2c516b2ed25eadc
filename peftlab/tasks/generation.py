"""Decoding: a model writes answers to prompts, padded together where it ignores padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.data import eval_batches

# Lengths of the two prompts that show whether padding is ignored: the shortest up to here, the longest up to twice.
_PROBE_LENGTH = 256
# Difference of logits, relative to the largest, between a prompt alone and padded: 16 bits round by 1 to 3 %, a model that
# reads padding is off by more than half.
_PROMPT_TOLERANCE = 0.1


def sampling_kwargs(temperature: float, top_p: float) -> dict[str, Any]:
    """Arguments of ``generate``; a temperature of 0 decodes greedily."""
    if not temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p}


class Generator:
    """Writes answers with a model's own ``generate``.

    Args: pad_id: the padding token. stop_ids: tokens that can end an answer.
    """

    def __init__(self, *, pad_id: int, stop_ids: Collection[int]) -> None:
        self.pad_id, self.stop_ids = pad_id, frozenset(stop_ids)
        self._ignores_padding: dict[int, bool] = {}

    def kwargs(self, max_new_tokens: int, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of ``generate``, which stops at every token that can end an answer."""
        return {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": sorted(self.stop_ids),
            "pad_token_id": self.pad_id,
            **sampling,
        }

    @torch.no_grad()
    def write(
        self,
        model: nn.Module,
        prompts: list[np.ndarray],
        *,
        batch_tokens: int,
        max_new_tokens: int,
        sampling: Mapping[str, Any],
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields ``(index, token ids)`` of the answer to each prompt, as they finish.

        Args: prompts: token ids of each. sampling: of ``sampling_kwargs``.
        """
        # Padding costs less than another batch, which reads all weights again for each new token.
        lengths = [len(prompt) + max_new_tokens for prompt in prompts]
        padded = len(set(lengths)) == 1 or self.ignores_padding(model, prompts)
        for part in eval_batches(lengths, batch_tokens, max_padding=math.inf if padded else 0):
            answers = self._generate(model, [prompts[i] for i in part], max_new_tokens, sampling)
            yield from zip(part.tolist(), answers, strict=True)

    @torch.no_grad()
    def ignores_padding(self, model: nn.Module, prompts: list[np.ndarray]) -> bool:
        """Whether the model ignores padding before a prompt: the logits after the shortest prompt, padded to the longest,
        are those after the prompt alone. Recurrent models without a mask and some learned positions fail."""
        if id(model) not in self._ignores_padding:
            short, long = min(prompts, key=len)[-_PROBE_LENGTH:], max(prompts, key=len)[-2 * _PROBE_LENGTH :]
            padded = np.append(np.full(len(long) - len(short), self.pad_id), short)
            mask = np.arange(len(long)) >= len(long) - len(short)
            alone = self._next_logits(model, short, np.ones(len(short)))
            error = float((self._next_logits(model, padded, mask) - alone).abs().max())
            self._ignores_padding[id(model)] = error <= _PROMPT_TOLERANCE * float(alone.abs().max())
        return self._ignores_padding[id(model)]

    def _next_logits(self, model: nn.Module, ids: np.ndarray, mask: np.ndarray) -> Tensor:
        """[V] float32 logits of the token that ``generate`` draws first."""
        device = next(model.parameters()).device
        out = cast(Callable[..., Any], model.generate)(
            input_ids=torch.as_tensor(ids[None], dtype=torch.int64, device=device),
            attention_mask=torch.as_tensor(mask[None], dtype=torch.int64, device=device),
            output_logits=True,
            return_dict_in_generate=True,
            **self.kwargs(1, sampling_kwargs(0.0, 1.0)),
        )
        logits: Tensor = out.logits[0][0].float()
        return logits

    def _generate(
        self, model: nn.Module, prompts: list[np.ndarray], max_new_tokens: int, sampling: Mapping[str, Any]
    ) -> list[np.ndarray]:
        """The tokens of each answer, up to and including the first that ends it."""
        device = next(model.parameters()).device
        longest = max(map(len, prompts))
        tokens = torch.full((len(prompts), longest), self.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(prompts):
            tokens[i, longest - len(row) :] = torch.as_tensor(row, dtype=torch.int64)
            mask[i, longest - len(row) :] = 1
        out = cast(Callable[..., Tensor], model.generate)(
            input_ids=tokens.to(device), attention_mask=mask.to(device), **self.kwargs(max_new_tokens, sampling)
        )
        answers = out[:, longest:].cpu().numpy()
        stops = np.isin(answers, list(self.stop_ids))
        return [row[: int(at.argmax()) + 1] if at.any() else row for row, at in zip(answers, stops, strict=True)]
