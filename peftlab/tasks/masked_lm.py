"""Masked language modelling: an encoder fills in masked tokens of plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.data import Ledger, Rows, Tokens, block_bounds, check_ids, eval_batches, fit_lengths
from peftlab.errors import RecipeError
from peftlab.specs.tasks import TASKS
from peftlab.tasks.base import Columns, Padding, TaskParts
from peftlab.tasks.batch import Batch, collate, of_one_length, padded_inputs
from peftlab.tasks.example import Encoded, Example, lengths_of, trained_of
from peftlab.tasks.inputs import EMPTY_TEXT, blank_values, cut_note
from peftlab.tasks.masked_head import MaskedHead
from peftlab.tasks.masks import Masker
from peftlab.tasks.outputs import OutputHead, Outputs, cross_entropy
from peftlab.tasks.preview import Preview, preview
from peftlab.tasks.texts import Texts

# Positions scored at once: 256 x 30,522 float32 logits are 30 MiB.
_SCORE_CHUNK = 256
# Tokens that ``predict`` gives for each mask.
_MOST_LIKELY = 5


class MaskedLM:
    """See ``base.Task``. An example holds the masked tokens in ``ids``, the masked positions in ``trained`` and the original
    tokens in ``label``; without a label (``probe``, a witness) its ids are the original ones."""

    spec = TASKS["masked_lm"]
    max_length = None
    class_names = None

    def __init__(
        self,
        tokenizer: Any,
        *,
        text_column: str = "text",
        mask_share: float = 0.15,
        padding: Padding = "right",
        num_embeddings: int | None = None,
        head_loss: Callable[..., Tensor | None] = lambda *_, **__: None,
    ) -> None:
        self.tokenizer = self.files = tokenizer
        self.padding, self._num_embeddings = padding, num_embeddings
        self._texts = Texts(tokenizer, text_column)
        self._masker = Masker(tokenizer, mask_share, num_embeddings)
        self._head = MaskedHead(head_loss)

    @classmethod
    def make(cls, parts: TaskParts) -> MaskedLM:
        return cls(
            parts.reader,
            text_column=parts.column("text"),
            mask_share=parts.settings["train.mask_share"],
            padding=parts.padding,
            num_embeddings=parts.num_embeddings,
            head_loss=parts.head_loss,
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
        """Its masks are fixed: they follow from the text, so that evaluation repeats; ``redraw`` replaces them in training."""
        ledger = Ledger(
            rows,
            self.tokenizer,
            max_length=max_length,
            too_long=too_long,
            keep_last=True,
            style="texts",
            trains_tokens=True,
        )
        examples: list[Example] = []
        for first, tokens in self._texts.pieces(rows):
            kept = fit_lengths(tokens.lengths, max_length=max_length, too_long=too_long)
            trained = np.zeros(len(tokens.ids), dtype=bool)
            made: list[Example] = []
            for i in np.flatnonzero(kept).tolist():
                before = len(made)
                for block, span in enumerate(_spans(tokens, i, max_length, split=too_long == "split")):
                    masked = self._masker.fixed(tokens.ids[span])
                    if masked is not None:
                        ids, chosen = masked
                        trained[span[chosen]] = True
                        made.append(_example(ids, chosen, tokens.ids[span], row=first + i, block=block))
                if len(made) == before:
                    kept[i] = 0
            ledger.add(first, replace(tokens, trained=trained), kept, examples=(lengths_of(made), trained_of(made)))
            if keep:
                examples += made
        return Encoded(examples, ledger)

    def redraw(self, example: Example, rng: np.random.Generator) -> Example:
        """``example`` with fresh masks. Their number is the same: it follows from the length."""
        original = example.ids if example.label is None else np.asarray(example.label)
        masked = self._masker.draw(original, rng)
        assert masked is not None
        return _example(*masked, original, row=example.row, block=example.part)

    def preview(self, rows: Rows, index: int, *, max_length: int, labelled: bool = True) -> Preview:
        tokens = self._texts.row(rows, index)
        span = next(iter(_spans(tokens, 0, max_length, split=False)))
        trained = np.zeros(len(tokens.ids), dtype=bool)
        masked = self._masker.fixed(tokens.ids[span])
        if masked is not None:
            trained[span[masked[1]]] = True
        return preview(
            rows.where(index),
            replace(tokens, trained=trained),
            self.tokenizer,
            max_length=max_length,
            keep_last=True,
        )

    def collate(self, examples: list[Example], device: Any) -> Batch:
        return collate(examples, pad_id=self.tokenizer.pad_token_id, device=device)

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._head.cross_entropy_sum(self.outputs(model, batch))

    def probe(self, ids: np.ndarray) -> Example:
        return Example(ids, 0, float(len(ids)), trained=np.ones(len(ids), dtype=bool))

    def losses(self, outputs: Outputs) -> Tensor:
        return cross_entropy(outputs)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        assert batch.trained is not None
        values, head = self._values(model, batch.inputs, batch.trained)
        original = batch.input_ids if batch.labels is None else batch.labels
        counts = batch.trained.sum(1).tolist()
        return Outputs(values, counts, head=head, targets=original[batch.trained])

    def _values(self, model: nn.Module, inputs: dict[str, Tensor], chosen: Tensor) -> tuple[Tensor, OutputHead | None]:
        """``MaskedHead.at``; rows of different length separately if the family reads padding."""
        mask = inputs.get("attention_mask")
        if self.padding != "none" or mask is None:
            return self._head.at(model, inputs, chosen)
        lengths, head = mask.sum(1), None
        parts: dict[int, Tensor] = {}
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            trimmed = {name: value[rows, :length] for name, value in inputs.items() if name != "attention_mask"}
            values, head = self._head.at(model, trimmed, chosen[rows, :length])
            parts |= zip(rows.tolist(), values.split(chosen[rows].sum(1).tolist()), strict=True)
        return torch.cat([parts[row] for row in sorted(parts)]), head

    def reference_outputs(self, model: nn.Module, examples: list[Example], device: Any) -> Outputs:
        groups = of_one_length(examples) if self.padding == "none" else [list(range(len(examples)))]
        found: dict[int, Tensor] = {}
        for group in groups:
            inputs = padded_inputs([examples[i] for i in group], pad_id=self.tokenizer.pad_token_id, device=device)
            # The rows' own tokens: an adapter may put virtual tokens before them.
            logits = model(**inputs).logits[:, -inputs["input_ids"].shape[1] :]
            for row, i in enumerate(group):
                trained = examples[i].trained
                assert trained is not None
                found[i] = logits[row, trained.nonzero()[0].tolist()]
        targets = [
            int(token)
            for e in examples
            if e.trained is not None
            for token in (e.ids if e.label is None else np.asarray(e.label))[e.trained]
        ]
        return Outputs(
            torch.cat([found[i] for i in range(len(examples))]),
            [len(found[i]) for i in range(len(examples))],
            targets=torch.tensor(targets, device=device),
        )

    def score(self, model: nn.Module, batch: Batch) -> Columns:
        outputs = self.outputs(model, batch)
        assert outputs.targets is not None
        nll, hits = torch.zeros((), dtype=torch.float64), 0
        for start in range(0, len(outputs), _SCORE_CHUNK):
            part = slice(start, start + _SCORE_CHUNK)
            logits, targets = outputs.logits(part), outputs.targets[part]
            nll += F.cross_entropy(logits, targets, reduction="sum").double().cpu()
            hits += int((logits.argmax(-1) == targets).sum())
        count = len(outputs)
        return {"nll_sum": float(nll), "num_scored": count, "num_tokens": count, "num_correct": hits}

    def row_from_text(self, text: str) -> dict[str, Any]:
        return {self._texts.column: text}

    def unusable(self, rows: Rows) -> dict[int, str]:
        rows = self._with_mask_token(rows)
        problems = self._texts.unusable(rows)
        texts = rows.column(self._texts.column)
        mask = self.tokenizer.mask_token
        spellings = mask if mask == "[MASK]" else f"{mask} or [MASK]"
        none = f"the text has no {spellings}, which says what to fill in"
        return problems | {i: none for i, text in enumerate(texts) if i not in problems and mask not in str(text)}

    def no_result(self) -> dict[str, Any]:
        return {"text": None, "masks": None}

    @torch.no_grad()
    def predict(
        self, model: nn.Module, rows: Rows, *, batch_tokens: int, max_length: int, **_: Any
    ) -> Iterator[dict[str, Any]]:
        """Yields ``{"text", "masks"}`` per row: the text with the most likely token in each mask, and for each mask the most
        likely tokens as ``{"token", "probability"}``. Longer texts are truncated."""
        rows = self._with_mask_token(rows)
        examples: list[Example] = []
        notes: list[dict[str, str]] = []
        for first, tokens in self._texts.pieces(rows):
            for i, length in enumerate(tokens.lengths.tolist()):
                ids = tokens.ids[next(iter(_spans(tokens, i, max_length, split=False)))]
                check_ids(self.tokenizer, ids, self._num_embeddings, rows.where(first + i))
                examples.append(Example(ids, first + i, 1.0, trained=ids == self.tokenizer.mask_token_id))
                notes.append(cut_note(length, len(ids)))
        device = next(model.parameters()).device
        found: dict[int, list[list[dict[str, Any]]]] = {}
        for part in eval_batches([len(e) for e in examples], batch_tokens):
            outputs = self.outputs(model, self.collate([examples[i] for i in part], device))
            top = [
                outputs.logits(slice(s, s + _SCORE_CHUNK)).softmax(-1).topk(_MOST_LIKELY)
                for s in range(0, len(outputs), _SCORE_CHUNK)
            ]
            filled = [
                [{"token": self._word(token), "probability": p} for p, token in zip(probs, ids, strict=True)]
                for pair in top
                for probs, ids in zip(pair.values.tolist(), pair.indices.tolist(), strict=True)
            ]
            for i, count in zip(part.tolist(), outputs.counts, strict=True):
                found[i], filled = filled[:count], filled[count:]
        texts = rows.column(self._texts.column)
        for i in range(len(examples)):
            yield {"text": self._filled(str(texts[i]), found[i]), "masks": found[i]} | notes[i]

    def _word(self, token: int) -> str:
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False)).strip()

    def _filled(self, text: str, masks: list[list[dict[str, Any]]]) -> str:
        """``text`` with the first of the tokens in each mask; a piece of a word joins the word before it."""
        for tokens in masks:
            before, mask, after = text.partition(self.tokenizer.mask_token)
            word = str(tokens[0]["token"])
            joined = before.rstrip() + word[2:] if word.startswith("##") else before + word
            text = joined + after if mask else text
        return text

    def _with_mask_token(self, rows: Rows) -> Rows:
        """The rows with the tokenizer's own mask token in place of the spellings that people use."""
        own = self.tokenizer.mask_token

        def spelt(text: Any) -> Any:
            if not isinstance(text, str) or own in text:
                return text
            return text.replace("[MASK]", own).replace("<mask>", own)

        texts = [spelt(text) for text in rows.column(self._texts.column)]
        return replace(rows, columns={**rows.columns, self._texts.column: texts})


