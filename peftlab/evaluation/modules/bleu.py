"""BLEU of a corpus, as sacrebleu computes it."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import evaluate

from peftlab.evaluation import text_scores
from peftlab.measuring.intervals import Floats, Statistic


class Bleu(evaluate.Metric):
    """One value for all texts: no mean over rows."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="BLEU of a corpus.",
            citation="",
            inputs_description="predictions, references: texts, one reference each.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, *, predictions: list[str], references: list[str]) -> dict[str, float]:
        """``bleu`` in 0..100."""
        return {"bleu": text_scores.corpus_score(text_scores.bleu(), predictions, references)}


def statistic(rows: Mapping[str, Floats]) -> Statistic:
    """BLEU of drawn rows."""
    return text_scores.corpus_statistic(text_scores.bleu, rows["bleu_counts"])
