"""Token classification: a class per word, at one of its tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.data import Annotated, Annotations, Ledger, Rows, Tokens, check_ids, eval_batches, fit_lengths, pieces
from peftlab.data.entities import Entity
from peftlab.data.labels import nearest_label
from peftlab.data.words import Positions, tokenize_words
from peftlab.errors import DataError, listed
from peftlab.specs.task_spec import TaskSpec
from peftlab.tasks.base import Columns, Padding, TaskParts
from peftlab.tasks.batch import Batch, by_length, collate, of_one_length, padded_inputs
from peftlab.tasks.classification import class_config
from peftlab.tasks.example import Encoded, Example
from peftlab.tasks.inputs import cut_note, unusable_rows
from peftlab.tasks.outputs import Outputs, cross_entropy, weighted_sum
from peftlab.tasks.preview import Preview, preview

_MOST_SHOWN = 20


class TokenClassification(ABC):
    """See ``base.Task``. One position per word is scored, see ``data.words``. Subclasses say what the classes mean.

    Args:
        last: whether a word is scored at its last token.
    """

    spec: TaskSpec
    max_length = None
    per_word: bool

    def __init__(
        self,
        tokenizer: Any,
        annotations: Annotations,
        *,
        classes: Sequence[str],
        available: Sequence[str] = (),
        last: bool = False,
        padding: Padding = "right",
        num_embeddings: int | None = None,
    ) -> None:
        self.tokenizer = self.files = tokenizer
        self.class_names = list(classes)
        self.padding, self._num_embeddings = padding, num_embeddings
        self._annotations, self._available, self._last = annotations, available, last
        self._index = {name: i for i, name in enumerate(self.class_names)}
        # The end that the tokenizer writes stays at the end of a truncated row.
        self._ends = _ends_texts(tokenizer)

    @classmethod
    def make(cls, parts: TaskParts) -> TokenClassification:
        assert parts.classes is not None
        return cls(
            parts.reader,
            cls._annotations_of(parts),
            classes=parts.classes,
            available=parts.available,
            last=parts.causal,
            padding=parts.padding,
            num_embeddings=parts.num_embeddings,
        )

    @classmethod
    def _annotations_of(cls, parts: TaskParts) -> Annotations:
        return Annotations(parts.columns, parts.label_names, per_word=cls.per_word)

    @classmethod
    @abstractmethod
    def find_classes(cls, parts: TaskParts, rows: Rows) -> list[str]:
        """See ``base.FindsClasses``."""

    @property
    def read_columns(self) -> set[str]:
        return {self._annotations.words_column(self._available), self._annotations.label_column(self._available)}

    @classmethod
    def blank_rows(cls, parts: TaskParts, rows: Rows, *, labelled: bool) -> dict[int, str]:
        return cls._annotations_of(parts).blank_rows(rows, labelled=labelled)

    def model_kwargs(self) -> dict[str, Any]:
        return class_config(self.class_names)

    def encode(
        self, rows: Rows, *, max_length: int, too_long: str, training: bool, keep: bool = True, labelled: bool = True
    ) -> Encoded:
        ledger = Ledger(
            rows,
            self.tokenizer,
            max_length=max_length,
            too_long=too_long,
            keep_last=self._ends,
            style="words",
            span_labels=self._span_labels if labelled else (),
        )
        examples: list[Example] = []
        for first, annotated, tokens, positions in self._pieces(rows, labelled=labelled):
            kept = fit_lengths(tokens.lengths, max_length=max_length, too_long=too_long)
            notes: list[tuple[int, str]] = []
            for i, (row, found) in enumerate(zip(annotated, positions, strict=True)):
                notes += [(i, note) for note in _notes(row, found)]
                inside = found.tokens < self._room(int(kept[i]), int(tokens.lengths[i]))
                if not inside.any():
                    kept[i] = 0
                if not kept[i]:
                    continue
                names, of_tags = self._tags(rows.where(first + i), row, found) if labelled else (None, ())
                notes += [(i, note) for note in of_tags]
                if names is not None:
                    ledger.add_spans(*self._counted(names, int(inside.sum())))
                if keep:
                    examples.append(self._example(first + i, tokens, i, int(kept[i]), found.tokens[inside], names))
            ledger.add(first, replace(tokens, notes=tuple(notes)), kept)
        return Encoded(examples, ledger)

    def _pieces(self, rows: Rows, *, labelled: bool) -> Iterator[tuple[int, list[Annotated], Tokens, list[Positions]]]:
        """``(index of the first row, rows, their tokens and positions)`` for a few thousand rows at a time."""
        read = self._annotations.reader(rows, labelled=labelled)

        def read_all(some: Sequence[Mapping[str, Any]], wheres: Sequence[str]) -> list[Annotated]:
            return [read(row, where) for row, where in zip(some, wheres, strict=True)]

        for first, annotated in pieces(rows, read_all):
            yield first, annotated, *self._tokenized(annotated)

    def _tokenized(self, annotated: Sequence[Annotated]) -> tuple[Tokens, list[Positions]]:
        texts, words = [row.text for row in annotated], [row.words for row in annotated]
        return tokenize_words(self.tokenizer, texts, words, last=self._last)

    def _room(self, kept: int, length: int) -> int:
        """The number of a row's first tokens that are used."""
        return kept - 1 if self._ends and 0 < kept < length else kept

    def _example(
        self, row: int, tokens: Tokens, i: int, kept: int, scored: np.ndarray, names: Sequence[str] | None
    ) -> Example:
        ids = tokens.ids[tokens.row(i, self._room(kept, int(tokens.lengths[i])))]
        if len(ids) < kept:
            ids = np.append(ids, tokens.ids[tokens.bounds[i + 1] - 1])
        trained = np.zeros(len(ids), dtype=bool)
        trained[scored] = True
        label = None if names is None else np.array([self._index[n] for n in names[: len(scored)]], dtype=np.int64)
        return Example(ids, row, float(len(scored)), trained=trained, label=label)

    @property
    @abstractmethod
    def _span_labels(self) -> list[str]:
        """The labels that the ledger counts."""

    @abstractmethod
    def _tags(self, where: str, row: Annotated, found: Positions) -> tuple[list[str], list[str]]:
        """The class of each position, and notes on how it was found. Raises: DataError for an unknown class."""

    @abstractmethod
    def _counted(self, names: Sequence[str], kept: int) -> tuple[list[str], list[str]]:
        """The labels of a row's spans, and of those that are not wholly among the first ``kept`` positions."""

    def _unknown(self, where: str, label: str, known: Sequence[str], key: str) -> DataError:
        return DataError(
            f"{where}: {label!r} does not occur in the training data, whose labels are {listed(known)}"
            f"{nearest_label(label, known)}",
            key=key,
        )

    def preview(self, rows: Rows, index: int, *, max_length: int, labelled: bool = True) -> Preview:
        row = self._annotations.reader(rows.select([index]), labelled=labelled)(rows.row(index), rows.where(index))
        tokens, (found,) = self._tokenized([row])
        label = None
        if labelled:
            names, _ = self._tags(rows.where(index), row, found)
            spans = [f"{row.text[start:end]} ({name})" for start, end, name in self._spans(names, row, found)]
            more = f" and {len(spans) - _MOST_SHOWN:,} more" if len(spans) > _MOST_SHOWN else ""
            label = (", ".join(spans[:_MOST_SHOWN]) or "none") + more
        where, keep_last = rows.where(index), self._ends
        return preview(where, tokens, self.tokenizer, max_length=max_length, label=label, keep_last=keep_last)

    @abstractmethod
    def _spans(self, names: Sequence[str], row: Annotated, found: Positions) -> list[Entity]:
        """The characters of each span that the classes of positions make."""

    def collate(self, examples: list[Example], device: Any) -> Batch:
        return collate(examples, pad_id=self.tokenizer.pad_token_id, device=device)

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return weighted_sum(cross_entropy(self.outputs(model, batch)), None)

    def probe(self, ids: np.ndarray) -> Example:
        everything = np.ones(len(ids), dtype=bool)
        return Example(ids, 0, float(len(ids)), trained=everything, label=np.zeros(len(ids), dtype=np.int64))

    def losses(self, outputs: Outputs) -> Tensor:
        return cross_entropy(outputs)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        assert batch.trained is not None
        logits = self._logits(model, batch.inputs)[batch.trained]
        targets = None if batch.labels is None else batch.labels[batch.labels >= 0]
        return Outputs(logits, [e.num_scored for e in batch.examples], targets=targets)

    def _logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """[B, T, C] of the rows' own tokens: an adapter may put virtual tokens before them."""
        longest = inputs["input_ids"].shape[1]

        def call(inputs: Mapping[str, Tensor]) -> Tensor:
            length = inputs["input_ids"].shape[1]
            logits: Tensor = model(**inputs).logits[:, -length:]
            return F.pad(logits, (0, 0, 0, longest - length))

        return by_length(call, inputs) if self.padding == "none" else call(inputs)

    def reference_outputs(self, model: nn.Module, examples: list[Example], device: Any) -> Outputs:
        groups = of_one_length(examples) if self.padding == "none" else [list(range(len(examples)))]
        values: dict[int, Tensor] = {}
        for group in groups:
            inputs = padded_inputs([examples[i] for i in group], pad_id=self.tokenizer.pad_token_id, device=device)
            logits = model(**inputs).logits[:, -inputs["input_ids"].shape[1] :]
            for i, row in zip(group, logits, strict=True):
                at = examples[i].trained
                assert at is not None
                values[i] = torch.stack([row[t] for t in at.nonzero()[0].tolist()])
        targets = [int(name) for e in examples if isinstance(e.label, np.ndarray) for name in e.label]
        return Outputs(
            torch.cat([values[i] for i in range(len(examples))]),
            [len(values[i]) for i in range(len(examples))],
            targets=torch.tensor(targets, device=device) if targets else None,
        )

    def score(self, model: nn.Module, batch: Batch) -> Columns:
        outputs = self.outputs(model, batch)
        assert outputs.targets is not None
        logits = outputs.logits()
        return {
            "nll_sum": float(F.cross_entropy(logits, outputs.targets, reduction="sum")),
            "num_scored": len(logits),
            "predictions": logits.argmax(-1).tolist(),
            "references": outputs.targets.tolist(),
            "row_starts": [int(i == 0) for count in outputs.counts for i in range(count)],
        }

    def row_from_text(self, text: str) -> dict[str, Any]:
        return {self._annotations.text_column: text}

    def unusable(self, rows: Rows) -> dict[int, str]:
        self._annotations.reader(rows, labelled=False)  # raises if there is no such column

        def read(some: Rows) -> None:
            for first, annotated, _, positions in self._pieces(some, labelled=False):
                for i, (row, found) in enumerate(zip(annotated, positions, strict=True)):
                    if not len(found):
                        raise DataError(f"{some.where(first + i)}: there is no word in {row.text[:40]!r}")

        return unusable_rows(rows, read, column=None)

    def no_result(self) -> dict[str, Any]:
        return {self._result: None}

    @property
    @abstractmethod
    def _result(self) -> str:
        """The name of what ``predict`` gives."""

    @torch.no_grad()
    def predict(
        self, model: nn.Module, rows: Rows, *, batch_tokens: int, max_length: int, **_: Any
    ) -> Iterator[dict[str, Any]]:
        """Yields ``{"spans": [...]}`` or ``{"words": [...]}`` per row, of ``{"start", "end", "label", "text", "score"}``.

        start, end: characters of the text, or of the words with a space between them. score: the mean over its words of the
        probability of its label. A row that is a list of words also has ``tokens``: ``[first, last + 1]`` of them. Longer
        rows are truncated.
        """
        examples: list[Example] = []
        read: list[tuple[Annotated, Positions]] = []
        notes: list[dict[str, str]] = []
        for first, annotated, tokens, positions in self._pieces(rows, labelled=False):
            for i, (row, found) in enumerate(zip(annotated, positions, strict=True)):
                length = int(tokens.lengths[i])
                kept = min(length, max_length)
                inside = found.tokens < self._room(kept, length)
                example = self._example(first + i, tokens, i, kept, found.tokens[inside], None)
                check_ids(self.tokenizer, example.ids, self._num_embeddings, rows.where(first + i))
                examples.append(example)
                read.append((row, found))
                notes.append(cut_note(length, kept))
        device = next(model.parameters()).device
        results: dict[int, dict[str, Any]] = {}
        for part in eval_batches([len(e) for e in examples], batch_tokens):
            outputs = self.outputs(model, self.collate([examples[i] for i in part], device))
            probabilities = outputs.logits().softmax(-1).cpu().split(list(outputs.counts))
            for i, p in zip(part.tolist(), probabilities, strict=True):
                results[i] = {self._result: self._marked(read[i][0], read[i][1], p.double().numpy())} | notes[i]
        yield from (results[i] for i in range(len(examples)))

    def _marked(self, row: Annotated, found: Positions, probabilities: np.ndarray) -> list[dict[str, Any]]:
        """The spans of a prediction. Args: probabilities: [n, C] of the first n positions."""
        names = [self.class_names[i] for i in probabilities.argmax(-1).tolist()]
        marked = []
        for start, end, label in self._spans(names, row, found):
            covered = [k for k in range(len(names)) if _overlaps(row, found, k, start, end)]
            score = float(probabilities[covered][:, self._classes_of(label)].sum(-1).mean())
            span = {"start": start, "end": end, "label": label, "text": row.text[start:end], "score": score}
            if row.is_list:
                span["tokens"] = [int(found.firsts[covered[0]]), int(found.lasts[covered[-1]]) + 1]
            marked.append(span)
        return marked

    @abstractmethod
    def _classes_of(self, label: str) -> list[int]:
        """The classes that stand for a label."""


def _notes(row: Annotated, found: Positions) -> Iterator[str]:
    yield from row.notes
    for i in found.missing.tolist():
        start, end = row.words[i]
        yield f"no_token {row.text[start:end]!r}"


def _overlaps(row: Annotated, found: Positions, k: int, start: int, end: int) -> bool:
    """Whether position ``k`` stands for characters of ``[start, end)``."""
    first, last = int(found.firsts[k]), int(found.lasts[k])
    return row.words[first][0] < end and row.words[last][1] > start


def _ends_texts(tokenizer: Any) -> bool:
    """Whether the tokenizer writes a token after each text."""
    encoded: Any = tokenizer("a", verbose=False).encodings[0]
    offset: tuple[int, int] = encoded.offsets[-1]
    return offset[1] <= offset[0]
