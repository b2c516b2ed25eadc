"""The metrics, in the order of computation and display. ``peftlab/evaluation/modules/NAME.py`` implements each.

A metric is a family (``f1``) that gives one or more flat values (``f1_macro``, ``f1_spam``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class MetricSpec:
    """Properties of a metric.

    Attributes:
        needs: argument of its module -> the column of ``Task.score`` that it uses. Tasks with these columns have the
            metric. Empty: it is only on the report card.
        rows: the columns of ``evaluation.comparison`` for its value with an interval over rows; empty: it has no interval.
        of_classes: whether it needs the class names.
        better: which direction is better; None if the values have no order.
        lowest, highest: bounds of its values.
        averaged: it gives NAME_macro and one NAME_CLASS per class instead of NAME.
        parts: it gives NAME_PART as well for each of these parts of the rows.
        of_entities: it gives NAME over all entities and one NAME_LABEL per entity label.
        by_default: whether recipes without ``eval.metrics`` compute it.
        on_card: whether the report card shows the family's headline value if it can be computed.
        on_short_card: whether the card on the screen shows it without --verbose, in addition to the headline metric.
        of_answers: whether it is about texts that the model writes, which takes long: evaluations in the middle of training
            compute it only if the recipe names it.
        share: its values are shares, shown in percentage points. kept_as: how the card expresses how much of the teacher's
            value the student keeps; None: not shown, as for metrics that already compare with the teacher.
        label, note: its name on the card, and its meaning in one line.
    """

    name: str
    needs: Mapping[str, str] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    of_classes: bool = False
    better: Literal["higher", "lower"] | None = "higher"
    lowest: float = 0.0
    highest: float = math.inf
    averaged: bool = False
    parts: tuple[str, ...] = ()
    of_entities: bool = False
    by_default: bool = True
    on_card: bool = True
    on_short_card: bool = False
    of_answers: bool = False
    share: bool = False
    kept_as: Literal["share", "times"] | None = None
    label: str = ""
    note: str = ""

    @property
    def headline(self) -> str:
        """The flat value that the family is judged by."""
        return f"{self.name}_macro" if self.averaged else self.name

    @property
    def higher_is_better(self) -> bool:
        return self.better == "higher"


def _share(name: str, **about: object) -> MetricSpec:
    return MetricSpec(name, highest=1.0, share=True, **about)  # type: ignore[arg-type]


_PAIRS = {"predictions": "predictions", "references": "references"}
_TEXTS = {"predictions": "answers", "references": "reference_texts"}
ROUGE = {"rouge1": "words", "rouge2": "pairs of words", "rougeL": "words in the same order"}
_CLASS_ROWS = ("predicted_class", "true_class")
_ANSWERS = {"predictions": "found_answers", "references": "right_answers"}
_ANSWERABLE = ("answerable", "unanswerable")
_TAGS = {**_PAIRS, "starts": "row_starts"}

_LABEL_SETS = {"predictions": "predicted_labels", "references": "true_labels"}
_RANKS = {"predictions": "predicted_ranks", "references": "true_ranks"}
_NUMBERS = {"predictions": "predicted_numbers", "references": "true_numbers"}
_PIXELS = {"right": "pixels_right", "predicted": "pixels_predicted", "true": "pixels_true"}
_OBJECTS = {"predictions": "found", "references": "objects"}

# The columns of a comparison on held-out rows, by the task's prediction; see ``MetricSpec.rows``.
_POSITIONS = frozenset({"positions", "nll", "agree", "kl"})
ROWS: dict[str, frozenset[str]] = {
    "tokens": _POSITIONS | {"tokens", "correct_tokens"},
    "token classes": _POSITIONS | {"class_positions", "correct_classes"},
    "classes": _POSITIONS | {"class_positions", "correct_classes", "brier", *_CLASS_ROWS},
    "spans": _POSITIONS,
    "vectors": frozenset({"vectors"}),
    "numbers": frozenset({"predicted_numbers", "true_numbers"}),
    "boxes": frozenset(_OBJECTS.values()),
    "pixels": _POSITIONS | {"pixels_right", "pixels_predicted", "pixels_true"},
}
# Additional columns of texts that the model writes.
ROWS_OF_TEXTS = frozenset({"bleu_counts", "chrf_counts", *ROUGE})
# Additional columns of answers chosen from eval.choices, and of tags that mark entities.
ROWS_OF_CHOICES = frozenset({"class_positions", "correct_classes", *_CLASS_ROWS})
# Additional columns of spans: how right the answer to each row is.
ROWS_OF_ANSWERS = frozenset({"answer_exact", "answer_f1"})
ROWS_OF_ENTITIES = frozenset({"entities_right", "entities_predicted", "entities_true"})

METRICS: dict[str, MetricSpec] = {
    spec.name: spec
    for spec in (
        MetricSpec(
            "loss",
            needs={"nll_sum": "nll_sum", "num_tokens": "num_scored"},
            rows=("nll", "positions"),
            better="lower",
            on_short_card=True,
            label="loss",
            note="cross-entropy of the correct answer, in nats; lower is better",
        ),
        MetricSpec(
            "perplexity",
            needs={"nll_sum": "nll_sum", "num_tokens": "num_tokens"},
            rows=("nll", "tokens"),
            better="lower",
            kept_as="times",
            on_short_card=True,
            label="perplexity",
            note="equivalent to choosing uniformly among this many tokens; lower is better",
        ),
        _share(
            "token_accuracy",
            needs={"num_correct": "num_correct", "num_tokens": "num_tokens"},
            rows=("correct_tokens", "tokens"),
            kept_as="share",
            on_short_card=True,
            label="token accuracy",
            note="share of tokens that were the top prediction",
        ),
        _share(
            "exact_match",
            needs={"predictions": "rows_right", "references": "rows"},
            rows=("correct_tokens", "tokens"),
            kept_as="share",
            label="exact match",
            note="share of rows with every token correct",
        ),
        MetricSpec(
            "bleu",
            needs=_TEXTS,
            rows=("bleu_counts",),
            of_answers=True,
            highest=100.0,
            kept_as="share",
            on_short_card=True,
            label="BLEU",
            note="matching word n-grams of the texts that it writes, 0 to 100",
        ),
        MetricSpec(
            "chrf",
            needs=_TEXTS,
            rows=("chrf_counts",),
            of_answers=True,
            highest=100.0,
            kept_as="share",
            on_short_card=True,
            label="chrF",
            note="matching character n-grams of the texts that it writes, 0 to 100",
        ),
        _share("placeholders", needs=_TEXTS, of_answers=True, by_default=False, on_card=False),
        *(
            _share(
                name,
                needs=_TEXTS,
                rows=(name,),
                of_answers=True,
                kept_as="share",
                label=f"ROUGE-{name[5:]}",
                note=f"shared {what} of the texts that it writes and the references (F-measure)",
            )
            for name, what in ROUGE.items()
        ),
        _share(
            "accuracy",
            needs=_PAIRS,
            of_classes=True,
            rows=("correct_classes", "class_positions"),
            kept_as="share",
            on_short_card=True,
            label="accuracy",
            note="share of answers that are right",
        ),
        _share(
            "precision", needs=_PAIRS, of_classes=True, rows=_CLASS_ROWS, averaged=True, on_card=False, kept_as="share"
        ),
        _share(
            "recall", needs=_PAIRS, of_classes=True, rows=_CLASS_ROWS, averaged=True, on_card=False, kept_as="share"
        ),
        _share(
            "f1",
            needs=_PAIRS,
            of_classes=True,
            rows=_CLASS_ROWS,
            averaged=True,
            kept_as="share",
            label="macro F1",
            note="F1 averaged over classes, all with equal weight",
        ),
        _share(
            "squad_exact",
            needs=_ANSWERS,
            rows=("answer_exact",),
            parts=_ANSWERABLE,
            kept_as="share",
            on_short_card=True,
            label="exact match",
            note="share of questions with exactly a right answer (SQuAD)",
        ),
        _share(
            "squad_f1",
            needs=_ANSWERS,
            rows=("answer_f1",),
            parts=_ANSWERABLE,
            kept_as="share",
            on_short_card=True,
            label="answer F1",
            note="words that the answer shares with a right one, averaged over questions (SQuAD)",
        ),
        _share("labels_f1", needs=_LABEL_SETS, of_classes=True, averaged=True, label="labels' macro F1"),
        _share("labels_f1_micro", needs=_LABEL_SETS, label="labels' micro F1"),
        _share("labels_f1_samples", needs=_LABEL_SETS, label="rows' F1"),
        _share("labels_precision", needs=_LABEL_SETS, of_classes=True, averaged=True),
        _share("labels_recall", needs=_LABEL_SETS, of_classes=True, averaged=True),
        _share("labels_exact_match", needs=_LABEL_SETS, note="share of rows with exactly the right labels"),
        _share(
            "average_precision",
            needs={"probabilities": "label_probabilities", "references": "true_labels"},
            of_classes=True,
            averaged=True,
            note="precision at every recall, without a threshold",
        ),
        MetricSpec("rank_mae", needs=_RANKS, better="lower", note="mean distance from the right class, in classes"),
        MetricSpec("quadratic_kappa", needs=_RANKS, lowest=-1.0, highest=1.0),
        MetricSpec(
            "mse",
            needs=_NUMBERS,
            rows=("predicted_numbers", "true_numbers"),
            better="lower",
            kept_as="times",
            on_short_card=True,
            label="MSE",
            note="mean squared error, in the data's units; lower is better",
        ),
        MetricSpec("rmse", needs=_NUMBERS, better="lower"),
        MetricSpec(
            "mae",
            needs=_NUMBERS,
            rows=("predicted_numbers", "true_numbers"),
            better="lower",
            kept_as="times",
            label="MAE",
            note="mean absolute error, in the data's units; lower is better",
        ),
        MetricSpec("r2", needs=_NUMBERS, lowest=-math.inf, highest=1.0),
        MetricSpec("pearson", needs=_NUMBERS, lowest=-1.0, highest=1.0),
        MetricSpec("confusion", needs=_PAIRS, of_classes=True, better=None, by_default=False),
        _share("recall_at_1", needs={"ranks": "found_at"}, on_card=False),
        _share("recall_at_10", needs={"ranks": "found_at"}, on_card=False),
        MetricSpec("mrr", needs={"ranks": "first_relevant"}, highest=1.0, on_card=False),
        MetricSpec("ndcg_at_10", needs={"gains": "gains", "ideal": "ideal_gains"}, highest=1.0, on_card=False),
        _share("triplet_accuracy", needs={"right": "triplets_right"}, on_card=False),
        MetricSpec(
            "spearman_cosine",
            needs={"cosines": "cosines", "scores": "scores"},
            lowest=-1.0,
            highest=1.0,
            on_card=False,
        ),
        _share(
            "entity_f1",
            needs=_TAGS,
            rows=("entities_right", "entities_predicted", "entities_true"),
            of_classes=True,
            of_entities=True,
            kept_as="share",
            on_short_card=True,
            label="entity F1",
            note="an entity counts as found if its words and its label are right",
        ),
        _share(
            "entity_precision",
            needs=_TAGS,
            rows=("entities_right", "entities_predicted"),
            of_classes=True,
            of_entities=True,
            kept_as="share",
            label="precision",
            note="share of the predicted entities that are right",
        ),
        _share(
            "entity_recall",
            needs=_TAGS,
            rows=("entities_right", "entities_true"),
            of_classes=True,
            of_entities=True,
            kept_as="share",
            label="recall",
            note="share of the true entities that are found",
        ),
        _share(
            "map",
            needs=_OBJECTS,
            rows=tuple(_OBJECTS.values()),
            kept_as="share",
            on_short_card=True,
            label="mAP",
            note="average precision over classes and the overlaps 0.5 to 0.95 (COCO)",
        ),
        _share(
            "map_50",
            needs=_OBJECTS,
            rows=tuple(_OBJECTS.values()),
            kept_as="share",
            on_short_card=True,
            label="mAP at 0.5",
            note="average precision over classes, of boxes that overlap by half",
        ),
        _share(
            "iou",
            needs=_PIXELS,
            rows=("pixels_right", "pixels_predicted", "pixels_true"),
            of_classes=True,
            averaged=True,
            kept_as="share",
            on_short_card=True,
            label="mean IoU",
            note="pixels of a class in both masks by those in either, over all images, averaged over classes",
        ),
        _share(
            "pixel_accuracy",
            needs={"right": "pixels_right", "true": "pixels_true"},
            rows=("pixels_right", "pixels_true"),
            kept_as="share",
            on_short_card=True,
            label="pixel accuracy",
            note="share of the labelled pixels whose class is right",
        ),
        MetricSpec(
            "spearman",
            needs=_NUMBERS,
            rows=("vectors",),
            lowest=-1.0,
            highest=1.0,
            on_short_card=True,
            label="Spearman",
            note="rank correlation with the right numbers, or with the teacher's similarities of text pairs; 1 is equal",
        ),
        _share(
            "neighbour_recall",
            rows=("vectors",),
            on_short_card=True,
            label="top-10 recall",
            note="share of the teacher's ten nearest texts that it also finds",
        ),
        MetricSpec(
            "cosine",
            lowest=-1.0,
            highest=1.0,
            on_short_card=True,
            label="cosine",
            note="cosine between its vector and the teacher's for the same text; 1 is equal",
        ),
        _share(
            "agreement",
            rows=("agree", "positions"),
            on_short_card=True,
            label="agreement",
            note="how often its top answer equals the teacher's, right or wrong",
        ),
        MetricSpec(
            "kl",
            rows=("kl", "positions"),
            better="lower",
            on_short_card=True,
            label="KL to teacher",
            note="divergence of its probabilities from the teacher's, in nats; 0 is equal",
        ),
        MetricSpec(
            "ece",
            better="lower",
            highest=1.0,
            label="ECE",
            note="difference between its confidence and its accuracy; 0 is calibrated",
        ),
        MetricSpec(
            "adaptive_ece",
            better="lower",
            highest=1.0,
            label="adaptive ECE",
            note="ECE with equally many answers in every bin; 0 is calibrated",
        ),
        MetricSpec(
            "brier",
            rows=("brier", "positions"),
            better="lower",
            highest=2.0,
            label="Brier score",
            note="squared error of its probabilities; 0 is best",
        ),
    )
}

# The order on the report card; other metrics follow by name.
CARD_ORDER = (
    "squad_f1",
    "squad_exact",
    "entity_f1",
    "entity_precision",
    "entity_recall",
    "accuracy",
    "map",
    "map_50",
    "iou_macro",
    "pixel_accuracy",
    "f1_macro",
    "exact_match",
    "chrf",
    "bleu",
    *ROUGE,
    "perplexity",
    "token_accuracy",
    "loss",
    "spearman",
    "neighbour_recall",
    "cosine",
    "agreement",
    "kl",
    "ece",
    "adaptive_ece",
    "brier",
)


def class_slugs(class_names: Sequence[str]) -> list[str]:
    """The class names as used in flat metric names: white space becomes ``_``, everything else stays.

    A duplicate of an earlier name or of ``macro`` gets its class index appended.
    """
    slugs = ["macro"]
    for index, name in enumerate(class_names):
        slug = "_".join(name.split())
        while slug in slugs:
            slug = f"{slug}_{index}"
        slugs.append(slug)
    return slugs[1:]


def values_of(family: MetricSpec, class_names: Sequence[str]) -> dict[str, str]:
    """Flat value of each class, or of each entity label, -> its name. Empty for a family with one value."""
    if family.of_entities:
        labels = [name.removeprefix("B-") for name in class_names if name.startswith("B-")]
        return {f"{family.name}_{slug}": label for slug, label in zip(class_slugs(labels), labels, strict=True)}
    if family.averaged:
        return {f"{family.name}_{slug}": name for slug, name in zip(class_slugs(class_names), class_names, strict=True)}
    return {}


def family_of(name: str, class_names: Sequence[str] | None = None) -> MetricSpec | None:
    """The family of a family name or flat name; None if there is none.

    Args: class_names: the classes; None: any name of a class is accepted.
    """
    if name in METRICS:
        return METRICS[name]
    for spec in METRICS.values():
        if name in (f"{spec.name}_{part}" for part in spec.parts):
            return spec
        if not (spec.averaged or spec.of_entities) or not name.startswith(f"{spec.name}_"):
            continue
        if class_names is None or name == spec.headline or name in values_of(spec, class_names):
            return spec
    return None
