"""Sequence to sequence: an encoder reads a source text and a decoder writes a target text, as in translation and summaries.

An example holds the tokens of the source, which are not trained, followed by those of the target, which all are. So lengths,
caches and the ledger count both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.data import Ledger, Rows, check_ids
from peftlab.specs.tasks import TASKS
from peftlab.tasks.base import Columns, Padding, TaskParts
from peftlab.tasks.batch import Batch, example_weights, padded_inputs
from peftlab.tasks.example import Encoded, Example
from peftlab.tasks.inputs import EMPTY_TEXT, blank_values, cut_note, unusable_rows
from peftlab.tasks.outputs import Outputs, cross_entropy
from peftlab.tasks.preview import Preview, preview
from peftlab.tasks.source_head import SourceHead
from peftlab.tasks.source_texts import EMPTY_TARGET, SourceTexts
from peftlab.tasks.source_writer import SourceWriter

# Positions scored at once: 256 x 49,152 float32 logits are 48 MiB.
_SCORE_CHUNK = 256
_NOT_SCORED = -100


class Seq2Seq:
    """See ``base.Task``.

    Args:
        texts: rows to tokens. head: the model's hidden states and head. decoder_start: see ``TaskParts``. beams,
            max_new_tokens: of the texts written in evaluation. num_embeddings: see ``TaskParts``.
    """

    spec = TASKS["seq2seq"]
    max_length = None
    class_names = None

    def __init__(
        self,
        texts: SourceTexts,
        head: SourceHead,
        *,
        decoder_start: int | None,
        end_ids: Sequence[int] = (),
        padding: Padding = "right",
        beams: int = 1,
        max_new_tokens: int = 64,
        num_embeddings: int | None = None,
    ) -> None:
        self.tokenizer = self.files = texts.tokenizer
        self.padding = padding
        self._texts, self._head, self._decoder_start = texts, head, decoder_start
        self._num_embeddings, self._max_new_tokens = num_embeddings, max_new_tokens
        self._stop_ids = {i for i in (texts.end_id, *end_ids) if i is not None}
        pad = texts.tokenizer.pad_token_id
        self.silent_ids = frozenset({*texts.tokenizer.all_special_ids, *self._stop_ids, pad})
        self._writer = SourceWriter(pad_id=pad, stop_ids=self._stop_ids, beams=beams, first=texts.first_of_target())

    @classmethod
    def make(cls, parts: TaskParts) -> Seq2Seq:
        return cls(
            SourceTexts.make(parts),
            SourceHead(parts.head_loss),
            decoder_start=parts.decoder_start,
            end_ids=parts.end_ids,
            padding=parts.padding,
            beams=parts.settings["eval.beams"],
            max_new_tokens=parts.settings["eval.max_new_tokens"],
            num_embeddings=parts.num_embeddings,
        )

    @property
    def read_columns(self) -> set[str]:
        return {self._texts.source, self._texts.target}

    @classmethod
    def blank_rows(cls, parts: TaskParts, rows: Rows, *, labelled: bool) -> dict[int, str]:
        target = {parts.column("target"): EMPTY_TARGET} if labelled else {}
        return blank_values(rows, {parts.column("source"): EMPTY_TEXT} | target)

    def model_kwargs(self) -> dict[str, Any]:
        return {}

    def encode(
        self, rows: Rows, *, max_length: int, too_long: str, training: bool, keep: bool = True, labelled: bool = True
    ) -> Encoded:
        ledger = self._ledger(rows, max_length=max_length, too_long=too_long)
        examples: list[Example] = []
        for first, sides in self._texts.pieces(rows):
            limits = sides.limits(max_length, self._texts.max_target_length)
            tokens, whole = sides.tokens(limits if too_long == "truncate" else None), np.ones(len(sides), dtype=bool)
            if too_long != "truncate":
                whole = np.all([lengths <= limit for _, limit, lengths in limits], axis=0)
            kept = np.where(whole, tokens.lengths, 0)
            ledger.add(first, tokens, kept, limits=limits)
            for i in np.flatnonzero(kept).tolist() if keep else ():
                span = tokens.row(i)
                example = Example(
                    tokens.ids[span],
                    first + i,
                    float(tokens.trained[span].sum()),
                    trained=tokens.trained[span],
                    reference=None if training else sides.target_texts[i],
                )
                examples.append(example)
        return Encoded(examples, ledger)

    def encode_answers(self, rows: Rows, answers: Sequence[np.ndarray], *, max_length: int) -> Encoded:
        """The rows with a model's ``answers``, as ``write_answers`` gives them, in place of their targets. Rows with an empty
        answer are left out. Sources are cut to ``max_length`` as the model read them."""
        ledger = self._ledger(rows, max_length=max_length, too_long="truncate")
        sides = self._texts.with_answers(rows, answers, self._stop_ids)
        limits = sides.limits(max_length, None)
        tokens = sides.tokens(limits)
        trained = tokens.num_trained(tokens.lengths)
        kept = np.where(trained > 0, tokens.lengths, 0)
        ledger.add(0, tokens, kept, limits=limits)
        spans = ((i, tokens.row(i)) for i in np.flatnonzero(kept).tolist())
        return Encoded(
            [Example(tokens.ids[s], i, float(trained[i]), trained=tokens.trained[s]) for i, s in spans], ledger
        )

    def _ledger(self, rows: Rows, *, max_length: int, too_long: str) -> Ledger:
        return Ledger(
            rows, self.tokenizer, max_length=max_length, too_long=too_long, style="pairs", stop_ids=self._stop_ids
        )

    def preview(self, rows: Rows, index: int, *, max_length: int, labelled: bool = True) -> Preview:
        sides = self._texts.sides(rows.select([index]))
        limits = sides.limits(max_length, self._texts.max_target_length)
        cut = sum(max(0, int(lengths[0]) - limit) for _, limit, lengths in limits)
        shown = preview(rows.where(index), sides.tokens(limits), self.tokenizer, max_length=2**31)
        return Preview(shown.where, shown.segments, cut=cut)

    def collate(self, examples: list[Example], device: Any) -> Batch:
        sources, targets = zip(*map(_sides, examples), strict=True)
        pad = self.tokenizer.pad_token_id
        ids, mask = _padded(sources, pad), _padded([np.ones(len(s), dtype=np.int64) for s in sources], 0)
        starts = [t[-1] if self._decoder_start is None else self._decoder_start for t in targets]
        before = [np.concatenate([[start], t[:-1]]) for start, t in zip(starts, targets, strict=True)]
        inputs = {"input_ids": ids, "decoder_input_ids": _padded(before, pad)}
        if not mask.all():
            inputs["attention_mask"] = mask
        return Batch(
            inputs={name: torch.as_tensor(array).to(device) for name, array in inputs.items()},
            weights=example_weights(examples, device),
            examples=tuple(examples),
            labels=torch.as_tensor(_padded(targets, _NOT_SCORED)).to(device),
        )

    def _selected(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The hidden states [N, H] that predict the tokens of the targets, and those tokens [N]."""
        assert batch.labels is not None
        chosen = batch.labels != _NOT_SCORED
        if self.padding != "none" or batch.attention_mask is None:
            hidden = self._head.hidden_states(model, batch.inputs, batch.labels)
            return hidden[chosen], batch.labels[chosen]
        # Each row alone: this family reads padding.
        parts = [self._selected(model, self.collate([e], batch.device))[0] for e in batch.examples]
        return torch.cat(parts), batch.labels[chosen]

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        hidden, targets = self._selected(model, batch)
        return self._head.cross_entropy_sum(model, hidden, targets)

    def probe(self, ids: np.ndarray) -> Example:
        """The first half is the source."""
        trained = np.arange(len(ids)) >= len(ids) // 2
        return Example(ids, 0, float(trained.sum()), trained=trained)

    def losses(self, outputs: Outputs) -> Tensor:
        return cross_entropy(outputs)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        hidden, targets = self._selected(model, batch)
        values, head = self._head.values(model, hidden)
        return Outputs(values, [e.num_scored for e in batch.examples], head=head, targets=targets)

    def reference_outputs(self, model: nn.Module, examples: list[Example], device: Any) -> Outputs:
        """By transformers' own shift of the labels."""
        groups = [[e] for e in examples] if self.padding == "none" else [examples]
        values, targets = [], []
        for group in groups:
            sources = [Example(e.ids[~_trained(e)], e.row, 1.0) for e in group]
            inputs = padded_inputs(sources, pad_id=self.tokenizer.pad_token_id, device=device)
            wanted = [torch.from_numpy(e.ids[_trained(e)].astype(np.int64)) for e in group]
            labels = nn.utils.rnn.pad_sequence(wanted, batch_first=True, padding_value=_NOT_SCORED).to(device)
            logits = model(**inputs, labels=labels, use_cache=False).logits[:, -labels.shape[1] :]
            for row, target in zip(logits, wanted, strict=True):
                values.append(row[: len(target)])
                targets.append(target.to(device))
        return Outputs(torch.cat(values), [len(t) for t in targets], targets=torch.cat(targets))

    def score(self, model: nn.Module, batch: Batch) -> Columns:
        hidden, targets = self._selected(model, batch)
        nll, hit = [], []
        for part, target in zip(hidden.split(_SCORE_CHUNK), targets.split(_SCORE_CHUNK), strict=True):
            logits = self._head.logits(model, part)
            nll.append(F.cross_entropy(logits, target, reduction="sum"))
            hit.append(logits.argmax(-1) == target)
        hits = torch.cat(hit)
        counts = [e.num_scored for e in batch.examples]
        return {
            "nll_sum": float(torch.stack(nll).sum()),
            "num_scored": len(targets),
            "num_tokens": len(targets),
            "num_correct": int(hits.sum()),
            "rows_right": [bool(row.all()) for row in hits.split(counts)],
            "rows": [True] * len(counts),
        }

    def score_answers(self, model: nn.Module, batch: Batch) -> Columns:
        sources = [_sides(e)[0] for e in batch.examples]
        written = dict(self._write(model, sources, max_new_tokens=self._max_new_tokens, batch_tokens=2**31))
        answers = [self.text_of(written[i]) for i in range(len(sources))]
        return {"answers": answers, "reference_texts": [e.reference for e in batch.examples]}

    def row_from_text(self, text: str) -> dict[str, Any]:
        return {self._texts.source: text}

    def unusable(self, rows: Rows) -> dict[int, str]:
        return unusable_rows(rows, self._sources, column=self._texts.source, key="data.columns.source")

    def no_result(self) -> dict[str, Any]:
        return {"text": None}

    @torch.no_grad()
    def predict(
        self, model: nn.Module, rows: Rows, *, batch_tokens: int, max_length: int, **sampling: Any
    ) -> Iterator[dict[str, Any]]:
        """Yields ``{"text"}`` per row, as ``generate``."""
        yield from self.generate(model, rows, batch_tokens=batch_tokens, max_length=max_length, **sampling)

    @torch.no_grad()
    def generate(
        self,
        model: nn.Module,
        rows: Rows,
        *,
        batch_tokens: int,
        max_length: int,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> Iterator[dict[str, Any]]:
        """Yields ``{"text": target}`` per row, with a search as wide as in evaluation, or drawn at a ``temperature``. A longer
        source is cut at its end, and ``note`` says so."""
        whole = self._sources(rows)
        sources = [self._texts.cut(ids, max_length) for ids in whole]
        written = self._write(
            model,
            sources,
            batch_tokens=batch_tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
        )
        texts = {i: self.text_of(ids).strip() for i, ids in written}
        for i, (before, after) in enumerate(zip(whole, sources, strict=True)):
            yield {"text": texts[i]} | cut_note(len(before), len(after))

    @torch.no_grad()
    def write_answers(
        self,
        model: nn.Module,
        rows: Rows,
        *,
        batch_tokens: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields ``(index, token ids)`` of the answer to each row, as they finish; see ``CausalLM.write_answers``."""
        sources = self._sources(rows)
        yield from self._write(
            model,
            sources,
            batch_tokens=batch_tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
        )

    def _write(self, model: nn.Module, sources: list[np.ndarray], **options: Any) -> Iterator[tuple[int, np.ndarray]]:
        return self._writer.write(model, sources, padded=self.padding != "none", **options)

    def prompt_lengths(self, rows: Rows) -> list[int]:
        return [len(ids) for ids in self._sources(rows)]

    def prompt_text(self, rows: Rows, index: int) -> str:
        return self._texts.source_text(rows.row(index), rows.where(index))

    def text_of(self, answer: np.ndarray) -> str:
        return str(self.tokenizer.decode([int(i) for i in answer if int(i) not in self.silent_ids]))

    def ends(self, answer: np.ndarray) -> bool:
        return len(answer) > 0 and int(answer[-1]) in self._stop_ids

    def answers_need(self, rows: Rows) -> None:
        """Nothing: each row has a source."""

    def _sources(self, rows: Rows) -> list[np.ndarray]:
        ids = self._texts.source_ids(rows)
        for i, row in enumerate(ids):
            check_ids(self.tokenizer, row.astype(np.int64), self._num_embeddings, rows.where(i))
        return ids


def _trained(example: Example) -> np.ndarray:
    assert example.trained is not None
    return example.trained


def _sides(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the source and of the target."""
    trained = _trained(example)
    split = int(trained.argmax())
    return example.ids[:split].astype(np.int64), example.ids[split:].astype(np.int64)


def _padded(rows: Sequence[np.ndarray], fill: int) -> np.ndarray:
    """[B, T] int64, padded on the right."""
    padded = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded
