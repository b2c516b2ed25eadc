"""The tasks of a recipe. ``peftlab/tasks/NAME.py`` implements each."""

from __future__ import annotations

from collections.abc import Collection

from peftlab.specs.task_spec import TaskSpec

_TEXT = ("data.max_length", "data.too_long")
_SCORED = ("eval.metrics", "eval.before", "eval.every", "eval.best", "eval.patience")
_LABELS = ("data.label_names", "data.balance", "distill.hard_weight", "distill.baseline", *_SCORED)
_CLASSES = ("data.bins", "train.class_weights", *_LABELS)
_SOFTMAX = ("distill.temperature", "distill.scale_by_t2")
# What a task lacks if it does not use the key.
NEEDS = dict.fromkeys(("distill.hard_weight", "distill.baseline", *_SCORED), "labels") | dict.fromkeys(
    _SOFTMAX, "softmax"
)
_VECTORS = (
    "model.pooling",
    "train.objective",
    "train.embedding_scale",
    "train.matryoshka",
    "distill.baseline",
    *_TEXT,
    *_SCORED,
)
_RANKS = ("found_at", "first_relevant", "gains", "ideal_gains")
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
            classes_from="label",
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
            classes_from="label",
            headline="accuracy",
            reader="image processor",
            example_input="image.png",
        ),
        TaskSpec(
            "reranking",
            "how relevant a document is for a query",
            "reranking:Reranking",
            auto_class="AutoModelForSequenceClassification",
            peft_type="SEQ_CLS",
            predicts="classes",
            columns=("query", "document", "score"),
            keys=("data.score_range", "distill.baseline", *_TEXT, *_SCORED, *_SOFTMAX),
            scores=(*_PER_ROW, "first_relevant", "gains", "ideal_gains"),
            headline="accuracy",
            gathers=True,
            whole="query",
            example_input="--file pairs.csv",
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

# Tasks whose rows hold something else, by the role in data.columns that chooses them.
VARIANTS: tuple[TaskSpec, ...] = (
    TaskSpec(
        "embedding",
        "a vector per text, learned from triplets of an anchor, a positive and a negative text",
        "embedding_sets:EmbeddingTriplets",
        auto_class="AutoModel",
        peft_type="FEATURE_EXTRACTION",
        predicts="vectors",
        columns=("anchor", "positive", "negative"),
        chosen_by=("negative",),
        keys=("train.margin", *_VECTORS),
        scores=(*_RANKS, "triplets_right"),
        headline="spearman",
        objectives=("in_batch", "triplet"),
        contrasts=True,
        gathers=True,
        whole="anchor",
    ),
    TaskSpec(
        "embedding",
        "a vector per text, learned from pairs of texts with a score of their similarity",
        "embedding_sets:EmbeddingScores",
        auto_class="AutoModel",
        peft_type="FEATURE_EXTRACTION",
        predicts="vectors",
        columns=("sentence1", "sentence2", "score"),
        chosen_by=("score", "sentence1", "sentence2"),
        keys=("data.score_range", *_VECTORS),
        scores=("cosines", "scores"),
        headline="spearman",
        objectives=("cosine", "cosent"),
        contrasts=True,
    ),
    TaskSpec(
        "embedding",
        "a vector per text, learned from pairs of an anchor and a positive text",
        "embedding_sets:EmbeddingPairs",
        auto_class="AutoModel",
        peft_type="FEATURE_EXTRACTION",
        predicts="vectors",
        columns=("anchor", "positive"),
        chosen_by=("anchor", "positive"),
        keys=_VECTORS,
        scores=_RANKS,
        headline="spearman",
        objectives=("in_batch",),
        contrasts=True,
        gathers=True,
        whole="anchor",
    ),
)

TASK_SPECS: tuple[TaskSpec, ...] = (*TASKS.values(), *VARIANTS)

# Every role that a data column can have in some task.
COLUMNS: tuple[str, ...] = tuple(dict.fromkeys(name for spec in TASK_SPECS for name in spec.columns))

# Recipe keys that some tasks use and others do not.
KEYS_OF_TASKS: tuple[str, ...] = tuple(dict.fromkeys(key for spec in TASK_SPECS for key in spec.keys))


def spec_of(task: str, columns: Collection[str] = ()) -> TaskSpec:
    """The spec of a task whose data.columns has these roles."""
    chosen = (spec for spec in VARIANTS if spec.name == task and set(spec.chosen_by) & set(columns))
    return next(chosen, TASKS[task])
