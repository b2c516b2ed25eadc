"""``TaskSpec``: the properties of a task, or of a variant of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# What a model predicts at each scored position: tokens of a vocabulary, a class per token or per decision about a row, one class
# per row, a position of the row (the start and the end of a span), a vector per row, a number per row, a box and its classes, or
# a class per pixel. Loss, teacher and report card depend on it.
Predicts = Literal["tokens", "token classes", "classes", "spans", "vectors", "numbers", "boxes", "pixels"]

# Keys that some tasks use and others do not, but that others read.
SCORED = ("eval.metrics", "eval.before", "eval.every", "eval.best", "eval.patience")
_NOT_OF_TASKS = (
    *SCORED,
    "data.too_long",
    "data.packing",
    "data.allow",
    "data.balance",
    "eval.prompts",
    "train.self_training",
)


@dataclass(frozen=True)
class TaskSpec:
    """Properties of a task, or of a variant of it.

    Attributes:
        summary: the task in a few words.
        implementation: ``FILE:CLASS`` under ``peftlab/tasks``.
        auto_class: the transformers auto class.
        peft_type: PEFT's task type. None if PEFT has none, or none that keeps adapters off the head (its TOKEN_CLS puts one on
            it and then fails to train the head): the modules outside the body are then the head and are trained in full.
        predicts: what is scored. reader: what turns the inputs into numbers.
        columns: the roles that data columns can have (data.columns).
        chosen_by: the roles of which one in data.columns chooses this variant; empty for the task's default.
        keys: the recipe keys that this task uses among those that not all tasks use. A key that no task lists is for all.
        scores: the columns that ``Task.score`` gives to the metrics; ``scores_with_classes``: additional ones with classes.
        default_metrics: the metrics of a recipe without eval.metrics; empty: all those that are ``by_default``.
        classes_from: where the names of the classes come from; None: there are none. ``label``: one label per row, for a
            classification head. ``rows``: the task finds them in its rows (it then implements ``tasks.FindsClasses``).
            ``eval.choices``: that key names them.
        headline: the metric of a distillation's verdict; with classes ``headline_with_classes``.
        finds_settings: whether the training rows or the trained model give it settings that a run keeps (it then implements
            ``tasks.FindsSettings``).
        one_output_per_class: whether each class is a scored position of its own, so that a teacher needs the same order.
        learns_from_labels: False if it can only learn from a teacher.
        generates: whether it writes text (it then implements ``tasks.Generates``). chats: whether it also answers
            conversations (``tasks.Chats``). redraws: whether its examples change on each pass (``tasks.Redraws``).
        reads_source: whether a row has a source, which an encoder reads, and a target, which a decoder writes.
        answer_scores: the columns that ``Generates.score_answers`` gives to the metrics, from texts that the model writes.
        always_writes: whether metrics of these texts are among the default ones and on the report card; otherwise the model
            writes only if eval.metrics names them.
        objectives: the losses in ``specs.objectives`` that it can learn by, the default first; empty: it has one loss.
        contrasts: whether the loss of a row may depend on the other rows of its step (it then implements ``tasks.Contrasts``).
        gathers: whether its metrics need all held-out rows together (it then implements ``tasks.Gathers``).
        whole: the role whose equal values stay together when rows are held out; None: rows are split one by one.
        splits: whether ``data.too_long: split`` cuts its rows into blocks.
        example_input: an example argument for ``peftlab predict``.
    """

    name: str
    summary: str
    implementation: str
    auto_class: str
    peft_type: str | None
    predicts: Predicts
    columns: tuple[str, ...]
    keys: tuple[str, ...]
    scores: tuple[str, ...]
    headline: str
    chosen_by: tuple[str, ...] = ()
    scores_with_classes: tuple[str, ...] = ()
    headline_with_classes: str | None = None
    default_metrics: tuple[str, ...] = ()
    classes_from: Literal["label", "rows", "eval.choices"] | None = None
    reader: Literal["tokenizer", "image processor"] = "tokenizer"
    finds_settings: bool = False
    one_output_per_class: bool = False
    learns_from_labels: bool = True
    generates: bool = False
    chats: bool = False
    reads_source: bool = False
    answer_scores: tuple[str, ...] = ()
    always_writes: bool = False
    redraws: bool = False
    objectives: tuple[str, ...] = ()
    contrasts: bool = False
    gathers: bool = False
    whole: str | None = None
    splits: bool = False
    example_input: str = '"some text"'

    @property
    def settings(self) -> tuple[str, ...]:
        """The keys that say how its texts, losses and answers are made, which its implementation gets."""
        own = (key for key in self.keys if key not in _NOT_OF_TASKS and not key.startswith("distill."))
        return tuple(key for key in own if key.count(".") == 1)

    @property
    def has_softmax(self) -> bool:
        """Whether it predicts probabilities, with cross-entropy as the loss."""
        return self.predicts in ("tokens", "token classes", "classes", "spans", "pixels")

    @property
    def classifies(self) -> bool:
        """Whether it has one label per row and a classification head."""
        return self.classes_from == "label"

    @property
    def reads_whole_rows(self) -> bool:
        """Whether its head reads one position of each row of tokens: the first or the last."""
        return self.auto_class == "AutoModelForSequenceClassification"

    @property
    def what(self) -> str:
        """``task: NAME``, with the role that chooses a variant."""
        return f"task: {self.name}" + (f" with data.columns.{self.chosen_by[0]}" if self.chosen_by else "")

    @property
    def compares_outputs(self) -> bool:
        """Whether the outputs of two models can be compared one by one; if not, a student learns from a teacher's answers."""
        return self.predicts != "boxes"

    @property
    def names_classes(self) -> bool:
        """Whether its head has classes whose names come from the data."""
        return self.classes_from in ("label", "rows")

    @property
    def marks_entities(self) -> bool:
        """Whether its classes are tags that mark entities."""
        return "row_starts" in self.scores
