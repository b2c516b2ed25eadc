"""The possible answers of a language model as classes: their tokens, and decoding that is constrained to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.data import Rows, Tokens
from peftlab.errors import DataError, listed
from peftlab.tasks.lm_head import LMHead

TokenIds = tuple[int, ...]


class Choices:
    """The choices of ``eval.choices``. Their tokens are known once ``encode`` has seen a prompt.

    Args: names: the answers.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._ids: list[TokenIds] = []

    @property
    def encoded(self) -> bool:
        return bool(self._ids)

    def encode(self, prompt: np.ndarray, answers: Tokens) -> None:
        """Keeps the token ids of each choice with its end token, so that no choice is a prefix of another.

        Args: prompt: token ids of a prompt. answers: that prompt with each choice. Raises: DataError.
        """
        for i, choice in enumerate(self.names):
            if answers.ids[answers.row(i)][: len(prompt)].tolist() != prompt.tolist():
                raise DataError(
                    f"the choice {choice!r} merges with the end of the prompt when tokenized; end the prompt with a "
                    "line break or begin the choice with a space",
                    key="eval.choices",
                )
        self._ids = [_answer(answers, i) for i in range(len(self.names))]

    def labels(self, rows: Rows, first: int, tokens: Tokens, kept: np.ndarray, tokenizer: Any) -> np.ndarray:
        """[N] index of the choice in each row's answer; -1 for rows that are left out.

        Args: first: index in ``rows`` of the first of ``tokens``. kept: [N] tokens kept of each row.
        Raises: DataError for an answer that is no choice.
        """
        labels = np.full(len(tokens), -1, dtype=np.int64)
        for i in np.flatnonzero(kept).tolist():
            answer = _answer(tokens, i)
            if answer not in self._ids:
                raise DataError(
                    f"{rows.where(first + i)}: the completion {tokenizer.decode(answer, skip_special_tokens=True)!r} is not one "
                    f"of eval.choices: {listed(self.names)}",
                    key="eval.choices",
                )
            labels[i] = self._ids.index(answer)
        return labels

    def choose(
        self, model: nn.Module, head: LMHead, prefixes: Sequence[Tensor], logits: Tensor
    ) -> list[tuple[int, float]]:
        """The choice of each row by greedy decoding constrained to the choices, with its probability.

        Args: prefixes: token ids before the answer. logits: [B, V] at the last of them. If the choices begin with
        different tokens, which is usual, no further forward pass is needed.
        """

        def next_logits(prefix: Tensor) -> Tensor:
            hidden = head.hidden_states(model, {"input_ids": prefix[None]})
            return head.logits(model, hidden[0, -1:])[0]

        return [self._decode(prefix, row, next_logits) for prefix, row in zip(prefixes, logits, strict=True)]

    def _decode(self, prefix: Tensor, logits: Tensor, next_logits: Callable[[Tensor], Tensor]) -> tuple[int, float]:
        alive, depth, probability = list(range(len(self._ids))), 0, 1.0
        while True:
            tokens = sorted({self._ids[c][depth] for c in alive})
            if len(tokens) > 1:
                probs = logits[tokens].softmax(-1)
                best = int(probs.argmax())
                probability *= float(probs[best])
                alive = [c for c in alive if self._ids[c][depth] == tokens[best]]
            if len(alive) == 1:
                return alive[0], probability
            prefix = torch.cat([prefix, prefix.new_tensor([self._ids[alive[0]][depth]])])
            depth += 1
            logits = next_logits(prefix)


def _answer(tokens: Tokens, i: int) -> TokenIds:
    span = tokens.row(i)
    return tuple(tokens.ids[span][tokens.trained[span]].tolist())
