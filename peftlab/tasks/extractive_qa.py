"""Extractive question answering: the part of a context that answers a question, or that there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.data import Question, QuestionLedger, Questions, Rows, Tokens, check_ids, eval_batches
from peftlab.errors import DataError
from peftlab.specs.tasks import TASKS
from peftlab.tasks.base import Columns, Padding, TaskParts
from peftlab.tasks.batch import Batch, collate, of_one_length, padded_inputs
from peftlab.tasks.example import Encoded, Example
from peftlab.tasks.inputs import blank_values, unusable_rows
from peftlab.tasks.outputs import Outputs, at_least_float32, cross_entropy
from peftlab.tasks.preview import Preview, preview
from peftlab.tasks.spans import Source, Span, best_of_row, best_spans
from peftlab.tasks.windows import ROLES, Pair, Window, WindowTokenizer, whole_rows

# Tokens of a window, if the recipe does not say: what BERT was measured with on SQuAD.
_WINDOW = 384
# Rows that are read and tokenized at once.
_ROWS = 1024
# Inputs of an example that say where an answer may be, and which tokens are the question's.
_ALLOWED, _TYPES = "can_answer", "token_type_ids"


class ExtractiveQA:
    """See ``base.Task``. An example is a window of a row, with two scored positions: where its answer starts and ends.

    Their classes are the positions of a window of full length, so all windows have equally many: those of the question, of
    special tokens and of padding have the logit -inf. Both positions of a window have the weight 1, so the loss is
    transformers' mean of the two, averaged over windows.

    Args: window: longest window in tokens. stride, max_answer_tokens, null_threshold: see the recipe. token_types: see
        ``TaskParts``.
    """

    spec = TASKS["extractive_qa"]
    class_names = None

    def __init__(
        self,
        tokenizer: Any,
        *,
        columns: Mapping[str, str],
        window: int | None = None,
        stride: int | None = None,
        max_answer_tokens: int = 30,
        null_threshold: float | None = 0.0,
        token_types: int = 0,
        padding: Padding = "right",
        num_embeddings: int | None = None,
    ) -> None:
        self.tokenizer = self.files = tokenizer
        self.max_length = window or _WINDOW
        self.padding = padding
        self._stride, self._max_tokens, self._threshold = stride, max_answer_tokens, null_threshold
        self._num_embeddings = num_embeddings
        self._questions = Questions(columns)
        self._windows = WindowTokenizer(tokenizer)
        self._reads_types = token_types >= self._windows.num_types

    @classmethod
    def make(cls, parts: TaskParts) -> ExtractiveQA:
        return cls(
            parts.reader,
            columns=parts.columns,
            window=parts.settings["data.max_length"],
            stride=parts.settings["data.stride"],
            max_answer_tokens=parts.settings["eval.max_answer_tokens"],
            null_threshold=parts.settings["eval.null_threshold"],
            token_types=parts.token_types,
            padding=parts.padding,
            num_embeddings=parts.num_embeddings,
        )

    @property
    def read_columns(self) -> set[str]:
        return self._questions.read_columns()

    @classmethod
    def blank_rows(cls, parts: TaskParts, rows: Rows, *, labelled: bool) -> dict[int, str]:
        questions = Questions(parts.columns)
        questions.require(rows, answers=labelled)
        blank = blank_values(rows, {parts.column(p): f"the {p} is empty" for p in ("question", "context")})
        if labelled:
            rest = (i for i in range(len(rows)) if i not in blank)
            blank |= {i: "there is no answer" for i in rest if questions.unanswered(rows.row(i))}
        return dict(sorted(blank.items()))

    def model_kwargs(self) -> dict[str, Any]:
        return {"num_labels": 2}  # start and end; the config of a classifier says its number of classes

    def encode(
        self, rows: Rows, *, max_length: int, too_long: str, training: bool, keep: bool = True, labelled: bool = True
    ) -> Encoded:
        """See ``base.Task``. ``max_length`` is that of a window; no row is too long."""
        self._questions.require(rows, answers=labelled)
        ledger = QuestionLedger(rows, self.tokenizer, max_length=max_length, withholds=self._threshold is not None)
        examples: list[Example] = []
        for first in range(0, len(rows), _ROWS):
            part = range(first, min(first + _ROWS, len(rows)))
            questions = [self._questions.read(rows.row(i), rows.where(i), labelled=labelled) for i in part]
            pairs = self._windows.pairs(questions)
            tokens = whole_rows(pairs, self._windows)
            ledger.add(first, tokens, tokens.lengths)
            for i, question, pair in zip(part, questions, pairs, strict=True):
                windows = self._windows_of(rows, i, pair, max_length)
                answered = sum(window.holds_answer for window in windows)
                ledger.add_windows(i, question, [len(w.ids) for w in windows], answered, labelled=labelled)
                if keep:
                    examples += (
                        self._example(w, i, number, question, pair, labelled) for number, w in enumerate(windows)
                    )
        return Encoded(examples, ledger)

    def _windows_of(self, rows: Rows, index: int, pair: Pair, max_length: int) -> list[Window]:
        where = self._questions.where(rows.row(index), rows.where(index))
        return list(self._windows.windows(pair, max_length=max_length, stride=self._stride, where=where))

    def _example(
        self, window: Window, row: int, number: int, question: Question, pair: Pair, labelled: bool
    ) -> Example:
        source = Source(
            question.context,
            pair.starts[window.context],
            pair.ends[window.context],
            window.first,
            window.null,
            question.answers if labelled else None,
        )
        label = np.array(window.label, dtype=np.int64) if labelled else None
        return Example(
            window.ids,
            row,
            2.0,
            label=label,
            extra={_ALLOWED: window.can_answer, _TYPES: window.types},
            scored=2,
            reference=source,
            part=number,
        )

    def preview(self, rows: Rows, index: int, *, max_length: int, labelled: bool = True) -> Preview:
        """The first window of the row with the answer, or the first one; the answer is what is trained."""
        row, where = rows.row(index), rows.where(index)
        labelled = labelled and not self._questions.unanswered(row)
        question = self._questions.read(row, where, labelled=labelled)
        (pair,) = self._windows.pairs([question])
        windows = self._windows_of(rows, index, pair, max_length)
        shown = next((window for window in windows if window.holds_answer), windows[0])
        trained = np.zeros(len(shown.ids), dtype=np.bool_)
        if shown.holds_answer:
            trained[shown.label[0] : shown.label[1] + 1] = True
        tokens = Tokens(
            ids=shown.ids,
            bounds=np.array([0, len(shown.ids)]),
            trained=trained,
            roles=shown.roles,
            role_names=ROLES,
            answer_rows=np.zeros(0, dtype=np.int64),
            answer_starts=np.zeros(0, dtype=np.int64),
            answer_ends=np.zeros(0, dtype=np.int64),
            answer_ended=np.zeros(0, dtype=np.bool_),
            answer_flaws=np.zeros(0, dtype="U9"),
            unwritten=(),
        )
        label = "no answer" if labelled and not question.answers else None
        return preview(where, tokens, self.tokenizer, max_length=len(shown.ids), label=label)

    def collate(self, examples: list[Example], device: Any) -> Batch:
        batch = collate(examples, pad_id=self.tokenizer.pad_token_id, device=device)
        allowed = batch.inputs.pop(_ALLOWED) != 0
        return replace(self._with_types(batch), allowed=allowed)

    def _with_types(self, batch: Batch) -> Batch:
        """The batch as the model reads it; it may be that of another model with the same tokens."""
        inputs = {name: value for name, value in batch.inputs.items() if name != _TYPES}
        if self._reads_types:
            types = torch.zeros_like(batch.input_ids)
            for i, example in enumerate(batch.examples):
                types[i, : len(example)] = torch.from_numpy(example.extra[_TYPES].astype(np.int64))
            inputs[_TYPES] = batch.inputs.get(_TYPES, types)
        return replace(batch, inputs=inputs)

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(self.outputs(model, batch)).sum()

    def probe(self, ids: np.ndarray) -> Example:
        window = self._windows.probe(ids)
        label = np.array([window.null, window.null], dtype=np.int64)
        extra = {_ALLOWED: window.can_answer, _TYPES: window.types}
        return Example(window.ids, 0, 2.0, label=label, extra=extra, scored=2)

    def losses(self, outputs: Outputs) -> Tensor:
        return cross_entropy(outputs)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        assert batch.allowed is not None
        inputs = self._with_types(batch).inputs
        logits = self._logits(model, {**inputs, _ALLOWED: batch.allowed})
        targets = None if batch.labels is None else batch.labels.flatten()
        return Outputs(logits.flatten(0, 1), [2] * len(logits), targets=targets)

    def _logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """[B, 2, window] logits of start and end."""
        mask = inputs.get("attention_mask")
        if self.padding != "none" or mask is None:
            return self._padded_logits(model, inputs)
        lengths = mask.sum(1)
        parts, order = [], []
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            own = {name: value[rows, :length] for name, value in inputs.items() if name != "attention_mask"}
            parts.append(self._padded_logits(model, own))
            order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort()]

    def _padded_logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        found = model(**{name: value for name, value in inputs.items() if name != _ALLOWED})
        logits = at_least_float32(torch.stack([found.start_logits, found.end_logits], 1))
        logits = logits.masked_fill(~inputs[_ALLOWED][:, None], -math.inf)
        return F.pad(logits, (0, self.max_length - logits.shape[-1]), value=-math.inf)

    def reference_outputs(self, model: nn.Module, examples: list[Example], device: Any) -> Outputs:
        groups = of_one_length(examples) if self.padding == "none" else [list(range(len(examples)))]
        rows: dict[int, Tensor] = {}
        for group in groups:
            own = [examples[i] for i in group]
            inputs = padded_inputs(own, pad_id=self.tokenizer.pad_token_id, device=device)
            if not self._reads_types:
                del inputs[_TYPES]
            found = model(**inputs)
            for i, example in enumerate(own):
                places = torch.from_numpy(example.extra[_ALLOWED].nonzero()[0]).to(device)
                for side, logits in enumerate((found.start_logits[i], found.end_logits[i])):
                    row = torch.full((self.max_length,), -math.inf, device=device, dtype=at_least_float32(logits).dtype)
                    rows[2 * group[i] + side] = row.index_put((places,), at_least_float32(logits)[places])
        labels = [e.label for e in examples]
        known = [label for label in labels if isinstance(label, np.ndarray)]
        targets = torch.from_numpy(np.concatenate(known)).to(device) if len(known) == len(labels) else None
        return Outputs(torch.stack([rows[i] for i in range(len(rows))]), [2] * len(examples), targets=targets)

    def score(self, model: nn.Module, batch: Batch) -> Columns:
        outputs = self.outputs(model, batch)
        sources = [e.reference for e in batch.examples]
        assert outputs.targets is not None
        found = [
            {
                "row": example.row,
                "text": span.text,
                "score": span.score,
                # What the score has to reach.
                "null_score": -math.inf if self._threshold is None else span.null_score - self._threshold,
            }
            for example, span in zip(batch.examples, self._spans(outputs, batch), strict=True)
        ]
        return {
            "nll_sum": float(F.cross_entropy(outputs.logits(), outputs.targets, reduction="sum")),
            "num_scored": len(outputs),
            "found_answers": found,
            "right_answers": [list(source.answers) for source in sources],
        }

    def _spans(self, outputs: Outputs, batch: Batch) -> list[Span]:
        logits = outputs.logits().unflatten(0, (-1, 2))
        return best_spans(logits, batch.examples, max_tokens=self._max_tokens)

    def row_from_text(self, text: str) -> dict[str, Any]:
        """The row of a question and its context, written as a JSON object. Raises: DataError for any other text."""
        names = [self._questions.column(part) for part in ("question", "context")]
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not set(names) <= row.keys():
            example = json.dumps(dict(zip(names, ("Who wrote it?", "Ann wrote it."), strict=True)))
            raise DataError(
                f"expected a question and its context as one JSON object, such as '{example}', or --file with the columns "
                f"{names[0]!r} and {names[1]!r}; found {text[:60]!r}"
            )
        return row

    def unusable(self, rows: Rows) -> dict[int, str]:
        self._questions.require(rows, answers=False)

        def read(part: Rows) -> None:
            questions = [self._questions.read(part.row(i), part.where(i), labelled=False) for i in range(len(part))]
            for i, pair in enumerate(self._windows.pairs(questions) if questions else ()):
                self._windows_of(part, i, pair, self.max_length)

        blank = blank_values(rows, {self._questions.column(p): f"the {p} is empty" for p in ("question", "context")})
        rest = [i for i in range(len(rows)) if i not in blank]
        problems = unusable_rows(rows.select(rest), read, column=None)
        return dict(sorted((blank | {rest[i]: problem for i, problem in problems.items()}).items()))

    def no_result(self) -> dict[str, Any]:
        return dict.fromkeys(("answer", "start", "end", "probability", "no_answer_probability"))

    @torch.no_grad()
    def predict(
        self, model: nn.Module, rows: Rows, *, batch_tokens: int, max_length: int, **_: Any
    ) -> Iterator[dict[str, Any]]:
        """Yields ``{"answer", "start", "end", "probability", "no_answer_probability"}`` per row: an empty answer without a place
        in the context if there is none. The probabilities are those in a window: the best one's, and the smallest of having no
        answer."""
        if not len(rows):
            return
        encoded = self.encode(rows, max_length=max_length, too_long="error", training=False, labelled=False)
        for example in encoded.examples:
            check_ids(self.tokenizer, example.ids, self._num_embeddings, rows.where(example.row))
        device = next(model.parameters()).device
        spans: dict[int, list[Span]] = {i: [] for i in range(len(rows))}
        for part in eval_batches(encoded.lengths, batch_tokens):
            batch = self.collate([encoded.examples[i] for i in part], device)
            for example, span in zip(batch.examples, self._spans(self.outputs(model, batch), batch), strict=True):
                spans[example.row].append(span)
        yield from (best_of_row(spans[i], self._threshold) for i in range(len(rows)))
