"""Decoding of encoder-decoders: a model writes the target of each source."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.data import eval_batches
from peftlab.tasks.generation import sampling_kwargs


class SourceWriter:
    """Writes targets with a model's own ``generate``, and the settings of its generation config, such as a length penalty.

    Args:
        pad_id: the padding token. stop_ids: tokens that can end a target. beams: width of the search; 1 is greedy.
        first: further arguments of ``generate``, such as the token of the target language.
    """

    def __init__(self, *, pad_id: int, stop_ids: Collection[int], beams: int, first: dict[str, int]) -> None:
        self._pad_id, self._stop_ids, self._beams, self._first = pad_id, frozenset(stop_ids), beams, first

    @torch.no_grad()
    def write(
        self,
        model: nn.Module,
        sources: Sequence[np.ndarray],
        *,
        padded: bool,
        batch_tokens: int,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields ``(index, token ids)`` of the target of each source, as they finish: up to and including its end.

        Args: padded: whether sources of different length may share a batch. temperature: 0 searches.
        """
        options = sampling_kwargs(temperature, top_p) | ({"top_k": 0} if temperature else {})
        options |= {"num_beams": 1 if temperature else self._beams, **self._first}
        lengths = [(len(source) + max_new_tokens) * options["num_beams"] for source in sources]
        # Padding costs less than another batch, which reads all weights again for each new token.
        for part in (
            eval_batches(lengths, batch_tokens, max_padding=math.inf) if padded else [[i] for i in range(len(sources))]
        ):
            answers = self._generate(model, [sources[i] for i in part], max_new_tokens, options)
            yield from zip([int(i) for i in part], answers, strict=True)

    def _generate(
        self, model: nn.Module, sources: Sequence[np.ndarray], max_new_tokens: int, options: dict[str, Any]
    ) -> list[np.ndarray]:
        device = next(model.parameters()).device
        longest = max(map(len, sources))
        tokens = torch.full((len(sources), longest), self._pad_id, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(sources):
            tokens[i, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
            mask[i, : len(row)] = 1
        out = cast(Callable[..., Tensor], model.generate)(
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self._stop_ids),
            pad_token_id=self._pad_id,
            **options,
        )
        # The first token starts the decoder and is no part of the target.
        answers = out[:, 1:].cpu().numpy()
        stops = np.isin(answers, list(self._stop_ids))
        return [row[: int(at.argmax()) + 1] if at.any() else row for row, at in zip(answers, stops, strict=True)]