def _example(ids: np.ndarray, chosen: np.ndarray, original: np.ndarray, *, row: int, block: int) -> Example:
    trained = np.zeros(len(ids), dtype=bool)
    trained[chosen] = True
    return Example(ids, row, float(len(chosen)), trained=trained, label=original, part=block)


def _spans(tokens: Tokens, row: int, max_length: int, *, split: bool) -> Iterator[np.ndarray]:
    """The tokens of each example of a row, as indices into ``tokens.ids``: the whole row, or at most ``max_length`` of its
    tokens, or consecutive blocks that together have all of it. Each has the tokens that the tokenizer adds at both ends.

    Raises: RecipeError if nothing has room beside these.
    """
    start, end = int(tokens.bounds[row]), int(tokens.bounds[row + 1])
    every = np.arange(start, end)
    if len(every) <= max_length:
        yield every
        return
    written = np.flatnonzero(tokens.roles[start:end])  # not by the tokenizer
    first, last = (start + int(written[0]), start + int(written[-1]) + 1) if len(written) else (start, end)
    size = max_length - (first - start) - (end - last)
    if size < 1:
        raise RecipeError(
            f"data.max_length ({max_length}) has no room for text beside the tokens that the tokenizer adds",
            key="data.max_length",
        )
    for a, b in block_bounds(last - first, size) if split else [(0, size)]:
        yield np.concatenate([np.arange(start, first), np.arange(first + a, first + b), np.arange(last, end)])
