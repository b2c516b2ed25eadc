"""Sequence classification: one label per text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.data import Ledger, Rows, Tokens, eval_batches, fit_lengths, pieces, read_labels, tokenize
from peftlab.data.chat_template import Part, Rendered
from peftlab.errors import DataError, RecipeError
from peftlab.tasks.base import (
    Batch,
    Encoded,
    Example,
    Outputs,
    Preview,
    Scores,
    collate,
    padded_inputs,
    preview,
)


class SequenceClassification:
    """See ``base.Task``.

    Args:
        class_names: the labels, in index order.
        class_weights: weight of each class in the loss, by name, or ``balanced`` (inverse frequency of the training
            rows, mean 1 over them), or ``none``.
    """

    name = "seq_cls"
    answers = "classes"
    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"

    def __init__(
        self,
        tokenizer: Any,
        *,
        class_names: list[str],
        text_column: str = "text",
        label_column: str = "label",
        label_names: Mapping[str, str] | None = None,
        bins: tuple[list[float], list[str]] | None = None,
        class_weights: str | Mapping[str, float] = "none",
    ) -> None:
        self.tokenizer = tokenizer
        self.class_names = class_names
        self.text_column, self.label_column = text_column, label_column
        self._label_names, self._bins = dict(label_names or {}), bins
        self._class_weights = class_weights
        if isinstance(class_weights, Mapping) and set(class_weights) != set(class_names):
            raise RecipeError(
                f"expected a weight for each of the classes {class_names}, found {sorted(class_weights)}",
                key="train.class_weights",
            )

    def model_kwargs(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.class_names),
            "id2label": dict(enumerate(self.class_names)),
            "label2id": {name: i for i, name in enumerate(self.class_names)},
        }

    def encode(
        self, rows: Rows, *, max_length: int, too_long: str, training: bool, keep: bool = True, labelled: bool = True
    ) -> Encoded:
        labels = self._label_indices(rows, training=training) if labelled else None
        weights = self._weights(labels) if training and labels is not None else [1.0] * len(self.class_names)
        ledger = Ledger(
            rows,
            self.tokenizer,
            max_length=max_length,
            too_long=too_long,
            keep_last=True,
            class_names=self.class_names,
        )
        examples: list[Example] = []
        for first, tokens in self._pieces(rows):
            kept = fit_lengths(tokens.lengths, max_length=max_length, too_long=too_long)
            ledger.add(first, tokens, kept, None if labels is None else labels[first : first + len(tokens)])
            if keep:
                for i, ids in _fitted(tokens, kept):
                    label = None if labels is None else int(labels[first + i])
                    examples.append(Example(ids, first + i, 1.0 if label is None else weights[label], label=label))
        return Encoded(examples, ledger)

    def _label_indices(self, rows: Rows, *, training: bool) -> np.ndarray:
        """[N] class index of each row. Raises: DataError for a label that is none of the classes."""
        index = {name: i for i, name in enumerate(self.class_names)}
        labels = self._read_labels(rows, all_names_used=training)
        for i, label in enumerate(labels):
            if label not in index:
                raise DataError(
                    f"{rows.where(i)}: label {label!r} does not occur in the training data, whose labels are "
                    f"{', '.join(self.class_names)}",
                    key="data.columns.label",
                )
        return np.array([index[label] for label in labels], dtype=np.int64)

    def preview(self, rows: Rows, index: int, *, max_length: int, labelled: bool = True) -> Preview:
        rendered = self._texts([rows.row(index)], [rows.where(index)])
        label = self._read_labels(rows.select([index]), all_names_used=False)[0] if labelled else None
        return preview(
            rows.where(index),
            self._tokenize(rendered),
            self.tokenizer,
            max_length=max_length,
            label=label,
            keep_last=True,
        )

    def _read_labels(self, rows: Rows, *, all_names_used: bool) -> list[str]:
        return read_labels(
            rows, self.label_column, label_names=self._label_names, bins=self._bins, all_names_used=all_names_used
        )

    def _texts(self, rows: Sequence[Mapping[str, Any]], wheres: Sequence[str]) -> list[Rendered]:
        rendered = []
        for row, where in zip(rows, wheres, strict=True):
            text = row.get(self.text_column)
            if not isinstance(text, str):
                raise DataError(f"{where}: expected text, found {text!r}", key="data.columns.text")
            rendered.append(Rendered(text, [Part(0, len(text), "text")]))
        return rendered

    def _pieces(self, rows: Rows) -> Iterator[tuple[int, Tokens]]:
        """``(index of the first row, tokens)`` for some thousand rows at a time. Raises: DataError for an empty text."""
        rows.column(self.text_column)
        for first, rendered in pieces(rows, self._texts):
            tokens = self._tokenize(rendered)
            for i in np.flatnonzero(tokens.lengths == 0).tolist():
                raise DataError(f"{rows.where(first + i)}: the text is empty", key="data.columns.text")
            yield first, tokens

    def _tokenize(self, rendered: list[Rendered]) -> Tokens:
        return tokenize(self.tokenizer, rendered, chat=False, stop_ids=())

    def _weights(self, labels: np.ndarray) -> list[float]:
        """Weight of each class."""
        if isinstance(self._class_weights, Mapping):
            return [self._class_weights[name] for name in self.class_names]
        if self._class_weights == "none":
            return [1.0] * len(self.class_names)
        counts = np.bincount(labels, minlength=len(self.class_names))
        return [len(labels) / (len(counts) * max(1, int(count))) for count in counts]

    def collate(self, examples: list[Example], device: Any) -> Batch:
        return collate(examples, pad_id=self.tokenizer.pad_token_id, device=device)

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        losses = F.cross_entropy(self.outputs(model, batch).logits(), batch.labels, reduction="none")
        return (losses * batch.weights.to(losses.dtype)).sum()

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        logits = model(**batch.model_inputs).logits
        return Outputs(logits, [1] * len(logits), targets=batch.labels, weights=batch.weights)

    def reference_outputs(self, model: nn.Module, examples: list[Example], device: Any) -> Outputs:
        logits = model(**padded_inputs(examples, pad_id=self.tokenizer.pad_token_id, device=device)).logits
        labels = [e.label for e in examples]
        targets = None if None in labels else torch.tensor(labels, device=device)
        weights = torch.tensor([e.weight for e in examples], dtype=torch.float64, device=device)
        return Outputs(logits, [1] * len(examples), targets=targets, weights=weights)

    def score(self, model: nn.Module, batch: Batch) -> Scores:
        logits = self.outputs(model, batch).logits()
        nll = F.cross_entropy(logits, batch.labels, reduction="sum")
        return Scores(
            nll_sum=float(nll),
            num_tokens=len(logits),
            predictions=logits.argmax(-1).tolist(),
            references=batch.labels.tolist(),
        )

    def row_from_text(self, text: str) -> dict[str, Any]:
        return {self.text_column: text}

    @torch.no_grad()
    def predict(
        self, model: nn.Module, rows: Rows, *, batch_tokens: int, max_length: int, **_: Any
    ) -> Iterator[dict[str, Any]]:
        """Yields ``{"label", "probability", "probabilities": {name: p}}`` per row; longer texts are truncated."""
        examples = []
        for first, tokens in self._pieces(rows):
            kept = fit_lengths(tokens.lengths, max_length=max_length, too_long="truncate")
            examples += [Example(ids, first + i, 1.0, label=0) for i, ids in _fitted(tokens, kept)]
        device = next(model.parameters()).device
        results: dict[int, dict[str, Any]] = {}
        for part in eval_batches([len(e) for e in examples], batch_tokens):
            batch = self.collate([examples[i] for i in part], device)
            for i, probs in zip(part, self.outputs(model, batch).logits().softmax(-1).tolist(), strict=True):
                best = max(range(len(probs)), key=probs.__getitem__)
                results[i] = {
                    "label": self.class_names[best],
                    "probability": probs[best],
                    "probabilities": dict(zip(self.class_names, probs, strict=True)),
                }
        yield from (results[i] for i in range(len(examples)))


def _fitted(tokens: Tokens, kept: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Index and ids of the rows that stay; a truncated one keeps its last token, the separator encoder models end with."""
    for i in np.flatnonzero(kept).tolist():
        ids = tokens.ids[tokens.row(i, int(kept[i]))]
        if kept[i] < tokens.lengths[i]:
            ids = np.append(ids[:-1], tokens.ids[tokens.bounds[i + 1] - 1])
        yield i, ids
