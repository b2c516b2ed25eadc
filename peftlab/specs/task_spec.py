"""``TaskSpec``: the properties of a task, or of a variant of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# What a model predicts at each scored position: tokens of a vocabulary, a class per token, one class per row, or a vector per
# row. Loss, teacher and report card depend on it.
Predicts = Literal["tokens", "token classes", "classes", "vectors"]


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
        classes_from: where the names of the classes come from; None: there are none. ``label``: one label per row, for a
            classification head. ``rows``: the task finds them in its rows (it then implements ``tasks.FindsClasses``).
            ``eval.choices``: that key names them.
        headline: the metric of a distillation's verdict; with classes ``headline_with_classes``.
        learns_from_labels: False if it can only learn from a teacher.
        generates: whether it writes text (it then implements ``tasks.Generates``). redraws: whether its examples change on
            each pass (it then implements ``tasks.Redraws``).
        objectives: the losses in ``specs.objectives`` that it can learn by, the default first; empty: it has one loss.
        contrasts: whether the loss of a row may depend on the other rows of its step (it then implements ``tasks.Contrasts``).
        gathers: whether its metrics need all held-out rows together (it then implements ``tasks.Gathers``).
        whole: the role whose equal values stay together when rows are held out; None: rows are split one by one.
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
    classes_from: Literal["label", "rows", "eval.choices"] | None = None
    reader: Literal["tokenizer", "image processor"] = "tokenizer"
    learns_from_labels: bool = True
    generates: bool = False
    redraws: bool = False
    objectives: tuple[str, ...] = ()
    contrasts: bool = False
    gathers: bool = False
    whole: str | None = None
    example_input: str = '"some text"'

    @property
    def has_softmax(self) -> bool:
        """Whether it predicts probabilities, with cross-entropy as the loss."""
        return self.predicts in ("tokens", "token classes", "classes")

    @property
    def classifies(self) -> bool:
        """Whether it has one label per row and a classification head."""
        return self.classes_from == "label"

    @property
    def reads_whole_rows(self) -> bool:
        """Whether its head reads one position of each row of tokens: the first or the last."""
        return self.auto_class == "AutoModelForSequenceClassification"

    @property
    def names_classes(self) -> bool:
        """Whether its head has classes whose names come from the data."""
        return self.classes_from in ("label", "rows")
