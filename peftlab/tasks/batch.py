"""Collates examples into the tensors of a micro-batch, padded or packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftlab.tasks.example import Example


@dataclass(frozen=True)
class StepShare:
    """The share of a micro-batch in a loss over all rows of the optimizer step.

    Attributes:
        loss: [] the weighted losses of its rows, summed. gradients: [N, H] the derivative of the step's sum with respect to its
            outputs.
    """

    loss: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class Batch:
    """The tensors of a micro-batch.

    Attributes:
        inputs: arguments of the model by name, such as ``input_ids`` [B, T] int64, padded on one side, and
            ``attention_mask`` [B, T] int64, which is absent if no row is padded (attention then runs unmasked). Packed
            documents are one row, B = 1, with ``position_ids`` [1, T] int64 from 0 for each; transformers separates them by
            these, without a mask and a cache.
        weights: [B] float64 weights of the examples, as the divisor of the step sums them.
        examples: the examples in the batch, in order.
        trained: [B, T] bool or None. allowed: [B, T] bool, the positions that can be predicted; None: it is not positions that
            are predicted. labels: [B, ...] the labels, or None.
        texts: number of texts of each example; ``inputs`` has so many rows of each, one after the other.
        share: the share of the batch in a loss over the whole step; None: its loss is computed from it alone.
    """

    inputs: dict[str, Tensor]
    weights: Tensor
    examples: tuple[Example, ...]
    trained: Tensor | None = None
    allowed: Tensor | None = None
    labels: Tensor | None = None
    texts: int = 1
    share: StepShare | None = None

    @property
    def input_ids(self) -> Tensor:
        return self.inputs["input_ids"]

    @property
    def attention_mask(self) -> Tensor | None:
        return self.inputs.get("attention_mask")

    @property
    def packed(self) -> bool:
        return "position_ids" in self.inputs

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def rows(self, chosen: Sequence[int]) -> Batch:
        """A batch of some of its examples, by index."""
        examples = tuple(self.examples[i] for i in chosen)
        if self.packed:
            return collate_packed(examples, device=self.device)
        own = list(chosen)
        inner = [i * self.texts + j for i in own for j in range(self.texts)]
        return replace(
            self,
            inputs={name: tensor[inner] for name, tensor in self.inputs.items()},
            weights=self.weights[own],
            examples=examples,
            trained=None if self.trained is None else self.trained[own],
            allowed=None if self.allowed is None else self.allowed[own],
            labels=None if self.labels is None else self.labels[own],
        )


def collate(examples: Sequence[Example], *, pad_id: int, device: Any, left: bool = False) -> Batch:
    """Pads ``examples`` on the right to the longest of them. Labels per token are padded with -100, extra inputs with 0.

    Args: left: pad on the left, for examples without trained tokens, labels per token and extra inputs.
    """
    longest = max(len(e) for e in examples)
    ids = np.full((len(examples), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(examples), longest), dtype=np.int64)
    trained = np.zeros((len(examples), longest), dtype=bool)
    for i, example in enumerate(examples):
        where = _span(len(example), longest, left)
        ids[i, where] = example.ids
        mask[i, where] = 1
        if example.trained is not None:
            trained[i, where] = example.trained
    inputs = {"input_ids": ids} | ({} if mask.all() else {"attention_mask": mask})
    for name in examples[0].extra:
        inputs[name] = _stacked([e.extra[name] for e in examples], fill=0)
    return Batch(
        inputs={name: torch.as_tensor(array).to(device) for name, array in inputs.items()},
        weights=example_weights(examples, device),
        examples=tuple(examples),
        trained=torch.as_tensor(trained).to(device) if examples[0].trained is not None else None,
        labels=stacked_labels(examples, device),
    )


def collate_texts(examples: Sequence[Example], *, pad_id: int, device: Any) -> Batch:
    """Pads the texts of ``examples``, equally many of each, on the right to the longest of them."""
    (count,) = {len(e.texts) for e in examples}
    texts = [Example(ids, e.row, e.weight) for e in examples for ids in e.texts]
    return replace(
        collate(texts, pad_id=pad_id, device=device),
        weights=example_weights(examples, device),
        examples=tuple(examples),
        labels=stacked_labels(examples, device),
        texts=count,
    )


def stacked_labels(examples: Sequence[Example], device: Any) -> Tensor | None:
    """[B] or [B, ...] the labels of ``examples``; None if one has none. Arrays of different length are padded with -100."""
    labels = [e.label for e in examples]
    if any(label is None for label in labels):
        return None
    return torch.as_tensor(_stacked([np.asarray(label) for label in labels], fill=-100)).to(device)


def example_weights(examples: Sequence[Example], device: Any) -> Tensor:
    """[B] float64."""
    return torch.as_tensor(np.array([e.weight for e in examples], dtype=np.float64)).to(device)


def _stacked(arrays: Sequence[np.ndarray], *, fill: int) -> np.ndarray:
    """The arrays stacked on a new first axis, each padded to the longest at the end of its own first axis."""
    if len({a.shape for a in arrays}) > 1:
        longest = max(len(a) for a in arrays)
        arrays = [np.pad(a, [(0, longest - len(a)), *[(0, 0)] * (a.ndim - 1)], constant_values=fill) for a in arrays]
    stacked = np.stack(arrays)
    return stacked.astype(np.int64) if stacked.dtype.kind in "iu" else stacked


def collate_packed(examples: Sequence[Example], *, device: Any) -> Batch:
    """``examples`` concatenated into one row: documents of a language model. Their first token is never trained, so no
    document predicts the start of the next."""
    trained = []
    for example in examples:
        assert example.trained is not None and not example.trained[0]
        trained.append(example.trained)

    def row(parts: list[np.ndarray]) -> Tensor:
        return torch.as_tensor(np.concatenate(parts)[None]).to(device)

    return Batch(
        inputs={
            "input_ids": row([e.ids.astype(np.int64) for e in examples]),
            "position_ids": row([np.arange(len(e), dtype=np.int64) for e in examples]),
        },
        weights=example_weights(examples, device),
        examples=tuple(examples),
        trained=row(trained),
    )


def by_length(call: Callable[[dict[str, Tensor]], Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """[B, ...] the outputs of ``call`` for ``inputs``, which are padded on the right: computed without padding, for the rows
    of one length at a time. The outputs have no dimension of positions."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return call(dict(inputs))
    lengths = mask.sum(1)
    parts, order = [], []
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        trimmed = {name: value[rows, :length] for name, value in inputs.items() if name != "attention_mask"}
        parts.append(call(trimmed))
        order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort()]


def of_one_length(examples: Sequence[Example]) -> list[list[int]]:
    """The indices of the examples of each length, shortest first: in the order in which ``by_length`` draws dropout masks."""
    lengths = [len(e) for e in examples]
    return [[i for i, length in enumerate(lengths) if length == one] for one in sorted(set(lengths))]


def padded_inputs(examples: Sequence[Example], *, pad_id: int, device: Any, left: bool = False) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``token_type_ids``, if rows have them, [B, T] by transformers' conventions, row by
    row."""
    longest = max(len(e) for e in examples)
    ids = torch.full((len(examples), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        where = _span(len(example), longest, left)
        ids[row, where] = torch.from_numpy(example.ids.astype(np.int64))
        mask[row, where] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if any("token_type_ids" in example.extra for example in examples):
        types = inputs["token_type_ids"] = torch.zeros_like(ids)
        for row, example in enumerate(examples):
            own = example.extra["token_type_ids"].astype(np.int64)
            types[row, _span(len(example), longest, left)] = torch.from_numpy(own)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _span(length: int, longest: int, left: bool) -> slice:
    return slice(longest - length, longest) if left else slice(0, length)
