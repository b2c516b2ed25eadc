"""What a task is: rows become examples, examples become batches, batches become a loss or scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np
from torch import Tensor, nn

from peftlab.data import Rows
from peftlab.specs.tasks import TaskSpec
from peftlab.tasks.batch import Batch
from peftlab.tasks.example import Encoded, Example
from peftlab.tasks.outputs import Outputs
from peftlab.tasks.preview import Preview

# What ``Task.score`` gives of one batch: a number, or one number per row, by the name of the column.
Columns = dict[str, Any]


@dataclass(frozen=True)
class TaskParts:
    """What tasks are made of: plain values, gathered without asking which task it is for. Each takes what it needs.

    Attributes:
        reader: what turns inputs into numbers.
        columns: part -> name of its column in the data. available: all columns that the data have.
        classes: names of the classes in the order of their index; None where there are none.
        label_names: value in the label column -> class. bins: cut points and class names of a numeric one.
        class_weights: weight of each class in the loss, by name, or ``balanced`` or ``none``.
        template: texts with ``{column}`` fields, by part. head_loss: see ``LMHead``.
        pooling: how token vectors become one vector; None: as the model's files say. sentences: gives what they say, with
            ``pooling``, ``normalize``, ``max_length`` and ``writer(pooling)``.
    """

    reader: Any
    columns: Mapping[str, str]
    available: Sequence[str]
    classes: list[str] | None = None
    label_names: Mapping[str, str] = field(default_factory=dict)
    bins: tuple[list[float], list[str]] | None = None
    class_weights: str | Mapping[str, float] = "none"
    template: Mapping[str, str] | None = None
    head_loss: Callable[..., Tensor | None] = lambda *_, **__: None
    pooling: str | None = None
    sentences: Callable[[], Any] | None = None

    def column(self, part: str) -> str:
        """Name of the column that plays ``part``; default: the part's own name."""
        return self.columns.get(part, part)


class Task(Protocol):
    """One file per task implements this; the loop, evaluation and prediction know nothing else about it.

    ``spec`` is its row in ``specs.tasks``. ``tokenizer`` is what turns inputs into numbers: of a text task its tokenizer, of
    images their ``ImageReader``; ``files`` what writes it beside a model, with ``save_pretrained(folder)``. ``max_length`` is
    the longest input that the model's files ask for, None: as the model allows.
    """

    spec: TaskSpec
    tokenizer: Any
    files: Any
    class_names: list[str] | None
    max_length: int | None

    @classmethod
    def make(cls, parts: TaskParts) -> Self:
        """The task of ``parts``. Raises: RecipeError, DataError."""

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

    def losses(self, outputs: Outputs) -> Tensor:
        """[N] loss at each position, without the weights."""

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """What ``model`` says at the scored positions of ``batch``."""

    def reference_outputs(self, model: nn.Module, examples: list[Example], device: Any) -> Outputs:
        """The same the long way, for the parity gate: from the examples to the model's own logits (or vectors), sharing
        nothing with ``collate`` and ``outputs``."""

    def score(self, model: nn.Module, batch: Batch) -> Columns:
        """What ``batch`` adds to the metrics, by the columns that the spec's ``scores`` names; logits are not kept."""

    def row_from_text(self, text: str) -> dict[str, Any]:
        """The row that a plain text given to ``predict`` stands for."""

    def predict(self, model: nn.Module, rows: Rows, *, batch_tokens: int, **options: Any) -> Iterator[dict[str, Any]]:
        """One result per row, in order."""


class Generates(Task, Protocol):
    """A task that writes text (``spec.generates``)."""

    formatter: Any

    def generate(
        self, model: nn.Module, rows: Rows, *, batch_tokens: int, max_length: int, **sampling: Any
    ) -> Iterator[dict[str, Any]]:
        """Yields ``{"text": answer}`` per row, in order."""

    def write_answers(
        self, model: nn.Module, rows: Rows, *, batch_tokens: int, max_new_tokens: int, temperature: float, top_p: float
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields ``(index, token ids)`` of the answer to each row, as they come."""

    def encode_answers(self, rows: Rows, answers: Sequence[np.ndarray], *, max_length: int) -> Encoded:
        """The rows with ``answers`` that a model has written in place of their own."""

    def generation_kwargs(self, max_new_tokens: int, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the model's ``generate``."""

    def prompt_lengths(self, rows: Rows) -> list[int]:
        """Tokens before the answer of each row."""

    def text_of(self, answer: np.ndarray) -> str:
        """The words of an answer's tokens, without its end."""

    def ends(self, answer: np.ndarray) -> bool:
        """Whether an answer's last token is one that can end it."""


class Redraws(Task, Protocol):
    """A task whose examples differ each time they are trained on, such as masks that are drawn anew (``spec.redraws``)."""

    def redraw(self, example: Example, rng: np.random.Generator) -> Example:
        """``example`` as it is trained on now, of the same length; ``rng`` depends on the seed, the step and the row."""
