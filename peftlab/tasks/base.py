"""What a task is: rows become examples, examples become padded batches, batches become a loss or scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.data import Image, Ledger, Rows, Tokens


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded row.

    Attributes:
        ids: [T] int32 token ids; none of an image.
        row: index into the ``Rows`` it came from, for messages.
        weight: its share of the step's normaliser: trained tokens (causal_lm) or class weight (seq_cls).
        trained: [T] bool, tokens whose prediction is trained; None for classification.
        label: class index; None for language modelling without choices, and for a row without a label.
        image: what is looked at instead of tokens, read when a batch is made of it.
    """

    ids: np.ndarray
    row: int
    weight: float
    trained: np.ndarray | None = None
    label: int | None = None
    image: Image | None = None

    def __len__(self) -> int:
        return len(self.ids) if self.image is None else self.image.length


@dataclass(frozen=True)
class Encoded:
    """Examples of one data set, and the account of all its rows."""

    examples: list[Example]
    ledger: Ledger

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(e) for e in self.examples], dtype=np.int64)


@dataclass(frozen=True)
class Preview:
    """One row as it is trained.

    Attributes:
        segments: ``(text, role, trained)`` of neighbouring tokens that share both. label: of a classification row.
        cut: tokens that truncation takes off its end.
    """

    where: str
    segments: list[tuple[str, str, bool]]
    label: str | None = None
    cut: int = 0


def preview(
    where: str, tokens: Tokens, tokenizer: Any, *, max_length: int, label: str | None = None, keep_last: bool = False
) -> Preview:
    """The preview of the only row of ``tokens``; see ``Ledger`` for ``keep_last``."""
    here = np.arange(min(max_length, len(tokens.ids)))
    if keep_last:
        here[-1] = len(tokens.ids) - 1
    ids, trained, roles = tokens.ids[here], tokens.trained[here], tokens.roles[here]
    changes = np.flatnonzero((np.diff(trained.astype(np.int8)) != 0) | (np.diff(roles) != 0)) + 1
    segments, shown = [], ""
    for part in np.split(np.arange(len(ids)), changes):
        if len(part):
            # As the end of all that came before: decoded alone, a token may lose the space in front of it.
            text = tokenizer.decode(ids[: part[-1] + 1], clean_up_tokenization_spaces=False)
            segments.append((text[len(shown) :], tokens.role_names[roles[part[0]]], bool(trained[part[0]])))
            shown = text
    return Preview(where, segments, label, len(tokens.ids) - len(ids))


