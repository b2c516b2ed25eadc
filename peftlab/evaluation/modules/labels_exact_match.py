"""The share of rows with exactly the right labels, computed by scikit-learn."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score


class LabelsExactMatch(evaluate.Metric):
    """Share of rows whose labels are all right (subset accuracy)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of rows with exactly the right labels, over scikit-learn.",
            citation="",
            inputs_description="predictions, references: 0 or 1 per label.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(self, *, predictions: list[list[int]], references: list[list[int]]) -> dict[str, float]:
        """``labels_exact_match`` in 0..1."""
        return {"labels_exact_match": float(accuracy_score(np.asarray(references), np.asarray(predictions)))}
