"""The protocol of a task: rows become examples, examples become batches, batches become a loss or scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
from torch import Tensor, nn

from peftlab.data import Augmentation, Rows
from peftlab.data.chat import ControlRule
from peftlab.data.layouts import Style
from peftlab.specs.task_spec import TaskSpec
from peftlab.tasks.batch import Batch
from peftlab.tasks.example import Encoded, Example
from peftlab.tasks.outputs import Outputs
from peftlab.tasks.preview import Preview

# How rows of different length share a batch, see ``models.padding``; ``none``: they run through the model separately.
Padding = Literal["right", "left", "none"]
# The result of ``Task.score`` for one batch: column name -> a number, or one number per row.
Columns = dict[str, Any]


@dataclass(frozen=True)
class TaskParts:
    """The plain values that tasks are built from, gathered for any task. Each task uses what it needs.

    Attributes:
        reader: what turns inputs into numbers.
        columns: part -> name of its column in the data. available: all columns of the data. sample: a value of each column.
        classes: names of the classes in index order; None if there are none.
        label_names: value in the label column -> class. bins: cut points and class names of a numeric label column.
        class_weights: weight of each class in the loss, by name, or ``balanced`` or ``none``.
        template: texts with ``{column}`` fields, by part. head_loss: see ``LMHead``.
        pooling: how token vectors become one vector; None: as in the model's files. sentences: returns their settings:
            ``pooling``, ``normalize``, ``max_length`` and ``writer(pooling)``.
        style, control_tokens: see ``data.chat.Formatter``.
        padding: how the family of the model is padded. causal: whether a token of it sees only those before.
        end_ids: tokens at which its generation config ends a text.
        num_embeddings: rows of its input embeddings; None: no vocabulary, or unknown. most_tokens: the longest text that it reads
            and writes, in tokens.
        token_types: number of types of tokens that the model reads; 0: it reads none. hidden_size: width of its hidden states, if its
            config says so.
        augmentation: random changes of training images. config: the model's, for an image task whose loss depends on it.
        max_target_length: longest target in tokens. decoder_start: the token before each target of an encoder-decoder; None:
            the last token of the target.
        settings: values of the recipe keys in ``TaskSpec.settings``, such as ``data.stride``, by key. found: see
            ``FindsSettings``.
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
    sample: Mapping[str, Any] = field(default_factory=dict)
    style: Style | None = None
    control_tokens: ControlRule = "auto"
    padding: Padding = "right"
    causal: bool = False
    end_ids: Sequence[int] = ()
    num_embeddings: int | None = None
    most_tokens: int = 2**31
    token_types: int = 0
    hidden_size: int | None = None
    augmentation: Augmentation | None = None
    max_target_length: int | None = None
    decoder_start: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    found: Mapping[str, Any] = field(default_factory=dict)
    config: Any = None

    def column(self, part: str) -> str:
        """Name of the column for ``part``; default: the part's own name."""
        return self.columns.get(part, part)


class Task(Protocol):
    """One file per task implements this; the training loop, evaluation and prediction use nothing else of it.

    ``spec`` is its row in ``specs.tasks``. ``tokenizer`` turns inputs into numbers: the tokenizer of a text task, the
    ``ImageReader`` of an image task; ``files`` writes it into a model folder, with ``save_pretrained(folder)``. ``max_length``
    is the longest input in the model's files; None: the model's limit. ``padding`` is how it pads batches; a check at the start
    of training and evaluation may set it to ``none``.
    """

    spec: TaskSpec
    tokenizer: Any
    files: Any
    class_names: list[str] | None
    max_length: int | None
    padding: Padding

    @classmethod
    def make(cls, parts: TaskParts) -> Self:
        """The task of ``parts``. Raises: RecipeError, DataError."""

    @property
    def read_columns(self) -> set[str]:
        """The columns of the data that it reads."""

    @classmethod
    def blank_rows(cls, parts: TaskParts, rows: Rows, *, labelled: bool) -> dict[int, str]:
        """Why rows lack what the task needs, by index, for data.empty. Raises: DataError for a missing column.

        Args: parts: without classes. labelled: whether the rows need a label.
        """

    def model_kwargs(self) -> dict[str, Any]:
        """Config values to load the model with, such as ``num_labels``."""

    def encode(
        self, rows: Rows, *, max_length: int, too_long: str, training: bool, keep: bool = True, labelled: bool = True
    ) -> Encoded:
        """Encodes rows as examples with a ledger, or with ``keep=False`` as a ledger only. Raises: DataError with file and line.

        Args: labelled: False to ignore the labels of the rows.
        """

    def preview(self, rows: Rows, index: int, *, max_length: int, labelled: bool = True) -> Preview:
        """One row as it is trained, truncated to ``max_length``. Args: labelled: as for ``encode``."""

    def collate(self, examples: list[Example], device: Any) -> Batch:
        """Padded tensors of ``examples`` on ``device``."""

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Undivided sum of the weighted losses of ``batch``, float32 scalar (float64 stays)."""

    def probe(self, ids: np.ndarray) -> Example:
        """An example of these tokens with any labels, all of whose outputs are scored: for checks of a model."""

    def losses(self, outputs: Outputs) -> Tensor:
        """[N] loss at each position, without the weights."""

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """The outputs of ``model`` at the scored positions of ``batch``."""

    def reference_outputs(self, model: nn.Module, examples: list[Example], device: Any) -> Outputs:
        """The same outputs for the parity gate, computed from the examples with the model's own logits (or vectors), without
        code of ``collate`` and ``outputs``."""

    def score(self, model: nn.Module, batch: Batch) -> Columns:
        """The contribution of ``batch`` to the metrics, by the columns in the spec's ``scores``; logits are not kept."""

    def row_from_text(self, text: str) -> dict[str, Any]:
        """The row for a plain text given to ``predict``."""

    def unusable(self, rows: Rows) -> dict[int, str]:
        """Why rows cannot be an input of ``predict``, by index. Raises: DataError if their column is missing."""

    def no_result(self) -> dict[str, Any]:
        """A result of ``predict`` without values, for a row that cannot be an input."""

    def predict(self, model: nn.Module, rows: Rows, *, batch_tokens: int, **options: Any) -> Iterator[dict[str, Any]]:
        """One result per row, in order. Its ``note`` says what is cut of an input that is too long. Args: rows: usable ones."""


