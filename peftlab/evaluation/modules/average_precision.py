"""Average precision of each label and their mean, computed by scikit-learn."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from sklearn.metrics import average_precision_score

from peftlab.evaluation.row_metrics import label_means


class AveragePrecision(evaluate.Metric):
    """Average precision per label, which needs no threshold; a label without rows has none, and is not in the mean."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Average precision per label and its mean, over scikit-learn.",
            citation="",
            inputs_description="probabilities: one per label; references: 0 or 1 per label; class_names: one name per label.",
            features=datasets.Features(
                {
                    "probabilities": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(
        self, *, probabilities: list[list[float]], references: list[list[int]], class_names: list[str]
    ) -> dict[str, float | None]:
        """``average_precision_macro`` and one ``average_precision_LABEL`` per label, each in 0..1."""
        right, scores = np.asarray(references), np.asarray(probabilities)
        values = [
            average_precision_score(right[:, i], scores[:, i]) if right[:, i].any() else 0.0
            for i in range(right.shape[1])
        ]
        return label_means("average_precision", values, references, class_names)
