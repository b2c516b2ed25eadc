"""The share of written texts that keep the placeholders of their reference, such as %(name)s or {0}."""

from __future__ import annotations

import datasets
import evaluate

from peftlab.evaluation import text_scores


class Placeholders(evaluate.Metric):
    """Only rows whose reference has placeholders count; their order does not."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Share of texts that keep the placeholders of their reference.",
            citation="",
            inputs_description="predictions, references: texts, one reference each.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, *, predictions: list[str], references: list[str]) -> dict[str, float | None]:
        """``placeholders`` in 0..1; None if no reference has any."""
        return {"placeholders": text_scores.kept_placeholders(predictions, references)}
