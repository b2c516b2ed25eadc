"""Recall of each label and their mean, for rows with any number of labels, computed by scikit-learn."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from sklearn.metrics import recall_score

from peftlab.evaluation.row_metrics import label_means


class LabelsRecall(evaluate.Metric):
    """Recall per label; a label without rows has none, and is not in the mean."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Recall per label and its mean, over scikit-learn.",
            citation="",
            inputs_description="predictions, references: 0 or 1 per label; class_names: one name per label.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(
        self, *, predictions: list[list[int]], references: list[list[int]], class_names: list[str]
    ) -> dict[str, float | None]:
        """``labels_recall_macro`` and one ``labels_recall_LABEL`` per label, each in 0..1."""
        values = recall_score(np.asarray(references), np.asarray(predictions), average=None, zero_division=0.0)
        return label_means("labels_recall", values, references, class_names)
