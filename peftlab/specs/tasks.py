"""The tasks of a recipe. ``peftlab/tasks/NAME.py`` implements each."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from peftlab.specs.task_spec import SCORED, TaskSpec

_TEXT = ("data.max_length", "data.too_long")
_TAUGHT = ("distill.hard_weight", "distill.baseline", *SCORED)
_LABELS = ("data.label_names", "data.balance", *_TAUGHT)
_CLASSES = ("data.bins", "train.class_weights", *_LABELS)
_SELF_TRAINING = "train.self_training"
_SOFTMAX = ("distill.temperature", "distill.scale_by_t2")
# What a task lacks if it does not use the key.
NEEDS = dict.fromkeys(("distill.hard_weight", "distill.baseline", *SCORED), "labels") | dict.fromkeys(
    _SOFTMAX, "softmax"
)
_VECTORS = (
    "model.pooling",
    "train.objective",
    "train.embedding_scale",
    "train.matryoshka",
    "distill.baseline",
    *_TEXT,
    *SCORED,
)
_RANKS = ("found_at", "first_relevant", "gains", "ideal_gains")
_IMAGES = ("data.augment", "train.batch_norm")
_TAGS = ("data.label_names", "distill.hard_weight", "distill.baseline", *SCORED)
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
                "distill.answers",
                *_TEXT,
                *_LABELS,
                *_SOFTMAX,
            ),
            scores=("nll_sum", "num_scored", "num_tokens", "num_correct", "rows_right", "rows"),
            answer_scores=("answers", "reference_texts"),
            scores_with_classes=("predictions", "references"),
            classes_from="eval.choices",
            headline="perplexity",
            headline_with_classes="accuracy",
            generates=True,
            chats=True,
            splits=True,
        ),
        TaskSpec(
            "seq2seq",
            "a text from a text: translation, summaries",
            "seq2seq:Seq2Seq",
            auto_class="AutoModelForSeq2SeqLM",
            peft_type="SEQ_2_SEQ_LM",
            predicts="tokens",
            columns=("source", "target"),
            keys=(
                "data.prefix",
                "data.source_language",
                "data.target_language",
                "data.max_target_length",
                "eval.prompts",
                "eval.max_new_tokens",
                "eval.beams",
                "distill.answers",
                "distill.hard_weight",
                "distill.baseline",
                *_TEXT,
                *SCORED,
                *_SOFTMAX,
            ),
            scores=("nll_sum", "num_scored", "num_tokens", "num_correct", "rows_right", "rows"),
            answer_scores=("answers", "reference_texts"),
            always_writes=True,
            headline="perplexity",
            generates=True,
            reads_source=True,
        ),
        TaskSpec(
            "masked_lm",
            "an encoder fills in masked tokens of plain text",
            "masked_lm:MaskedLM",
            auto_class="AutoModelForMaskedLM",
            # PEFT has no type of its own; this one adds no head to those that it trains in full.
            peft_type="FEATURE_EXTRACTION",
            predicts="tokens",
            columns=("text",),
            keys=("train.mask_share", "distill.hard_weight", "distill.baseline", *_TEXT, *SCORED, *_SOFTMAX),
            scores=("nll_sum", "num_scored", "num_tokens", "num_correct"),
            headline="perplexity",
            redraws=True,
            splits=True,
            example_input='"Paris is the [MASK] of France."',
        ),
        TaskSpec(
            "seq_cls",
            "one label per text",
            "seq_cls:SequenceClassification",
            auto_class="AutoModelForSequenceClassification",
            peft_type="SEQ_CLS",
            predicts="classes",
            columns=("text", "pair", "label"),
            keys=(*_TEXT, *_CLASSES, *_SOFTMAX, _SELF_TRAINING),
            scores=_PER_ROW,
            classes_from="label",
            headline="accuracy",
        ),
        TaskSpec(
            "extractive_qa",
            "the part of a text that answers a question, or that there is none",
            "extractive_qa:ExtractiveQA",
            auto_class="AutoModelForQuestionAnswering",
            peft_type=None,
            predicts="spans",
            columns=("question", "context", "answers", "answer_start", "is_impossible", "id"),
            keys=(
                "data.max_length",
                "data.stride",
                "eval.max_answer_tokens",
                "eval.null_threshold",
                "distill.hard_weight",
                "distill.baseline",
                *SCORED,
                *_SOFTMAX,
            ),
            scores=("nll_sum", "num_scored", "found_answers", "right_answers"),
            headline="squad_f1",
            example_input="""'{"question": "Who wrote it?", "context": "Ann wrote it."}'""",
        ),
        TaskSpec(
            "token_cls",
            "named entities: labels of parts of a text",
            "token_cls:NamedEntities",
            auto_class="AutoModelForTokenClassification",
            peft_type=None,
            predicts="token classes",
            columns=("text", "spans", "tokens", "tags"),
            keys=(*_TEXT, *_TAGS, *_SOFTMAX),
            scores=(*_PER_ROW, "row_starts"),
            default_metrics=("loss", "accuracy", "entity_f1", "entity_precision", "entity_recall"),
            classes_from="rows",
            headline="entity_f1",
        ),
        TaskSpec(
            "image_cls",
            "one label per image",
            "image_cls:ImageClassification",
            auto_class="AutoModelForImageClassification",
            peft_type=None,
            predicts="classes",
            columns=("image", "label"),
            keys=("data.augment.rotate", *_IMAGES, *_CLASSES, *_SOFTMAX, _SELF_TRAINING),
            scores=_PER_ROW,
            classes_from="label",
            headline="accuracy",
            reader="image processor",
            redraws=True,
            example_input="image.png",
        ),
        TaskSpec(
            "object_detection",
            "boxes and categories of the objects in an image",
            "object_detection:ObjectDetection",
            auto_class="AutoModelForObjectDetection",
            peft_type=None,
            predicts="boxes",
            columns=("image", "objects"),
            keys=("data.label_names", "eval.min_score", *_IMAGES, *SCORED),
            scores=("nll_sum", "num_scored", "found", "objects"),
            classes_from="rows",
            headline="map",
            reader="image processor",
            redraws=True,
            distills=False,
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
            keys=("data.score_range", "distill.baseline", *_TEXT, *SCORED, *_SOFTMAX),
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
    TaskSpec(
        "token_cls",
        "a tag for each word, such as its part of speech",
        "token_cls:WordTags",
        auto_class="AutoModelForTokenClassification",
        peft_type=None,
        predicts="token classes",
        columns=("tokens", "word_tags"),
        chosen_by=("word_tags",),
        keys=(*_TEXT, *_TAGS, *_SOFTMAX),
        scores=_PER_ROW,
        classes_from="rows",
        headline="accuracy",
    ),
    replace(
        TASKS["seq_cls"],
        summary="any number of labels per text",
        implementation="seq_cls:MultiLabelClassification",
        chosen_by=("labels",),
        columns=("text", "pair", "labels"),
        predicts="token classes",
        keys=("data.separator", "data.label_names", "eval.threshold", *_TEXT, *_TAUGHT, *_SOFTMAX),
        scores=("nll_sum", "num_scored", "predicted_labels", "true_labels", "label_probabilities"),
        classes_from="rows",
        finds_settings=True,
        one_output_per_class=True,
        headline="loss",
    ),
    replace(
        TASKS["seq_cls"],
        summary="one of several ordered classes per text",
        implementation="seq_cls:OrdinalClassification",
        chosen_by=("rank",),
        columns=("text", "pair", "rank"),
        predicts="token classes",
        keys=("data.order", *_TEXT, *_CLASSES, *_SOFTMAX),
        scores=(*_PER_ROW, "predicted_ranks", "true_ranks"),
        classes_from="rows",
        one_output_per_class=True,
        headline="loss",
    ),
    replace(
        TASKS["seq_cls"],
        summary="a number per text",
        implementation="seq_cls:Regression",
        chosen_by=("score",),
        columns=("text", "pair", "score"),
        predicts="numbers",
        keys=(*_TEXT, *_TAUGHT),
        scores=("nll_sum", "num_scored", "predicted_numbers", "true_numbers"),
        classes_from=None,
        finds_settings=True,
        headline="mse",
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
