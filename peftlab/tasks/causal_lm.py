"""Causal language modelling: plain text, prompt + completion, or chat, with the loss on the trained tokens only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.data import (
    Ledger,
    Rows,
    Tokens,
    answered,
    block_bounds,
    check_ids,
    eval_batches,
    fit_lengths,
    pieces,
    tokenize,
)
from peftlab.data.chat import Formatter
from peftlab.data.chat_template import Rendered
from peftlab.data.values import EmptyValueError, is_empty
from peftlab.errors import DataError, RecipeError
from peftlab.specs.tasks import TASKS
from peftlab.tasks.base import Columns, Padding, TaskParts
from peftlab.tasks.batch import Batch, collate, padded_inputs
from peftlab.tasks.choices import Choices
from peftlab.tasks.example import Encoded, Example, lengths_of, trained_of
from peftlab.tasks.generation import Generator, sampling_kwargs
from peftlab.tasks.inputs import EMPTY_TEXT, NO_LABEL, blank_values, unusable_rows
from peftlab.tasks.last_answer import last_answer
from peftlab.tasks.lm_head import LMHead
from peftlab.tasks.outputs import Outputs, cross_entropy
from peftlab.tasks.preview import Preview, preview

# Positions scored at once: 256 x 49,152 float32 logits are 48 MiB.
_SCORE_CHUNK = 256


class CausalLM:
    """See ``base.Task``.

    Args:
        formatter: rows to text and trained spans.
        head_loss: see ``LMHead``.
        choices: possible completions; every row then has a label, and ``score`` predicts by constrained decoding.
        max_new_tokens: of the texts written in evaluation. most_tokens: see ``TaskParts``.
        end_ids: tokens at which the model's generation config ends a text. num_embeddings: see ``TaskParts``.
    """

    spec = TASKS["causal_lm"]
    max_length = None
    padding: Padding = "right"

    def __init__(
        self,
        tokenizer: Any,
        formatter: Formatter,
        *,
        head_loss: Callable[..., Tensor | None],
        choices: Sequence[str] | None = None,
        end_ids: Sequence[int] = (),
        num_embeddings: int | None = None,
        max_new_tokens: int = 64,
        most_tokens: int = 2**31,
    ) -> None:
        self.tokenizer = self.files = tokenizer
        self._max_new_tokens = max_new_tokens
        self._room = max(1, most_tokens - max_new_tokens)
        self._num_embeddings = num_embeddings
        self.formatter = formatter
        self._choices = Choices(choices) if choices else None
        added = tokenizer.added_tokens_decoder
        special = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        # Another special token in an answer, such as a label, does not end it.
        ends_turn = formatter.chat_template.end_id() if formatter.style == "chat" else None
        self._stop_ids = {tokenizer.eos_token_id, ends_turn, *end_ids} - {None}
        self._special_ids = special
        self.silent_ids = frozenset(
            {*self._stop_ids, tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id} - {None}
        )
        self._generator = Generator(pad_id=tokenizer.pad_token_id, stop_ids=self._stop_ids)
        self._head = LMHead(head_loss)

    @classmethod
    def make(cls, parts: TaskParts) -> CausalLM:
        return cls(
            parts.reader,
            _formatter(parts),
            head_loss=parts.head_loss,
            choices=parts.classes,
            end_ids=parts.end_ids,
            num_embeddings=parts.num_embeddings,
            max_new_tokens=parts.settings["eval.max_new_tokens"],
            most_tokens=parts.most_tokens,
        )

    @classmethod
    def blank_rows(cls, parts: TaskParts, rows: Rows, *, labelled: bool) -> dict[int, str]:
        label = {parts.columns["label"]: NO_LABEL} if labelled and "label" in parts.columns else {}
        return dict(sorted((_unwritten(rows, _formatter(parts)) | blank_values(rows, label)).items()))

    @property
    def class_names(self) -> list[str] | None:
        return self._choices.names if self._choices else None

    @property
    def read_columns(self) -> set[str]:
        return self.formatter.read_columns

    def model_kwargs(self) -> dict[str, Any]:
        return {}

    def encode(
        self, rows: Rows, *, max_length: int, too_long: str, training: bool, keep: bool = True, labelled: bool = True
    ) -> Encoded:
        self.formatter.recognise(rows)
        if (splits := too_long == "split") and self.formatter.style != "text":
            raise RecipeError(
                "split cuts plain text into blocks, but these rows have a prompt and an answer, which belong together; use "
                "truncate or drop, or raise data.max_length",
                key="data.too_long",
            )
        ledger = self._ledger(rows, max_length=max_length, too_long=too_long)
        if self._choices and len(rows):
            self._encode_choices(self._choices, rows)
        examples: list[Example] = []
        for first, rendered in pieces(rows, self._render):
            tokens = self._tokenize(rendered)
            kept = fit_lengths(tokens.lengths, max_length=max_length, too_long=too_long)
            trained = tokens.num_trained(kept)
            # A truncated choice is no longer one of the choices.
            kept[(trained == 0) | (bool(self._choices) & (trained < tokens.num_trained(tokens.lengths)))] = 0
            labels = self._choices.labels(rows, first, tokens, kept, self.tokenizer) if self._choices else None
            made = list(_examples(first, tokens, kept, labels, size=max_length)) if keep or splits else []
            if not training and self.formatter.style != "text":
                made = [replace(e, reference=last_answer(tokens, e.row - first, len(e.ids))) for e in made]
            blocks = lengths_of(made), trained_of(made)
            ledger.add(first, tokens, kept, labels, examples=blocks if splits else None)
            if keep:
                examples += made
        return Encoded(examples, ledger)

    def _render(self, rows: Sequence[Mapping[str, Any]], wheres: Sequence[str]) -> list[Rendered]:
        try:
            return self.formatter.render_all(rows, wheres)
        except EmptyValueError as error:
            raise DataError(f"{error}; data.empty=drop leaves such rows out", key=error.key) from None

    def encode_answers(self, rows: Rows, answers: Sequence[np.ndarray], *, max_length: int) -> Encoded:
        """The rows with ``answers`` of the model in training, as ``write_answers`` gives them, in place of their own. The
        tokens are kept as written, because the model may find another tokenization of the same text unlikely.

        Rows with an empty answer are left out.
        """
        ledger = self._ledger(rows, max_length=max_length, too_long="error")
        tokens = answered(self._rows_prompt_ids(rows), answers, author="student", stop_ids=self._stop_ids)
        trained = tokens.num_trained(tokens.lengths)
        kept = np.where(trained > 0, tokens.lengths, 0)
        assert int(kept.max(initial=0)) <= max_length
        ledger.add(0, tokens, kept)
        return Encoded(list(_examples(0, tokens, kept, None, size=max_length)), ledger)

    def _ledger(self, rows: Rows, *, max_length: int, too_long: str) -> Ledger:
        return Ledger(
            rows,
            self.tokenizer,
            max_length=max_length,
            too_long=too_long,
            formatter=self.formatter,
            class_names=self.class_names,
            stop_ids=self._stop_ids,
        )

    def preview(self, rows: Rows, index: int, *, max_length: int, labelled: bool = True) -> Preview:
        rendered = self.formatter.render(rows.row(index), rows.where(index))
        return preview(rows.where(index), self._tokenize([rendered]), self.tokenizer, max_length=max_length)

    def _tokenize(self, rendered: list[Rendered]) -> Tokens:
        return tokenize(
            self.tokenizer,
            rendered,
            chat=self.formatter.style == "chat",
            stop_ids=self._stop_ids,
            special_ids=self._special_ids,
            control=self.formatter.control,
        )

    def _encode_choices(self, choices: Choices, rows: Rows) -> None:
        row, where = rows.row(0), rows.where(0)
        prompt = self._prompt_ids([self.formatter.render_prompt(row, where)])[0]
        choices.encode(prompt, self._tokenize([self.formatter.render_answer(row, where, c) for c in choices.names]))

    def _prompt_ids(self, prompts: Sequence[Rendered]) -> list[np.ndarray]:
        chat = self.formatter.style == "chat"
        encoded = self.formatter.control.encode(
            [prompt.text for prompt in prompts], [prompt.plain for prompt in prompts], add_special_tokens=not chat
        )
        ids = [np.asarray(row.ids, dtype=np.int32) for row in encoded]
        if not chat:  # some tokenizers end every text with eos, but a prompt continues
            eos = self.tokenizer.eos_token_id
            ids = [row[:-1] if len(row) > 1 and row[-1] == eos else row for row in ids]
        return ids

    def conversation_ids(self, messages: Sequence[Mapping[str, str]]) -> np.ndarray:
        """The tokens of a conversation up to where the model answers."""
        prompt = self.formatter.render_conversation(messages, "the conversation")
        return np.asarray(
            self.formatter.control.encode([prompt.text], [prompt.plain], add_special_tokens=False)[0].ids,
            dtype=np.int32,
        )

    def collate(self, examples: list[Example], device: Any) -> Batch:
        return collate(examples, pad_id=self.tokenizer.pad_token_id, device=device)

    def _selected(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The hidden states [N, H] that predict a trained token, and those tokens [N]."""
        hidden = self._head.hidden_states(model, batch.inputs)
        assert batch.trained is not None
        chosen = batch.trained[:, 1:]
        return hidden[:, :-1][chosen], batch.input_ids[:, 1:][chosen]

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        hidden, targets = self._selected(model, batch)
        return self._head.cross_entropy_sum(model, hidden, targets)

    def probe(self, ids: np.ndarray) -> Example:
        return Example(ids, 0, float(len(ids) - 1), trained=np.arange(len(ids)) > 0)

    def losses(self, outputs: Outputs) -> Tensor:
        return cross_entropy(outputs)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        hidden, targets = self._selected(model, batch)
        counts = [int(e.trained.sum()) for e in batch.examples if e.trained is not None]
        return Outputs(hidden, counts, head=self._head.output_head(model), targets=targets)

    def reference_outputs(self, model: nn.Module, examples: list[Example], device: Any) -> Outputs:
        inputs = padded_inputs(examples, pad_id=self.tokenizer.pad_token_id, device=device)
        # The rows' own tokens: an adapter may put virtual tokens before them.
        logits = model(**inputs, use_cache=False).logits[:, -inputs["input_ids"].shape[1] :]
        rows, before, targets = [], [], []
        for row, example in enumerate(examples):
            assert example.trained is not None
            for at in example.trained.nonzero()[0].tolist():
                rows.append(row)
                before.append(at - 1)
                targets.append(int(example.ids[at]))
        counts = [rows.count(row) for row in range(len(examples))]
        return Outputs(logits[rows, before], counts, targets=torch.tensor(targets, device=device))

    def score(self, model: nn.Module, batch: Batch) -> Columns:
        hidden, targets = self._selected(model, batch)
        nll, hit = [], []
        for part, target in zip(hidden.split(_SCORE_CHUNK), targets.split(_SCORE_CHUNK), strict=True):
            logits = self._head.logits(model, part)
            nll.append(F.cross_entropy(logits, target, reduction="sum"))
            hit.append(logits.argmax(-1) == target)
        hits = torch.cat(hit)
        assert batch.trained is not None
        row_of = batch.trained[:, 1:].nonzero()[:, 0]
        misses = torch.bincount(row_of[~hits], minlength=len(batch.input_ids))
        scores = {
            "nll_sum": float(torch.stack(nll).sum()),
            "num_scored": len(targets),
            "num_tokens": len(targets),
            "num_correct": int(hits.sum()),
            "rows_right": (misses == 0).tolist(),
            "rows": [True] * len(misses),
        }
        if self._choices:
            assert batch.labels is not None
            prefixes = [
                row[: int(mask.to(torch.uint8).argmax())]
                for row, mask in zip(batch.input_ids, batch.trained, strict=True)
            ]
            first = torch.cat([row_of.new_tensor([True]).bool(), row_of[1:] != row_of[:-1]])
            chosen = self._choices.choose(model, self._head, prefixes, self._head.logits(model, hidden[first]))
            scores["predictions"] = [index for index, _ in chosen]
            scores["references"] = batch.labels.tolist()
        return scores

    def row_from_text(self, text: str) -> dict[str, Any]:
        return self.formatter.prompt_row(text)

    def unusable(self, rows: Rows) -> dict[int, str]:
        style, column = self.formatter.style, self.formatter.prompt_column
        if style == "text":
            column = next(iter(self.formatter.prompt_row("")))
        problems = unusable_rows(rows, self._rows_prompt_ids, column=column, key=self.formatter.key)
        rest = [i for i in range(len(rows)) if i not in problems]
        lengths = self.prompt_lengths(rows.select(rest))
        return problems | {i: EMPTY_TEXT for i, length in zip(rest, lengths, strict=True) if not length}

    def no_result(self) -> dict[str, Any]:
        return {"label": None, "probability": None} if self._choices else {"text": None}

    @torch.no_grad()
    def predict(
        self, model: nn.Module, rows: Rows, *, batch_tokens: int, max_length: int, **sampling: Any
    ) -> Iterator[dict[str, Any]]:
        """Yields ``{"label", "probability"}`` per row with choices, otherwise ``{"text"}`` as ``generate``."""
        if not self._choices:
            yield from self.generate(model, rows, batch_tokens=batch_tokens, max_length=max_length, **sampling)
            return
        whole = self._rows_prompt_ids(rows)
        if not self._choices.encoded:
            self._encode_choices(self._choices, rows)
        results = self._predict_choices(model, self._choices, [row[-max_length:] for row in whole], batch_tokens)
        yield from (result | _cut(row, max_length) for row, result in zip(whole, results, strict=True))

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
        """Yields ``{"text": answer}`` per row, as free text even if the task has choices.

        Args: temperature: 0 decodes greedily. A prompt without room for the answer is truncated at its start, and ``note``
            says so.
        """
        sampling = sampling_kwargs(temperature, top_p)
        whole, room = self._rows_prompt_ids(rows), max(1, max_length - max_new_tokens)
        ids = [row[-room:] for row in whole]
        answers = self._generator.write(
            model, ids, batch_tokens=batch_tokens, max_new_tokens=max_new_tokens, sampling=sampling
        )
        results = {i: self.text_of(answer) for i, answer in answers}
        yield from ({"text": results[i].strip()} | _cut(row, room) for i, row in enumerate(whole))

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
        """Yields ``(index, token ids)`` of the answer to each row, as they finish. The last token can end an answer, unless
        the answer was truncated at ``max_new_tokens``. Tokens are drawn from the model's own distribution at that
        temperature, unless its generation_config sets something else.
        """
        # transformers' default is a top_k of 50
        sampling = sampling_kwargs(temperature, top_p) | ({"top_k": 0} if temperature else {})
        yield from self._generator.write(
            model,
            self._rows_prompt_ids(rows),
            batch_tokens=batch_tokens,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
        )

    def generation_kwargs(self, max_new_tokens: int, sampling: Mapping[str, Any]) -> dict[str, Any]:
        return self._generator.kwargs(max_new_tokens, sampling)

    def score_answers(self, model: nn.Module, batch: Batch) -> Columns:
        """Of a conversation the last answer; the others are part of its prompt."""
        turns = [example.reference for example in batch.examples]
        prompts = [e.ids[: turn.start][-self._room :] for e, turn in zip(batch.examples, turns, strict=True)]
        written = dict(
            self._generator.write(
                model,
                prompts,
                batch_tokens=2**31,
                max_new_tokens=self._max_new_tokens,
                sampling=sampling_kwargs(0.0, 1.0),
            )
        )
        return {
            "answers": [self.text_of(written[i]).strip() for i in range(len(prompts))],
            "reference_texts": [self.text_of(turn.answer).strip() for turn in turns],
        }

    def answers_need(self, rows: Rows) -> None:
        if self.formatter.style == "text":
            raise DataError(
                "a model can only answer prompts, but these rows are plain text: expected messages, prompt and completion, or "
                "a template",
                key=self.formatter.key,
            )

    def prompt_text(self, rows: Rows, index: int) -> str:
        return self.formatter.render_prompt(rows.row(index), rows.where(index)).text

    def prompt_lengths(self, rows: Rows) -> list[int]:
        """The number of tokens before the answer of each row."""
        return [len(ids) for ids in self._rows_prompt_ids(rows)]

    def text_of(self, answer: np.ndarray) -> str:
        """The text of an answer's tokens, without its end; other special tokens, such as labels, are part of it."""
        return str(self.tokenizer.decode([int(i) for i in answer if int(i) not in self.silent_ids]))

    def ends(self, answer: np.ndarray) -> bool:
        """Whether the last token of an answer can end it."""
        return len(answer) > 0 and int(answer[-1]) in self._stop_ids

    def _rows_prompt_ids(self, rows: Rows) -> list[np.ndarray]:
        self.formatter.recognise(rows, answer=False)
        ids = self._prompt_ids([self.formatter.render_prompt(rows.row(i), rows.where(i)) for i in range(len(rows))])
        for i, row in enumerate(ids):
            check_ids(self.tokenizer, row, self._num_embeddings, rows.where(i))
        return ids

    def _predict_choices(
        self, model: nn.Module, choices: Choices, ids: list[np.ndarray], batch_tokens: int
    ) -> Iterator[dict[str, Any]]:
        device = next(model.parameters()).device
        results: dict[int, dict[str, Any]] = {}
        for part in eval_batches([len(row) for row in ids], batch_tokens):
            batch = self.collate([Example(ids[i], int(i), 1.0) for i in part], device)
            hidden = self._head.hidden_states(model, batch.inputs)
            last = torch.tensor([len(ids[i]) - 1 for i in part], device=device)
            logits = self._head.logits(model, hidden[torch.arange(len(part), device=device), last])
            prefixes = [torch.as_tensor(ids[i], device=device, dtype=torch.int64) for i in part]
            for i, (choice, probability) in zip(part, choices.choose(model, self._head, prefixes, logits), strict=True):
                results[int(i)] = {"label": choices.names[choice], "probability": probability}
        yield from (results[i] for i in range(len(ids)))


