"""F1 of each row, averaged over rows, for rows with any number of labels, computed by scikit-learn."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from sklearn.metrics import f1_score


class LabelsF1Samples(evaluate.Metric):
    """F1 of each row, averaged over rows; a row without labels counts 1 if none is predicted."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1 with average samples, over scikit-learn.",
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
        """``labels_f1_samples`` in 0..1."""
        value = f1_score(np.asarray(references), np.asarray(predictions), average="samples", zero_division=1.0)
        return {"labels_f1_samples": float(value)}
