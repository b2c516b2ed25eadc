"""Sequence classification: a class, labels, a rank or a number per text, or per pair of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.data import Ledger, Rows, check_ids, eval_batches, fit_lengths
from peftlab.specs.tasks import TASKS, spec_of
from peftlab.tasks.answers import Answers, yes_probabilities
from peftlab.tasks.base import Columns, Padding, TaskParts
from peftlab.tasks.batch import Batch, by_length, collate, of_one_length, padded_inputs
from peftlab.tasks.classification import Labels
from peftlab.tasks.example import Encoded, Example
from peftlab.tasks.inputs import EMPTY_TEXT, NO_LABEL, blank_values, cut_note
from peftlab.tasks.label_sets import LabelSets
from peftlab.tasks.numbers import Numbers
from peftlab.tasks.outputs import Outputs, weighted_sum
from peftlab.tasks.preview import Preview, preview
from peftlab.tasks.ranks import Ranks
from peftlab.tasks.texts import Texts

# Training rows on which thresholds are tuned, at most.
_TUNING_ROWS = 5000


class SequenceClassification:
    """See ``base.Task``. Args: labels: the answers of the rows. pair_column: of a second text."""

    spec = TASKS["seq_cls"]
    max_length = None

    def __init__(
        self,
        tokenizer: Any,
        *,
        labels: Answers,
        text_column: str = "text",
        pair_column: str | None = None,
        padding: Padding = "right",
        num_embeddings: int | None = None,
        token_types: bool = False,
    ) -> None:
        self.tokenizer = self.files = tokenizer
        self.padding, self._num_embeddings = padding, num_embeddings
        self.class_names = labels.names
        self._texts = Texts(tokenizer, text_column, pair=pair_column, types=token_types)
        self._labels = labels

    @classmethod
    def make(cls, parts: TaskParts) -> SequenceClassification:
        return cls(
            parts.reader,
            labels=cls._answers(parts),
            text_column=parts.column("text"),
            pair_column=parts.columns.get("pair"),
            padding=parts.padding,
            num_embeddings=parts.num_embeddings,
            token_types=parts.token_types > 1,
        )

    @classmethod
    def _answers(cls, parts: TaskParts) -> Answers:
        return Labels.make(parts)

    @property
    def read_columns(self) -> set[str]:
        return self._texts.columns | self._labels.read_columns

    @classmethod
    def blank_rows(cls, parts: TaskParts, rows: Rows, *, labelled: bool) -> dict[int, str]:
        texts = {parts.column("text"): EMPTY_TEXT}
        if "pair" in parts.columns:
            texts[parts.column("pair")] = EMPTY_TEXT.replace("the ", "the second ")
        return blank_values(rows, texts | (cls._blank_answers(parts) if labelled else {}))

    @classmethod
    def _blank_answers(cls, parts: TaskParts) -> dict[str, str]:
        """Column -> why a row without a value there has no answer."""
        return {parts.column("label"): NO_LABEL}

    def model_kwargs(self) -> dict[str, Any]:
        return self._labels.model_kwargs

    def encode(
        self, rows: Rows, *, max_length: int, too_long: str, training: bool, keep: bool = True, labelled: bool = True
    ) -> Encoded:
        labels = self._labels.values(rows) if labelled else None
        weights = self._labels.weights(labels, len(rows), training=training)
        ledger = Ledger(
            rows,
            self.tokenizer,
            max_length=max_length,
            too_long=too_long,
            class_names=self.class_names,
        )
        counted = self._labels.note(ledger, labels)
        examples: list[Example] = []
        for first, tokens in self._texts.pieces(rows):
            kept = fit_lengths(tokens.lengths, max_length=max_length, too_long=too_long)
            part = None if counted is None else counted[first : first + len(tokens)]
            ledger.add(first, tokens, kept, part, use=self._texts.used(tokens, kept))
            if keep:
                for i, ids, extra in self._texts.fitted(tokens, kept):
                    label = None if labels is None else labels[first + i]
                    examples.append(self._example(ids, first + i, weights[first + i], label, extra))
        return Encoded(examples, ledger)

    def _example(
        self, ids: np.ndarray, row: int, weight: float, label: Any, extra: Mapping[str, np.ndarray]
    ) -> Example:
        """Args: weight: of each scored position."""
        scored = self._labels.scored
        plain = label.item() if label is not None and not np.ndim(label) and hasattr(label, "item") else label
        return Example(ids, row, weight * scored, label=plain, extra=extra, scored=scored)

    def preview(self, rows: Rows, index: int, *, max_length: int, labelled: bool = True) -> Preview:
        tokens = self._texts.row(rows, index)
        return preview(
            rows.where(index),
            tokens,
            self.tokenizer,
            max_length=max_length,
            label=self._labels.texts(rows.select([index]))[0] if labelled else None,
            used=self._texts.used(tokens, np.minimum(tokens.lengths, max_length)),
        )

    def collate(self, examples: list[Example], device: Any) -> Batch:
        return collate(examples, pad_id=self.tokenizer.pad_token_id, device=device, left=self.padding == "left")

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs = self.outputs(model, batch)
        return weighted_sum(self.losses(outputs), outputs.weights)

    def probe(self, ids: np.ndarray) -> Example:
        scored = self._labels.scored
        label = 0 if scored == 1 else np.zeros(scored, dtype=np.int64)
        return self._example(ids, 0, 1.0, label, {})

    def losses(self, outputs: Outputs) -> Tensor:
        return self._labels.losses(outputs)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        return self._labels.outputs(self._logits(model, batch.inputs), batch.labels, batch.weights)

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
        return self._labels.reference(logits, examples, device)

    def score(self, model: nn.Module, batch: Batch) -> Columns:
        assert batch.labels is not None
        return self._labels.columns(self.outputs(model, batch), batch.labels)

    def row_from_text(self, text: str) -> dict[str, Any]:
        return self._texts.row_from_text(text)

    def unusable(self, rows: Rows) -> dict[int, str]:
        return self._texts.unusable(rows)

    def no_result(self) -> dict[str, Any]:
        return self._labels.no_result()

    @torch.no_grad()
    def predict(
        self, model: nn.Module, rows: Rows, *, batch_tokens: int, max_length: int, **_: Any
    ) -> Iterator[dict[str, Any]]:
        """Yields the answer of each row, see ``Answers.results``; longer texts are truncated."""
        examples: list[Example] = []
        notes: list[dict[str, str]] = []
        for first, tokens in self._texts.pieces(rows):
            kept = fit_lengths(tokens.lengths, max_length=max_length, too_long="truncate")
            notes += map(cut_note, tokens.lengths.tolist(), kept.tolist())
            for i, ids, extra in self._texts.fitted(tokens, kept):
                check_ids(self.tokenizer, ids, self._num_embeddings, rows.where(first + i))
                examples.append(self._example(ids, first + i, 1.0, None, extra))
        results: dict[int, dict[str, Any]] = {}
        for part, outputs in self._passes(model, examples, batch_tokens):
            for i, result in zip(part, self._labels.results(outputs), strict=True):
                results[i] = result | notes[i]
        yield from (results[i] for i in range(len(examples)))

    def _passes(
        self, model: nn.Module, examples: Sequence[Example], batch_tokens: int
    ) -> Iterator[tuple[list[int], Outputs]]:
        """The indices of some examples, with their outputs."""
        device = next(model.parameters()).device
        for part in eval_batches([len(e) for e in examples], batch_tokens):
            yield part.tolist(), self.outputs(model, self.collate([examples[i] for i in part], device))


class MultiLabelClassification(SequenceClassification):
    """Any number of labels per row."""

    spec = spec_of("seq_cls", ("labels",))
    _labels: LabelSets

    @classmethod
    def _answers(cls, parts: TaskParts) -> Answers:
        return LabelSets.make(parts)

    @classmethod
    def _blank_answers(cls, parts: TaskParts) -> dict[str, str]:
        return {}

    @classmethod
    def find_classes(cls, parts: TaskParts, rows: Rows) -> list[str]:
        return LabelSets.find(parts, rows)

    @classmethod
    def find_settings(cls, parts: TaskParts, rows: Rows) -> dict[str, Any]:
        return {}

    def before_training(self, model: nn.Module, *, trained_before: bool) -> None:
        """Thresholds change nothing in the model."""

    def of_checkpoint(self) -> None:
        """Thresholds change nothing in the model."""

    @torch.no_grad()
    def after_training(self, model: nn.Module, examples: Sequence[Example], *, batch_tokens: int) -> dict[str, Any]:
        """Tunes the thresholds on training rows if eval.threshold says so: held-out rows stay unseen."""
        if not self._labels.tuned:
            return {}
        chosen = [e for e in examples[:_TUNING_ROWS] if e.label is not None]
        if not chosen:
            return {}
        model.eval()
        found = np.zeros((len(chosen), self._labels.scored))
        for part, outputs in self._passes(model, chosen, batch_tokens):
            found[part] = yes_probabilities(outputs).double().cpu().numpy()
        return {"thresholds": self._labels.tune(found, np.stack([np.asarray(e.label) for e in chosen]))}


class OrdinalClassification(SequenceClassification):
    """One of several ordered classes per row."""

    spec = spec_of("seq_cls", ("rank",))

    @classmethod
    def _answers(cls, parts: TaskParts) -> Answers:
        return Ranks.make(parts)

    @classmethod
    def _blank_answers(cls, parts: TaskParts) -> dict[str, str]:
        return {parts.column("rank"): NO_LABEL}

    @classmethod
    def find_classes(cls, parts: TaskParts, rows: Rows) -> list[str]:
        return Ranks.find(parts, rows)


class Regression(SequenceClassification):
    """A number per row."""

    spec = spec_of("seq_cls", ("score",))
    _labels: Numbers

    @classmethod
    def _answers(cls, parts: TaskParts) -> Answers:
        return Numbers.make(parts)

    @classmethod
    def _blank_answers(cls, parts: TaskParts) -> dict[str, str]:
        return {parts.column("score"): "there is no number"}

    @classmethod
    def find_settings(cls, parts: TaskParts, rows: Rows) -> dict[str, Any]:
        return dict(Numbers.find(parts, rows))

    def before_training(self, model: nn.Module, *, trained_before: bool) -> None:
        self._labels.begin(model, trained_before=trained_before)

    def after_training(self, model: nn.Module, examples: Sequence[Example], *, batch_tokens: int) -> dict[str, Any]:
        self._labels.finish(model)
        return {}

    def of_checkpoint(self) -> None:
        self._labels.in_training = True