def _formatter(parts: TaskParts) -> Formatter:
    return Formatter(
        parts.reader,
        columns={part: name for part, name in parts.columns.items() if part != "label"},
        template=parts.template,
        available=parts.available,
        sample=parts.sample,
        style=parts.style,
        control_tokens=parts.control_tokens,
    )


def _unwritten(rows: Rows, formatter: Formatter) -> dict[int, str]:
    """Why rows with nothing in a column cannot become text, by index."""
    read = [values for name, values in rows.columns.items() if name in formatter.read_columns]
    reasons: dict[int, str] = {}
    for i in sorted({i for values in read for i, value in enumerate(values) if is_empty(value)}):
        try:
            formatter.render(rows.row(i), rows.where(i))
        except EmptyValueError as error:
            reasons[i] = f"nothing in the column {error.column!r}"
    return reasons


def _cut(prompt: np.ndarray, room: int) -> dict[str, str]:
    """``{"note": ...}`` for a prompt that is longer than ``room`` tokens; else {}."""
    return {} if len(prompt) <= room else {"note": f"cut to the last {room:,} of {len(prompt):,} tokens of the prompt"}


def _examples(
    first: int, tokens: Tokens, kept: np.ndarray, labels: np.ndarray | None, *, size: int
) -> Iterator[Example]:
    """An example per row, or per block of ``size`` tokens of a longer one. A block begins with the last token of the block
    before it, which predicts its first trained token: every token but the first of a row is trained once."""
    for i in np.flatnonzero(kept).tolist():
        label = int(labels[i]) if labels is not None else None
        start = int(tokens.bounds[i])
        for block, (a, b) in enumerate(block_bounds(int(kept[i]), size, overlap=1)):
            trained = tokens.trained[start + a : start + b]
            if block:
                trained = trained.copy()
                trained[0] = False
            weight = float(trained.sum())
            if weight:
                ids = tokens.ids[start + a : start + b]
                yield Example(ids, first + i, weight, trained=trained, label=label, part=block)