@dataclass(frozen=True)
class Batch:
    """Tensors of a micro-batch, padded or packed.

    ``attention_mask`` is None when no row is padded (attention then runs unmasked). Packed documents are one row, B = 1;
    transformers keeps them apart by their position ids, if there is neither a mask nor a cache.

    Attributes:
        input_ids: [B, T] int64, padded on the right; [B, 0] of images. attention_mask: [B, T] int64 or None.
        trained: [B, T] bool or None. labels: [B] int64 or None. weights: [B] float64 class weights, as the divisor of
            the step sums them.
        position_ids: [1, T] int64, from 0 for each packed document; None: not packed.
        examples: what it was made of, in order.
        pixel_values: [B, C, H, W] of images; None: texts.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    trained: Tensor | None
    labels: Tensor | None
    weights: Tensor
    position_ids: Tensor | None = None
    examples: tuple[Example, ...] = ()
    pixel_values: Tensor | None = None

    @property
    def model_inputs(self) -> dict[str, Tensor]:
        if self.pixel_values is not None:
            return {"pixel_values": self.pixel_values}
        inputs = {"input_ids": self.input_ids}
        if self.attention_mask is not None:
            inputs["attention_mask"] = self.attention_mask
        if self.position_ids is not None:
            inputs["position_ids"] = self.position_ids
        return inputs


def collate(examples: Sequence[Example], *, pad_id: int, device: Any) -> Batch:
    """Pads ``examples`` on the right to the longest of them."""
    longest = max(len(e) for e in examples)
    ids = np.full((len(examples), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(examples), longest), dtype=np.int64)
    trained = np.zeros((len(examples), longest), dtype=bool)
    for i, example in enumerate(examples):
        ids[i, : len(example)] = example.ids
        mask[i, : len(example)] = 1
        if example.trained is not None:
            trained[i, : len(example)] = example.trained

    def tensor(array: Any) -> Tensor:
        return torch.as_tensor(array).to(device)

    labels = [e.label for e in examples]
    return Batch(
        input_ids=tensor(ids),
        attention_mask=None if mask.all() else tensor(mask),
        trained=tensor(trained) if examples[0].trained is not None else None,
        labels=tensor(np.array(labels, dtype=np.int64)) if all(label is not None for label in labels) else None,
        weights=tensor(np.array([e.weight for e in examples], dtype=np.float64)),
        examples=tuple(examples),
    )


def collate_packed(examples: Sequence[Example], *, device: Any) -> Batch:
    """``examples`` one after the other as one row: a language model's documents, whose first token is never trained,
    so that none predicts the start of the next."""
    trained = []
    for example in examples:
        assert example.trained is not None and not example.trained[0]
        trained.append(example.trained)

    def row(parts: list[np.ndarray]) -> Tensor:
        return torch.as_tensor(np.concatenate(parts)[None]).to(device)

    return Batch(
        input_ids=row([e.ids.astype(np.int64) for e in examples]),
        attention_mask=None,
        trained=row(trained),
        labels=None,
        weights=torch.tensor([e.weight for e in examples], dtype=torch.float64).to(device),
        position_ids=row([np.arange(len(e), dtype=np.int64) for e in examples]),
        examples=tuple(examples),
    )


def at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def padded_inputs(examples: Sequence[Example], *, pad_id: int, device: Any) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` [B, T] by transformers' conventions, row by row."""
    longest = max(len(e) for e in examples)
    ids = torch.full((len(examples), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = torch.from_numpy(example.ids.astype(np.int64))
        mask[row, : len(example)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@dataclass(frozen=True)
class OutputHead:
    """The layer that turns hidden states into logits, ``cap(scale * module(h))``; softcap: None without a cap."""

    module: nn.Module
    softcap: float | None
    scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] float32 logits (float64 stays) of ``hidden`` [N, H]."""
        as_stored = type(self.module) is nn.Linear
        logits = self.module(hidden.to(self.module.weight.dtype) if as_stored else hidden)
        logits = at_least_float32(logits) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True)
class Outputs:
    """What a model says at the N scored positions of a batch, example by example. The loss, distillation and the
    comparison of models are made of it, so that a task which gives it has all three.

    Attributes:
        values: [N, H] hidden states that ``head`` turns into logits; [N, C] logits without one; or [N, H] vectors.
        head: of a language model, whose logits are many and are made a part at a time.
        vectors: whether the values themselves are the answer, as with sentence embeddings.
        targets: [N] int64; None where the rows have no labels. weights: [N] factors of the losses; None: all 1.
        counts: positions of each example of the batch.
    """

    values: Tensor
    counts: Sequence[int]
    head: OutputHead | None = None
    vectors: bool = False
    targets: Tensor | None = None
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def logits(self, chosen: slice = slice(None)) -> Tensor:
        """[n, C] float32 logits (float64 stays) of the ``chosen`` positions."""
        assert not self.vectors
        values = self.values[chosen]
        return at_least_float32(values) if self.head is None else self.head.logits(values)


@dataclass
class Scores:
    """What one evaluation batch adds to the metrics; a field is empty when the task has no such stream."""

    nll_sum: float = 0.0
    num_tokens: int = 0
    num_correct: int = 0
    exact: list[bool] = field(default_factory=list)
    predictions: list[int] = field(default_factory=list)
    references: list[int] = field(default_factory=list)


class Task(Protocol):
    """One file per task implements this; the loop, evaluation and prediction know nothing else about it.

    ``auto_class`` is the transformers auto class; ``peft_type`` PEFT's task type, None where it has none; ``tokenizer`` what
    turns inputs into numbers: of a text task its tokenizer, of images their ``ImageReader``; ``files`` what writes it beside a model, with
    ``save_pretrained(folder)``. ``answers`` says what is scored:
    tokens, classes or vectors.
    """

    name: str
    auto_class: str
    peft_type: str | None
    answers: str
    tokenizer: Any
    files: Any
    class_names: list[str] | None

    def model_kwargs(self) -> dict[str, Any]:
        """Config values the model is loaded with, such as ``num_labels``."""

    def encode(
        self, rows: Rows, *, max_length: int, too_long: str, training: bool, keep: bool = True, labelled: bool = True
    ) -> Encoded:
        """Rows to examples, or with ``keep=False`` to their account alone. Raises: DataError with file and line.

        Args: labelled: False for rows whose labels, if there are any, are not to be read.
        """

    def preview(self, rows: Rows, index: int, *, max_length: int, labelled: bool = True) -> Preview:
        """One row as it is trained, without what ``max_length`` cuts off. Args: labelled: as for ``encode``."""

    def collate(self, examples: list[Example], device: Any) -> Batch:
        """Padded tensors of ``examples`` on ``device``."""

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum of the weighted losses of ``batch``, float32 scalar (float64 stays), not divided by anything."""

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """What ``model`` says at the scored positions of ``batch``."""

    def reference_outputs(self, model: nn.Module, examples: list[Example], device: Any) -> Outputs:
        """The same the long way, for the parity gate: from the examples to the model's own logits (or vectors), sharing
        nothing with ``collate`` and ``outputs``."""

    def score(self, model: nn.Module, batch: Batch) -> Scores:
        """Loss and predictions of ``batch`` without keeping logits."""

    def row_from_text(self, text: str) -> dict[str, Any]:
        """The row that a plain text given to ``predict`` stands for."""

    def predict(self, model: nn.Module, rows: Rows, *, batch_tokens: int, **options: Any) -> Iterator[dict[str, Any]]:
        """One result per row, in order."""