class FindsClasses(Task, Protocol):
    """A task that finds the names of its classes in the rows (``spec.classes_from`` is ``rows``)."""

    @classmethod
    def find_classes(cls, parts: TaskParts, rows: Rows) -> list[str]:
        """The names in index order. Raises: DataError if there are too few. Args: parts: without classes."""


class FindsSettings(Task, Protocol):
    """A task with settings that come from the training rows (``spec.finds_settings``), such as the scale of the scores, or
    from the trained model, such as thresholds. A run keeps them."""

    @classmethod
    def find_settings(cls, parts: TaskParts, rows: Rows) -> dict[str, Any]:
        """Plain values for ``TaskParts.found``. Raises: DataError. Args: parts: without classes."""

    def before_training(self, model: nn.Module, *, trained_before: bool) -> None:
        """Prepares ``model``. Args: trained_before: whether its head comes from an earlier training. Raises: RecipeError."""

    def after_training(self, model: nn.Module, examples: Sequence[Example], *, batch_tokens: int) -> dict[str, Any]:
        """Finishes a model as it was trained, and returns the settings. Args: examples: the training rows."""

    def of_checkpoint(self) -> None:
        """The model that comes next is of a training that has not ended."""


class Generates(Task, Protocol):
    """A task that writes text (``spec.generates``). Attributes: silent_ids: tokens of an answer that are no part of its text."""

    silent_ids: frozenset[int]

    def generate(
        self, model: nn.Module, rows: Rows, *, batch_tokens: int, max_length: int, **sampling: Any
    ) -> Iterator[dict[str, Any]]:
        """Yields ``{"text": answer}`` per row, in order."""

    def write_answers(
        self, model: nn.Module, rows: Rows, *, batch_tokens: int, max_new_tokens: int, temperature: float, top_p: float
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields ``(index, token ids)`` of the answer to each row, as they finish."""

    def encode_answers(self, rows: Rows, answers: Sequence[np.ndarray], *, max_length: int) -> Encoded:
        """The rows with a model's ``answers`` in place of their own."""

    def score_answers(self, model: nn.Module, batch: Batch) -> Columns:
        """The columns in the spec's ``answer_scores``, from texts that the model writes; not called if there are none."""

    def answers_need(self, rows: Rows) -> None:
        """Raises DataError if these rows have no prompts that a model could answer."""

    def prompt_text(self, rows: Rows, index: int) -> str:
        """What the model reads before the answer of a row, as text."""

    def prompt_lengths(self, rows: Rows) -> list[int]:
        """The number of tokens before the answer of each row."""

    def text_of(self, answer: np.ndarray) -> str:
        """The text of an answer's tokens, without its end."""

    def ends(self, answer: np.ndarray) -> bool:
        """Whether the last token of an answer can end it."""


class Chats(Generates, Protocol):
    """A task that answers conversations (``spec.chats``)."""

    formatter: Any

    def generation_kwargs(self, max_new_tokens: int, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the model's ``generate``."""

    def conversation_ids(self, messages: Sequence[Mapping[str, str]]) -> np.ndarray:
        """The tokens of a conversation in memory up to where the model answers."""


class Redraws(Task, Protocol):
    """A task whose examples change on each pass, such as redrawn masks (``spec.redraws``)."""

    def redraw(self, example: Example, rng: np.random.Generator) -> Example:
        """``example`` for this pass, with the same length and weight; ``rng`` depends on the seed, the step and the example."""


class Contrasts(Task, Protocol):
    """A task whose loss may compare all rows of an optimizer step (``spec.contrasts``).

    The loop then runs the micro-batches of a step twice. The first pass has no gradients and gives all vectors of the step;
    their loss gives the derivative with respect to each vector. In the second pass, with the same dropout masks, ``loss_sum``
    of a batch with ``Batch.share`` returns the batch's part of that loss, with these derivatives.
    """

    @property
    def whole_step(self) -> bool:
        """Whether the loss of a row depends on other rows."""


class Gathers(Task, Protocol):
    """A task whose metrics need all held-out rows together (``spec.gathers``)."""

    def gathered(self, parts: Sequence[Mapping[str, Any]]) -> Columns:
        """The columns in the spec's ``scores``, from what ``score`` returned for each batch."""


class FindsObjects(Task, Protocol):
    """A task that finds objects in images (``spec.predicts`` is ``boxes``). ``most_objects``: in one image."""

    most_objects: int

    def image_of(self, rows: Rows) -> Any:
        """The ``PIL.Image`` of the first of ``rows``, for a picture."""


class Segments(Task, Protocol):
    """A task that gives each pixel of an image a class (``spec.predicts`` is ``pixels``)."""

    def file_of(self, rows: Rows, index: int) -> Path | None:
        """The file of a row's image; None if the row holds it."""
