"""Sentence embeddings: a vector per text, learned from a teacher's vectors. ``embedding_sets`` has the rows of several texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.data import Ledger, Rows, check_ids, eval_batches, fit_lengths
from peftlab.errors import RecipeError
from peftlab.specs.task_spec import TaskSpec
from peftlab.specs.tasks import TASKS
from peftlab.tasks.base import Columns, Padding, TaskParts
from peftlab.tasks.batch import Batch, by_length, collate_texts, example_weights, of_one_length, padded_inputs
from peftlab.tasks.example import Encoded, Example
from peftlab.tasks.inputs import blank_values, cut_note, empty_role
from peftlab.tasks.outputs import Outputs, at_least_float32
from peftlab.tasks.preview import Preview, preview
from peftlab.tasks.texts import TextSets, cut, side_by_side

POOLINGS = ("mean", "cls", "last")


class Embedding:
    """See ``base.Task``.

    Attributes: roles: what the texts of a row are for the task.

    Args:
        columns: role -> column of its texts; default: the roles' own names.
        pooling: mean over the tokens of a text, its first (cls) or its last token.
        normalize: whether a vector is divided by its length.
        files: writes the tokenizer and its related files, with ``save_pretrained(folder)``.
    """

    spec: TaskSpec = TASKS["embedding"]
    roles: tuple[str, ...] = ("text",)
    class_names = None

    def __init__(
        self,
        tokenizer: Any,
        *,
        pooling: str,
        normalize: bool,
        columns: Mapping[str, str] | None = None,
        files: Any = None,
        max_length: int | None = None,
        padding: Padding = "right",
        num_embeddings: int | None = None,
    ) -> None:
        assert pooling in POOLINGS
        self.tokenizer, self.files, self.max_length = tokenizer, files or tokenizer, max_length
        self._pooling, self._normalize, self.padding = pooling, normalize, padding
        self._num_embeddings = num_embeddings
        self._texts = TextSets(tokenizer, {role: (columns or {}).get(role, role) for role in self.roles})

    @classmethod
    def make(cls, parts: TaskParts) -> Self:
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
            columns=parts.columns,
            files=files.writer(parts.reader, pooling=pooling),
            max_length=files.max_length,
            padding=parts.padding,
            num_embeddings=parts.num_embeddings,
            **cls._options(parts),
        )

    @classmethod
    def _options(cls, parts: TaskParts) -> dict[str, Any]:
        """Further arguments of the class."""
        return {}

    @property
    def read_columns(self) -> set[str]:
        return set(self._texts.columns)

    @classmethod
    def blank_rows(cls, parts: TaskParts, rows: Rows, *, labelled: bool) -> dict[int, str]:
        return blank_values(rows, {parts.column(role): empty_role(role) for role in cls.roles})

    def model_kwargs(self) -> dict[str, Any]:
        return {}

    def encode(
        self, rows: Rows, *, max_length: int, too_long: str, training: bool, keep: bool = True, labelled: bool = True
    ) -> Encoded:
        ledger = Ledger(rows, self.tokenizer, max_length=max_length, too_long=too_long, keep_last=True, style="texts")
        examples: list[Example] = []
        targets = self._targets(rows) if labelled else None
        for first, parts in self._texts.pieces(rows):
            lengths = [tokens.lengths for tokens in parts]
            fits = [fit_lengths(own, max_length=max_length, too_long=too_long) for own in lengths]
            used = np.all([kept > 0 for kept in fits], axis=0)  # a row with a text that is left out is left out
            long = np.any([own > max_length for own in lengths], axis=0)
            tokens = side_by_side(
                [cut(own, np.where(used, kept, own.lengths)) for own, kept in zip(parts, fits, strict=True)]
            )
            ledger.add(first, tokens, np.where(used, tokens.lengths, 0), long=long)
            for i in np.flatnonzero(used).tolist() if keep else ():
                label = None if targets is None else float(targets[first + i])
                sizes = tuple(int(kept[i]) for kept in fits)
                examples.append(self._example(tokens.ids[tokens.row(i)], first + i, sizes, label))
        return Encoded(examples, ledger)

    def _targets(self, rows: Rows) -> np.ndarray | None:
        """[N] the score of each row; None: rows have none. Raises: DataError."""
        return None

    def _example(self, ids: np.ndarray, row: int, sizes: tuple[int, ...], label: float | None = None) -> Example:
        count = len(sizes)
        return Example(ids, row, float(count), label=label, scored=count, sizes=sizes if count > 1 else ())

    def preview(self, rows: Rows, index: int, *, max_length: int, labelled: bool = True) -> Preview:
        targets = self._targets(rows.select([index])) if labelled else None
        segments: list[tuple[str, str, bool]] = []
        removed = 0
        for role, tokens in zip(self.roles, self._texts.row(rows, index), strict=True):
            own = preview(rows.where(index), tokens, self.tokenizer, max_length=max_length, keep_last=True)
            named = [(f"{role}: ", "tokenizer", False)] if len(self.roles) > 1 else []
            segments += [*([("\n", "tokenizer", False)] if segments else []), *named, *own.segments]
            removed += own.cut
        return Preview(rows.where(index), segments, None if targets is None else f"{targets[0]:g}", removed)

    def collate(self, examples: list[Example], device: Any) -> Batch:
        return collate_texts(examples, pad_id=self.tokenizer.pad_token_id, device=device)

    def probe(self, ids: np.ndarray) -> Example:
        count = len(self.roles)
        return self._example(np.tile(ids, count), 0, (len(ids),) * count)

    def losses(self, outputs: Outputs) -> Tensor:
        raise ValueError("texts have no labels, so the loss needs a teacher's vectors")

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        raise ValueError("texts have no labels, so the loss needs a teacher's vectors")

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        def call(inputs: Mapping[str, Tensor]) -> Tensor:
            return self._pooled(_own_tokens(model(**inputs).last_hidden_state, inputs), inputs)

        vectors = by_length(call, batch.inputs) if self.padding == "none" else call(batch.inputs)
        return self._outputs(vectors, batch.examples, batch.weights)

    def _pooled(self, hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """[B, H] one vector per row of ``hidden`` [B, T, H]."""
        mask = inputs.get("attention_mask")
        if self._pooling == "cls":
            return hidden[:, 0]
        if self._pooling == "mean":
            return hidden.mean(1) if mask is None else _masked_mean(hidden, mask)
        ends = torch.full_like(inputs["input_ids"][:, 0], hidden.shape[1]) if mask is None else mask.sum(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), ends - 1]

    def _outputs(self, vectors: Tensor, examples: Sequence[Example], weights: Tensor) -> Outputs:
        """Args: vectors: [N, H] of the texts of ``examples``. weights: [B] of the examples."""
        vectors = F.normalize(vectors, dim=-1) if self._normalize else vectors
        counts = [e.scored for e in examples]
        weights = (weights / torch.tensor(counts, device=weights.device)).repeat_interleave(
            torch.tensor(counts, device=weights.device)
        )
        return Outputs(vectors, counts, vectors=True, targets=self._compared(examples, vectors.device), weights=weights)

    def _compared(self, examples: Sequence[Example], device: Any) -> Tensor | None:
        """[N] what the loss compares the vectors with; None without labels."""
        return None

    def reference_outputs(self, model: nn.Module, examples: list[Example], device: Any) -> Outputs:
        """The vector of each text, computed on its own tokens only."""
        texts = [Example(ids, e.row, e.weight) for e in examples for ids in e.texts]
        groups = of_one_length(texts) if self.padding == "none" else [list(range(len(texts)))]
        hidden: dict[int, Tensor] = {}
        for group in groups:
            inputs = padded_inputs([texts[i] for i in group], pad_id=self.tokenizer.pad_token_id, device=device)
            hidden |= zip(group, _own_tokens(model(**inputs).last_hidden_state, inputs), strict=True)
        own = [hidden[i][: len(text)] for i, text in enumerate(texts)]
        pools: dict[str, Callable[[Tensor], Tensor]]
        pools = {"mean": lambda t: t.sum(0) / len(t), "cls": lambda t: t[0], "last": lambda t: t[-1]}
        vectors = torch.stack([pools[self._pooling](t) for t in own])
        return self._outputs(vectors, examples, example_weights(examples, device))

    def score(self, model: nn.Module, batch: Batch) -> Columns:
        """No columns: there are no labels."""
        return {}

    def row_from_text(self, text: str) -> dict[str, Any]:
        return {self._texts.columns[0]: text}

    def unusable(self, rows: Rows) -> dict[int, str]:
        return self._texts.unusable(rows)

    def no_result(self) -> dict[str, Any]:
        return {"vector": None}

    @torch.no_grad()
    def predict(
        self, model: nn.Module, rows: Rows, *, batch_tokens: int, max_length: int, **_: Any
    ) -> Iterator[dict[str, Any]]:
        """Yields ``{"vector": [H numbers]}`` per row, of its first text; with more texts the ``cosine`` of the first and the
        second too, and ``cosine_ROLE`` of the first and each other; longer texts are truncated."""
        texts = self._texts.present(rows)
        examples, lengths = list[Example](), list[int]()
        for first, parts in texts.pieces(rows):
            fits = [fit_lengths(own.lengths, max_length=max_length, too_long="truncate") for own in parts]
            tokens = side_by_side([cut(own, kept) for own, kept in zip(parts, fits, strict=True)])
            for i in range(len(tokens)):
                ids: np.ndarray = tokens.ids[tokens.row(i)]
                examples.append(self._example(ids, first + i, tuple(int(kept[i]) for kept in fits)))
                check_ids(self.tokenizer, ids, self._num_embeddings, rows.where(first + i))
            lengths += np.sum([own.lengths for own in parts], axis=0).tolist()
        device = next(model.parameters()).device
        results: dict[int, dict[str, Any]] = {}
        for part in eval_batches([len(e) for e in examples], batch_tokens):
            outputs = self.outputs(model, self.collate([examples[i] for i in part], device))
            for i, vectors in zip(part.tolist(), outputs.values.split(list(outputs.counts)), strict=True):
                results[i] = self._result(vectors, [t.roles[0] for t in texts.texts])
        yield from (results[i] | cut_note(lengths[i], len(examples[i])) for i in range(len(examples)))

    def _result(self, vectors: Tensor, roles: Sequence[str]) -> dict[str, Any]:
        """The result of ``predict`` for a row. Args: vectors: [K, H] of its texts, of these roles."""
        cosines = F.cosine_similarity(vectors[:1], vectors[1:], dim=-1).tolist()
        names = ["cosine", *(f"cosine_{role}" for role in roles[2:])]
        return {"vector": vectors[0].tolist(), **dict(zip(names, cosines, strict=False))}


def _own_tokens(hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """The states of the texts' own tokens: an adapter may put virtual tokens before them."""
    return at_least_float32(hidden[:, -inputs["input_ids"].shape[1] :])


def _masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """[B, H] mean of ``hidden`` [B, T, H] over the tokens in ``mask`` [B, T]."""
    seen = mask.to(hidden.dtype)[..., None]
    return (hidden * seen).sum(1) / seen.sum(1)
