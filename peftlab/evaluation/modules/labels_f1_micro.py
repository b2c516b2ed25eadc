"""F1 of all decisions together, for rows with any number of labels, computed by scikit-learn."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from sklearn.metrics import f1_score


class LabelsF1Micro(evaluate.Metric):
    """F1 of all decisions together."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1 with average micro, over scikit-learn.",
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
        """``labels_f1_micro`` in 0..1."""
        value = f1_score(np.asarray(references), np.asarray(predictions), average="micro", zero_division=0.0)
        return {"labels_f1_micro": float(value)}
