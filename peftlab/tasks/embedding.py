"""Sentence embeddings: a vector per text, learned from a teacher's vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.data import Ledger, Rows, check_ids, eval_batches, fit_lengths
from peftlab.errors import RecipeError
from peftlab.specs.tasks import TASKS
from peftlab.tasks.base import Columns, Padding, TaskParts
from peftlab.tasks.batch import Batch, by_length, collate, example_weights, of_one_length, padded_inputs
from peftlab.tasks.example import Encoded, Example
from peftlab.tasks.inputs import EMPTY_TEXT, blank_values, cut_note
from peftlab.tasks.outputs import Outputs, at_least_float32
from peftlab.tasks.preview import Preview, preview
from peftlab.tasks.texts import Texts

POOLINGS = ("mean", "cls", "last")


class Embedding:
    """See ``base.Task``.

    Args:
        pooling: mean over the tokens of a text, its first (cls) or its last token.
        normalize: whether a vector is divided by its length.
        files: writes the tokenizer and its related files, with ``save_pretrained(folder)``.
    """

    spec = TASKS["embedding"]
    class_names = None

    def __init__(
        self,
        tokenizer: Any,
        *,
        pooling: str,
        normalize: bool,
        text_column: str = "text",
        files: Any = None,
        max_length: int | None = None,
        padding: Padding = "right",
        num_embeddings: int | None = None,
    ) -> None:
        assert pooling in POOLINGS
        self.tokenizer, self.files, self.max_length = tokenizer, files or tokenizer, max_length
        self._pooling, self._normalize, self.padding = pooling, normalize, padding
        self._num_embeddings = num_embeddings
        self._texts = Texts(tokenizer, text_column)

    @classmethod
    def make(cls, parts: TaskParts) -> Embedding:
        """The task of ``parts``. Raises: RecipeError if the model's files set an unsupported pooling."""
        assert parts.sentences is not None
        files = parts.sentences()
        pooling = parts.pooling or files.pooling or "mean"
        if pooling not in POOLINGS:
            raise RecipeError(
                f"the model's files set the pooling {pooling!r}; expected {', '.join(POOLINGS)}",
                key="model.pooling",
            )
        return cls(
            parts.reader,
            pooling=pooling,
            normalize=files.normalize,
            text_column=parts.column("text"),
            files=files.writer(parts.reader, pooling=pooling),
            max_length=files.max_length,
            padding=parts.padding,
            num_embeddings=parts.num_embeddings,
        )

    @property
    def read_columns(self) -> set[str]:
        return {self._texts.column}

    @classmethod
    def blank_rows(cls, parts: TaskParts, rows: Rows, *, labelled: bool) -> dict[int, str]:
        return blank_values(rows, {parts.column("text"): EMPTY_TEXT})

    def model_kwargs(self) -> dict[str, Any]:
        return {}

    def encode(
        self, rows: Rows, *, max_length: int, too_long: str, training: bool, keep: bool = True, labelled: bool = True
    ) -> Encoded:
        ledger = Ledger(rows, self.tokenizer, max_length=max_length, too_long=too_long, keep_last=True, style="texts")
        examples: list[Example] = []
        for first, tokens in self._texts.pieces(rows):
            kept = fit_lengths(tokens.lengths, max_length=max_length, too_long=too_long)
            ledger.add(first, tokens, kept)
            if keep:
                examples += [Example(ids, first + i, 1.0) for i, ids, _ in self._texts.fitted(tokens, kept)]
        return Encoded(examples, ledger)

    def preview(self, rows: Rows, index: int, *, max_length: int, labelled: bool = True) -> Preview:
        tokens = self._texts.row(rows, index)
        return preview(rows.where(index), tokens, self.tokenizer, max_length=max_length, keep_last=True)

    def collate(self, examples: list[Example], device: Any) -> Batch:
        return collate(examples, pad_id=self.tokenizer.pad_token_id, device=device)

    def probe(self, ids: np.ndarray) -> Example:
        return Example(ids, 0, 1.0)

    def losses(self, outputs: Outputs) -> Tensor:
        raise ValueError("texts have no labels, so the loss needs a teacher's vectors")

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        raise ValueError("texts have no labels, so the loss needs a teacher's vectors")

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        def call(inputs: Mapping[str, Tensor]) -> Tensor:
            return self._pooled(_own_tokens(model(**inputs).last_hidden_state, inputs), inputs)

        vectors = by_length(call, batch.inputs) if self.padding == "none" else call(batch.inputs)
        return self._outputs(vectors, batch.weights)

    def _pooled(self, hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """[B, H] one vector per row of ``hidden`` [B, T, H]."""
        mask = inputs.get("attention_mask")
        if self._pooling == "cls":
            return hidden[:, 0]
        if self._pooling == "mean":
            return hidden.mean(1) if mask is None else _masked_mean(hidden, mask)
        ends = torch.full_like(inputs["input_ids"][:, 0], hidden.shape[1]) if mask is None else mask.sum(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), ends - 1]

    def _outputs(self, vectors: Tensor, weights: Tensor) -> Outputs:
        vectors = F.normalize(vectors, dim=-1) if self._normalize else vectors
        return Outputs(vectors, [1] * len(vectors), vectors=True, weights=weights)

    def reference_outputs(self, model: nn.Module, examples: list[Example], device: Any) -> Outputs:
        """The vector of each text, computed on its own tokens only."""
        groups = of_one_length(examples) if self.padding == "none" else [list(range(len(examples)))]
        hidden: dict[int, Tensor] = {}
        for group in groups:
            inputs = padded_inputs([examples[i] for i in group], pad_id=self.tokenizer.pad_token_id, device=device)
            hidden |= zip(group, _own_tokens(model(**inputs).last_hidden_state, inputs), strict=True)
        texts = [hidden[i][: len(e)] for i, e in enumerate(examples)]
        pools: dict[str, Callable[[Tensor], Tensor]]
        pools = {"mean": lambda t: t.sum(0) / len(t), "cls": lambda t: t[0], "last": lambda t: t[-1]}
        return self._outputs(torch.stack([pools[self._pooling](t) for t in texts]), example_weights(examples, device))

    def score(self, model: nn.Module, batch: Batch) -> Columns:
        """No columns: there are no labels."""
        return {}

    def row_from_text(self, text: str) -> dict[str, Any]:
        return {self._texts.column: text}

    def unusable(self, rows: Rows) -> dict[int, str]:
        return self._texts.unusable(rows)

    def no_result(self) -> dict[str, Any]:
        return {"vector": None}

    @torch.no_grad()
    def predict(
        self, model: nn.Module, rows: Rows, *, batch_tokens: int, max_length: int, **_: Any
    ) -> Iterator[dict[str, Any]]:
        """Yields ``{"vector": [H numbers]}`` per row; longer texts are truncated."""
        encoded = self.encode(rows, max_length=max_length, too_long="truncate", training=False)
        examples, lengths = encoded.examples, encoded.ledger.row_lengths.tolist()
        for example in examples:
            check_ids(self.tokenizer, example.ids, self._num_embeddings, rows.where(example.row))
        device = next(model.parameters()).device
        results: dict[int, list[float]] = {}
        for part in eval_batches([len(e) for e in examples], batch_tokens):
            vectors = self.outputs(model, self.collate([examples[i] for i in part], device)).values
            results |= dict(zip(part.tolist(), vectors.tolist(), strict=True))
        yield from ({"vector": results[i]} | cut_note(lengths[i], len(examples[i])) for i in range(len(examples)))


def _own_tokens(hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """The states of the texts' own tokens: an adapter may put virtual tokens before them."""
    return at_least_float32(hidden[:, -inputs["input_ids"].shape[1] :])


def _masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """[B, H] mean of ``hidden`` [B, T, H] over the tokens in ``mask`` [B, T]."""
    seen = mask.to(hidden.dtype)[..., None]
    return (hidden * seen).sum(1) / seen.sum(1)
