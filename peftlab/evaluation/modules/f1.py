"""F1 of each class and their macro average, computed by scikit-learn."""

from __future__ import annotations

import datasets
import evaluate
from sklearn.metrics import f1_score


class F1(evaluate.Metric):
    """F1 per class; a class without predictions and references scores 0.

    The macro average is over the classes that occur in the references or the predictions.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1 per class and its macro average, over scikit-learn.",
            citation="",
            inputs_description="predictions, references: class indices; class_names: one name per class index.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, *, predictions: list[int], references: list[int], class_names: list[str]) -> dict[str, float]:
        """``f1_macro`` and one ``f1_CLASS`` per class name, each in 0..1."""
        macro = f1_score(references, predictions, average="macro", zero_division=0.0)
        indices = list(range(len(class_names)))
        values = f1_score(references, predictions, labels=indices, average=None, zero_division=0.0)
        per_class = {f"f1_{class_name}": float(v) for class_name, v in zip(class_names, values, strict=True)}
        return {"f1_macro": float(macro), **per_class}
