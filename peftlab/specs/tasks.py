"""The tasks of a recipe. ``peftlab/tasks/NAME.py`` implements each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# What a model predicts at each scored position: tokens of a vocabulary, a class per token, one class per row, or a vector per
# row. Loss, teacher and report card depend on it.
Predicts = Literal["tokens", "token classes", "classes", "vectors"]


@dataclass(frozen=True)
class TaskSpec:
    """Properties of a task.

    Attributes:
        summary: the task in a few words.
        implementation: ``FILE:CLASS`` under ``peftlab/tasks``.
        auto_class: the transformers auto class.
        peft_type: PEFT's task type. None if PEFT has none, or none that keeps adapters off the head (its TOKEN_CLS puts one on
            it and then fails to train the head): the modules outside the body are then the head and are trained in full.
        predicts: what is scored. reader: what turns the inputs into numbers.
        columns: the roles that data columns can have (data.columns).
        keys: the recipe keys that this task uses among those that not all tasks use. A key that no task lists is for all.
        scores: the columns that ``Task.score`` gives to the metrics; ``scores_with_classes``: additional ones with classes.
        classes_from: the key that names the classes; None: there are none. A task with classes from the data has one
            label per row and a classification head.
        headline: the metric of a distillation's verdict; with classes ``headline_with_classes``.
        learns_from_labels: False if it can only learn from a teacher.
        generates: whether it writes text (it then implements ``tasks.Generates``). redraws: whether its examples change on
            each pass (it then implements ``tasks.Redraws``).
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
    scores_with_classes: tuple[str, ...] = ()
    headline_with_classes: str | None = None
    classes_from: Literal["data", "eval.choices"] | None = None
    reader: Literal["tokenizer", "image processor"] = "tokenizer"
    learns_from_labels: bool = True
    generates: bool = False
    redraws: bool = False
    example_input: str = '"some text"'

    @property
    def has_softmax(self) -> bool:
        """Whether it predicts probabilities, with cross-entropy as the loss."""
        return self.predicts in ("tokens", "token classes", "classes")

    @property
    def classifies(self) -> bool:
        """Whether it has one label per row and a classification head."""
        return self.classes_from == "data"


_TEXT = ("data.max_length", "data.too_long")
_SCORED = ("eval.metrics", "eval.before", "eval.every", "eval.best", "eval.patience")
_LABELS = ("data.label_names", "data.balance", "distill.hard_weight", "distill.baseline", *_SCORED)
_CLASSES = ("data.bins", "train.class_weights", *_LABELS)
_SOFTMAX = ("distill.temperature", "distill.scale_by_t2")
# What a task lacks if it does not use the key.
NEEDS = dict.fromkeys(("distill.hard_weight", "distill.baseline", *_SCORED), "labels") | dict.fromkeys(
    _SOFTMAX, "softmax"
)
_PER_ROW = ("nll_sum", "num_scored", "predictions", "references")

TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec(
            "causal_lm",
            "a language model writes text: plain text, prompt and completion, or chat",
            "causal_lm:CausalLM",
            auto_class="AutoModelForCausalLM",
            peft_type="CAUSAL_LM",
            predicts="tokens",
            columns=("text", "prompt", "completion", "messages", "system", "tools", "label"),
            keys=(
                "model.chat_template",
                "data.template",
                "data.control_tokens",
                "data.packing",
                "data.allow",
                "eval.choices",
                "eval.prompts",
                "eval.max_new_tokens",
                "distill.cross_tokenizer",
                "distill.on_policy",
                *_TEXT,
                *_LABELS,
                *_SOFTMAX,
            ),
            scores=("nll_sum", "num_scored", "num_tokens", "num_correct", "rows_right", "rows"),
            scores_with_classes=("predictions", "references"),
            classes_from="eval.choices",
            headline="perplexity",
            headline_with_classes="accuracy",
            generates=True,
        ),
        TaskSpec(
            "seq_cls",
            "one label per text",
            "seq_cls:SequenceClassification",
            auto_class="AutoModelForSequenceClassification",
            peft_type="SEQ_CLS",
            predicts="classes",
            columns=("text", "label"),
            keys=(*_TEXT, *_CLASSES, *_SOFTMAX),
            scores=_PER_ROW,
            classes_from="data",
            headline="accuracy",
        ),
        TaskSpec(
            "image_cls",
            "one label per image",
            "image_cls:ImageClassification",
            auto_class="AutoModelForImageClassification",
            peft_type=None,
            predicts="classes",
            columns=("image", "label"),
            keys=(*_CLASSES, *_SOFTMAX),
            scores=_PER_ROW,
            classes_from="data",
            headline="accuracy",
            reader="image processor",
            example_input="image.png",
        ),
        TaskSpec(
            "embedding",
            "a vector per text, learned from a teacher's vectors",
            "embedding:Embedding",
            auto_class="AutoModel",
            peft_type="FEATURE_EXTRACTION",
            predicts="vectors",
            columns=("text",),
            keys=("model.pooling", *_TEXT),
            scores=(),
            headline="spearman",
            learns_from_labels=False,
        ),
    )
}

# Every role that a data column can have in some task.
COLUMNS: tuple[str, ...] = tuple(dict.fromkeys(name for spec in TASKS.values() for name in spec.columns))

# Recipe keys that some tasks use and others do not.
KEYS_OF_TASKS: tuple[str, ...] = tuple(dict.fromkeys(key for spec in TASKS.values() for key in spec.keys))
