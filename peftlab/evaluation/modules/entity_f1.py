"""F1 of entities, over all of them and of each label, by the definition of CoNLL."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import evaluate

from peftlab.evaluation.entity_counts import entity_statistic, entity_values, label_statistic
from peftlab.measuring.intervals import Floats, Statistic


class EntityF1(evaluate.Metric):
    """Harmonic mean of precision and recall: with the same words and label."""

    def _info(self) -> evaluate.MetricInfo:
        columns = ("predictions", "references", "starts")
        return evaluate.MetricInfo(
            description="F1 of entities, over all and of each label.",
            citation="",
            inputs_description="predictions, references: class indices of words; starts: whether a row begins at the word; "
            "class_names: one BIO tag per class index.",
            features=datasets.Features({name: datasets.Value("int64") for name in columns}),
        )

    def _compute(
        self, *, predictions: list[int], references: list[int], starts: list[int], class_names: list[str]
    ) -> dict[str, float | None]:
        """``entity_f1`` and one ``entity_f1_LABEL`` per label, each in 0..1; None for a label that no row has."""
        return entity_values("entity_f1", "f1", predictions, references, starts, class_names)


def statistic(rows: Mapping[str, Floats]) -> Statistic:
    """``entity_f1`` over drawn rows."""
    return entity_statistic("f1", rows)


def statistic_of_class(rows: Mapping[str, Floats], index: int) -> tuple[Statistic, int]:
    """That of the label ``index`` over drawn rows, and the number of rows with such an entity."""
    return label_statistic("f1", rows, index)
