"""One encoded row, and an encoded data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from peftlab.data import Image, Ledger, Mask

_NOTHING: Mapping[str, np.ndarray] = {}


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded row.

    Attributes:
        ids: [T] int32 token ids; empty for an image. sizes: the number of tokens of each of its texts, which ``ids`` holds one
            after the other; empty: it is one text.
        row: index into the ``Rows`` it came from, for messages.
        weight: its contribution to the step's normaliser: the sum of the weights of its scored positions, such as trained
            tokens (causal_lm) or the weight of its class (seq_cls).
        trained: [T] bool, tokens whose prediction is trained; None if a row has one prediction. Of an image without a mask
            [H * W], the pixels that are scored; None: all.
        label: the correct answer: a class index, a number, a mask, or an array, such as a class per token, a class vector, a
            span or boxes. None for language modelling without choices, and for a row without a label.
        image: the image instead of tokens, read when it is batched.
        extra: additional inputs of the model by name, such as the ids of a decoder.
        scored: number of scored positions; only if ``trained`` is None.
        part: which of the row's examples it is, as the windows of a long context or the blocks of a long text.
        reference: what a prediction is compared with, if that is more than ``label``, such as texts or boxes.
        block: its number among the blocks of a row that is split (data.too_long).
    """

    ids: np.ndarray
    row: int
    weight: float
    trained: np.ndarray | None = None
    label: int | float | np.ndarray | Mask | None = None
    image: Image | None = None
    extra: Mapping[str, np.ndarray] = field(default_factory=lambda: _NOTHING)
    scored: int = 1
    reference: Any = None
    part: int = 0
    sizes: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[int, int]:
        """Identifies it among the examples of a data set."""
        return self.row, self.part

    @property
    def texts(self) -> list[np.ndarray]:
        """The token ids of each of its texts."""
        return np.split(self.ids, np.cumsum(self.sizes)[:-1]) if self.sizes else [self.ids]

    def unlabelled(self, *, most_pixels: int) -> Example:
        """Itself without its answer, to be compared with other models: of a mask, at a grid of ``most_pixels`` pixels."""
        trained = self.label.grid(most_pixels) if isinstance(self.label, Mask) else self.trained
        return replace(self, trained=trained, label=None, reference=None)

    @property
    def num_scored(self) -> int:
        """The number of its positions in ``Outputs``."""
        return self.scored if self.trained is None else int(self.trained.sum())

    def __len__(self) -> int:
        return len(self.ids) if self.image is None else self.image.length


@dataclass(frozen=True)
class Encoded:
    """The examples of one data set, and the ledger of all its rows."""

    examples: list[Example]
    ledger: Ledger

    @property
    def num_rows(self) -> int:
        """The number of rows that have examples."""
        return len({example.row for example in self.examples})

    @property
    def lengths(self) -> np.ndarray:
        return lengths_of(self.examples)


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """[N] int64 tokens of each example."""
    return np.array([len(e) for e in examples], dtype=np.int64)


def trained_of(examples: Sequence[Example]) -> np.ndarray:
    """[N] int64 trained tokens of each example."""
    return np.array([e.num_scored for e in examples], dtype=np.int64)
