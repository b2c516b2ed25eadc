"""Sequence classification: one label per text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.data import Ledger, Rows, check_ids, eval_batches, fit_lengths
from peftlab.specs.tasks import TASKS
from peftlab.tasks.base import Columns, Padding, TaskParts
from peftlab.tasks.batch import Batch, by_length, collate, of_one_length, padded_inputs
from peftlab.tasks.classification import (
    Labels,
    labels_loss_sum,
    labels_score,
    no_prediction,
    outputs_of,
    prediction,
    reference_outputs_of,
)
from peftlab.tasks.example import Encoded, Example
from peftlab.tasks.inputs import EMPTY_TEXT, NO_LABEL, blank_values, cut_note
from peftlab.tasks.outputs import Outputs, cross_entropy
from peftlab.tasks.preview import Preview, preview
from peftlab.tasks.texts import Texts


class SequenceClassification:
    """See ``base.Task``."""

    spec = TASKS["seq_cls"]
    max_length = None

    def __init__(
        self,
        tokenizer: Any,
        *,
        labels: Labels,
        text_column: str = "text",
        padding: Padding = "right",
        num_embeddings: int | None = None,
    ) -> None:
        self.tokenizer = self.files = tokenizer
        self.padding, self._num_embeddings = padding, num_embeddings
        self.class_names = labels.names
        self._texts = Texts(tokenizer, text_column)
        self._labels = labels

    @classmethod
    def make(cls, parts: TaskParts) -> SequenceClassification:
        return cls(
            parts.reader,
            labels=Labels.make(parts),
            text_column=parts.column("text"),
            padding=parts.padding,
            num_embeddings=parts.num_embeddings,
        )

    @property
    def read_columns(self) -> set[str]:
        return {self._texts.column, self._labels.column}

    @classmethod
    def blank_rows(cls, parts: TaskParts, rows: Rows, *, labelled: bool) -> dict[int, str]:
        label = {parts.column("label"): NO_LABEL} if labelled else {}
        return blank_values(rows, {parts.column("text"): EMPTY_TEXT} | label)

    def model_kwargs(self) -> dict[str, Any]:
        return self._labels.model_kwargs

    def encode(
        self, rows: Rows, *, max_length: int, too_long: str, training: bool, keep: bool = True, labelled: bool = True
    ) -> Encoded:
        labels = self._labels.indices(rows) if labelled else None
        weights = self._labels.weights(labels, training=training)
        ledger = Ledger(
            rows,
            self.tokenizer,
            max_length=max_length,
            too_long=too_long,
            keep_last=True,
            class_names=self.class_names,
        )
        examples: list[Example] = []
        for first, tokens in self._texts.pieces(rows):
            kept = fit_lengths(tokens.lengths, max_length=max_length, too_long=too_long)
            ledger.add(first, tokens, kept, None if labels is None else labels[first : first + len(tokens)])
            if keep:
                for i, ids, _ in self._texts.fitted(tokens, kept):
                    label = None if labels is None else int(labels[first + i])
                    examples.append(Example(ids, first + i, 1.0 if label is None else weights[label], label=label))
        return Encoded(examples, ledger)

    def preview(self, rows: Rows, index: int, *, max_length: int, labelled: bool = True) -> Preview:
        label = self._labels.read(rows.select([index]))[0] if labelled else None
        return preview(
            rows.where(index),
            self._texts.row(rows, index),
            self.tokenizer,
            max_length=max_length,
            label=label,
            keep_last=True,
        )

    def collate(self, examples: list[Example], device: Any) -> Batch:
        return collate(examples, pad_id=self.tokenizer.pad_token_id, device=device, left=self.padding == "left")

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return labels_loss_sum(self, model, batch)

    def probe(self, ids: np.ndarray) -> Example:
        return Example(ids, 0, 1.0, label=0)

    def losses(self, outputs: Outputs) -> Tensor:
        return cross_entropy(outputs)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        return outputs_of(self._logits(model, batch.inputs), batch)

    def _logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """[B, C]"""

        def call(inputs: Mapping[str, Tensor]) -> Tensor:
            logits: Tensor = model(**inputs).logits
            return logits

        return by_length(call, inputs) if self.padding == "none" else call(inputs)

    def reference_outputs(self, model: nn.Module, examples: list[Example], device: Any) -> Outputs:
        options = {"pad_id": self.tokenizer.pad_token_id, "device": device, "left": self.padding == "left"}
        groups = of_one_length(examples) if self.padding == "none" else [list(range(len(examples)))]
        logits = torch.cat([model(**padded_inputs([examples[i] for i in g], **options)).logits for g in groups])
        logits = logits[np.argsort(np.concatenate(groups))]
        return reference_outputs_of(logits, examples, device)

    def score(self, model: nn.Module, batch: Batch) -> Columns:
        return labels_score(self, model, batch)

    def row_from_text(self, text: str) -> dict[str, Any]:
        return {self._texts.column: text}

    def unusable(self, rows: Rows) -> dict[int, str]:
        return self._texts.unusable(rows)

    def no_result(self) -> dict[str, Any]:
        return no_prediction(self.class_names)

    @torch.no_grad()
    def predict(
        self, model: nn.Module, rows: Rows, *, batch_tokens: int, max_length: int, **_: Any
    ) -> Iterator[dict[str, Any]]:
        """Yields ``{"label", "probability", "probabilities": {name: p}}`` per row; longer texts are truncated."""
        examples: list[Example] = []
        notes: list[dict[str, str]] = []
        for first, tokens in self._texts.pieces(rows):
            kept = fit_lengths(tokens.lengths, max_length=max_length, too_long="truncate")
            notes += map(cut_note, tokens.lengths.tolist(), kept.tolist())
            for i, ids, _ in self._texts.fitted(tokens, kept):
                check_ids(self.tokenizer, ids, self._num_embeddings, rows.where(first + i))
                examples.append(Example(ids, first + i, 1.0, label=0))
        device = next(model.parameters()).device
        results: dict[int, dict[str, Any]] = {}
        for part in eval_batches([len(e) for e in examples], batch_tokens):
            batch = self.collate([examples[i] for i in part], device)
            for i, probs in zip(part, self.outputs(model, batch).logits().softmax(-1).tolist(), strict=True):
                results[i] = prediction(probs, self.class_names) | notes[i]
        yield from (results[i] for i in range(len(examples)))
