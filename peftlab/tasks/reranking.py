"""Reranking: how relevant a document is for a query, read together (a cross-encoder)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.data import Ledger, Rows, check_ids, eval_batches, fit_lengths, read_scores
from peftlab.specs.task_spec import TaskSpec
from peftlab.specs.tasks import TASKS
from peftlab.tasks.base import Columns, Padding, TaskParts
from peftlab.tasks.batch import (
    Batch,
    by_length,
    collate,
    example_weights,
    of_one_length,
    padded_inputs,
    stacked_labels,
)
from peftlab.tasks.classification import class_config
from peftlab.tasks.example import Encoded, Example
from peftlab.tasks.inputs import NO_SCORE, blank_values, cut_note, empty_role
from peftlab.tasks.outputs import Outputs, cross_entropy, weighted_sum
from peftlab.tasks.preview import Preview
from peftlab.tasks.retrieval import ranked_groups
from peftlab.tasks.texts import Texts

# A document is relevant from this score on.
_RELEVANT = 0.5


class Reranking:
    """See ``base.Task`` and ``base.Gathers``.

    The model has one output z per pair. The outputs are the logits [0, z] of the classes irrelevant and relevant, so that the
    cross-entropy with the score as the probability is the binary cross-entropy of z.

    Args: columns: role -> column. score_range: the lowest and the highest score of the data.
    """

    spec: TaskSpec = TASKS["reranking"]
    max_length = None

    def __init__(
        self,
        tokenizer: Any,
        *,
        columns: Mapping[str, str] | None = None,
        score_range: tuple[float, float] | None = None,
        padding: Padding = "right",
        num_embeddings: int | None = None,
        token_types: bool = False,
    ) -> None:
        self.tokenizer = self.files = tokenizer
        self.class_names = ["irrelevant", "relevant"]
        self.padding, self._num_embeddings = padding, num_embeddings
        self._query, document, self._score = ((columns or {}).get(r, r) for r in ("query", "document", "score"))
        self._texts = Texts(tokenizer, self._query, pair=document, types=token_types, roles=("query", "document"))
        self._score_range, self._types = score_range, token_types

    @classmethod
    def make(cls, parts: TaskParts) -> Reranking:
        return cls(
            parts.reader,
            columns=parts.columns,
            score_range=parts.settings["data.score_range"],
            padding=parts.padding,
            num_embeddings=parts.num_embeddings,
            token_types=parts.token_types > 1,
        )

    @property
    def read_columns(self) -> set[str]:
        return {*self._texts.columns, self._score}

    @classmethod
    def blank_rows(cls, parts: TaskParts, rows: Rows, *, labelled: bool) -> dict[int, str]:
        texts = {parts.column(role): empty_role(role) for role in ("query", "document")}
        return blank_values(rows, texts | ({parts.column("score"): NO_SCORE} if labelled else {}))

    def model_kwargs(self) -> dict[str, Any]:
        return class_config(["relevant"])

    def encode(
        self, rows: Rows, *, max_length: int, too_long: str, training: bool, keep: bool = True, labelled: bool = True
    ) -> Encoded:
        scores = read_scores(rows, self._score, scale=self._score_range) if labelled else None
        classes = None if scores is None else (scores >= _RELEVANT).astype(np.int64)
        ledger = Ledger(rows, self.tokenizer, max_length=max_length, too_long=too_long, class_names=self.class_names)
        examples: list[Example] = []
        for first, tokens in self._texts.pieces(rows):
            kept = fit_lengths(tokens.lengths, max_length=max_length, too_long=too_long)
            ledger.add(first, tokens, kept, None if classes is None else classes[first : first + len(tokens)])
            for i, ids, extra in self._texts.fitted(tokens, kept) if keep else ():
                label, row = None if scores is None else float(scores[first + i]), first + i
                query = _key(str(rows.columns[self._query][row]))
                examples.append(Example(ids, row, 1.0, label=label, extra=extra, reference=query))
        return Encoded(examples, ledger)

    def preview(self, rows: Rows, index: int, *, max_length: int, labelled: bool = True) -> Preview:
        one = rows.select([index])
        score = read_scores(one, self._score, scale=self._score_range)[0] if labelled else None
        tokens = self._texts.row(rows, index)
        (use,) = [self._texts.used(tokens, np.minimum(tokens.lengths, max_length))]
        segments = [
            (self.tokenizer.decode(tokens.ids[use & (tokens.roles == 1 + i)]), role, False)
            for i, role in enumerate(self._texts.roles)
        ]
        named = [
            part
            for role, own in zip(self._texts.roles, segments, strict=True)
            for part in ((f"\n{role}: ", "tokenizer", False), own)
        ]
        named[0] = (named[0][0].lstrip(), *named[0][1:])
        return Preview(rows.where(index), named, None if score is None else f"{score:g}", int((~use).sum()))

    def collate(self, examples: list[Example], device: Any) -> Batch:
        return collate(examples, pad_id=self.tokenizer.pad_token_id, device=device, left=self.padding == "left")

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return weighted_sum(self.losses(self.outputs(model, batch)), batch.weights)

    def probe(self, ids: np.ndarray) -> Example:
        extra = {"token_type_ids": np.zeros(len(ids), dtype=np.int32)} if self._types else {}
        return Example(ids, 0, 1.0, label=1.0, extra=extra)

    def losses(self, outputs: Outputs) -> Tensor:
        return cross_entropy(outputs)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        def call(inputs: Mapping[str, Tensor]) -> Tensor:
            logits: Tensor = model(**inputs).logits
            return logits

        logits = by_length(call, batch.inputs) if self.padding == "none" else call(batch.inputs)
        return _outputs(logits, batch.labels, batch.weights)

    def reference_outputs(self, model: nn.Module, examples: list[Example], device: Any) -> Outputs:
        options = {"pad_id": self.tokenizer.pad_token_id, "device": device, "left": self.padding == "left"}
        groups = of_one_length(examples) if self.padding == "none" else [list(range(len(examples)))]
        logits = torch.cat([model(**padded_inputs([examples[i] for i in g], **options)).logits for g in groups])
        logits = logits[np.argsort(np.concatenate(groups))]
        return _outputs(logits, stacked_labels(examples, device), example_weights(examples, device))

    def score(self, model: nn.Module, batch: Batch) -> Columns:
        """The figures of each row, for ``gathered``."""
        outputs = self.outputs(model, batch)
        assert batch.labels is not None
        return {
            "nll_sum": float(self.losses(outputs).sum()),
            "logits": outputs.logits()[:, 1].tolist(),
            "scores": batch.labels.double().tolist(),
            "queries": [e.reference for e in batch.examples],
        }

    def gathered(self, parts: Sequence[Mapping[str, Any]]) -> Columns:
        logits, scores, queries = (
            [value for part in parts for value in part[name]] for name in ("logits", "scores", "queries")
        )
        return {
            "nll_sum": [part["nll_sum"] for part in parts],
            "num_scored": [len(part["logits"]) for part in parts],
            "predictions": [int(z > 0) for z in logits],
            "references": [int(score >= _RELEVANT) for score in scores],
            **ranked_groups(queries, logits, scores, relevant=_RELEVANT),
        }

    def row_from_text(self, text: str) -> dict[str, Any]:
        return self._texts.row_from_text(text)

    def unusable(self, rows: Rows) -> dict[int, str]:
        return self._texts.unusable(rows)

    def no_result(self) -> dict[str, Any]:
        return {"score": None, "rank": None}

    @torch.no_grad()
    def predict(
        self, model: nn.Module, rows: Rows, *, batch_tokens: int, max_length: int, **_: Any
    ) -> Iterator[dict[str, Any]]:
        """Yields ``{"score": 0..1, "rank": 1 for the best document of its query}`` per row; longer pairs are truncated."""
        encoded = self.encode(rows, max_length=max_length, too_long="truncate", training=False, labelled=False)
        examples, lengths = encoded.examples, encoded.ledger.row_lengths.tolist()
        for example in examples:
            check_ids(self.tokenizer, example.ids, self._num_embeddings, rows.where(example.row))
        device, scores = next(model.parameters()).device, np.zeros(len(examples))
        for part in eval_batches([len(e) for e in examples], batch_tokens):
            outputs = self.outputs(model, self.collate([examples[i] for i in part], device))
            scores[part] = outputs.logits().softmax(-1)[:, 1].double().cpu().numpy()
        queries = np.array([e.reference for e in examples], dtype=np.int64)
        for i, example in enumerate(examples):
            better = int((scores[queries == queries[i]] > scores[i]).sum())
            yield {"score": float(scores[i]), "rank": 1 + better} | cut_note(lengths[i], len(example))


def _outputs(logits: Tensor, scores: Tensor | None, weights: Tensor) -> Outputs:
    """Args: logits: [B, 1]. scores: [B] from 0 to 1; None without labels."""
    both = torch.cat([torch.zeros_like(logits), logits], dim=-1)
    if scores is None:
        return Outputs(both, [1] * len(both), weights=weights)
    soft = torch.stack([1 - scores, scores], dim=-1)
    targets = (scores >= _RELEVANT).long()
    return Outputs(both, [1] * len(both), targets=targets, soft=soft, weights=weights)


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
