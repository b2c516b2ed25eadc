"""Scores of written texts against references: BLEU and chrF by sacrebleu, ROUGE by rouge-score.

BLEU and chrF of a corpus are functions of counts per row (matching n-grams and lengths) that are summed over the rows, so
their intervals over drawn rows need no second look at the texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from peftlab.measuring.intervals import Floats, Statistic
from peftlab.specs.metrics import ROUGE


def bleu() -> Any:
    """sacrebleu's default: tokenizer 13a, exponential smoothing."""
    return BLEU()


def chrf() -> Any:
    """sacrebleu's default: chrF2, 6-grams of characters."""
    return CHRF()


def signatures() -> dict[str, str]:
    """How the values were computed, in sacrebleu's format, by metric."""
    metrics = {"bleu": bleu(), "chrf": chrf()}
    for metric in metrics.values():
        metric.corpus_score(["a"], [["a"]])
    return {name: str(metric.get_signature()) for name, metric in metrics.items()}


def rouge_rows(kind: str, answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """The F-measure of ROUGE ``kind`` of each row, in 0..1, with Porter's stemmer as usual for English summaries."""
    scorer = RougeScorer([kind], use_stemmer=True)
    return [float(scorer.score(r, a)[kind].fmeasure) for a, r in zip(answers, references, strict=True)]


def answer_rows(answers: Sequence[str], references: Sequence[str]) -> dict[str, Floats]:
    """The columns of ``evaluation.comparison`` for the metrics of texts, [num_rows] or [num_rows, counts] each."""
    columns: dict[str, Floats] = {
        f"{name}_counts": np.asarray(metric._extract_corpus_statistics(list(answers), [list(references)]), dtype=float)
        for name, metric in (("bleu", bleu()), ("chrf", chrf()))
    }
    return columns | {kind: np.asarray(rouge_rows(kind, answers, references)) for kind in ROUGE}


def corpus_statistic(make: Callable[[], Any], counts: Floats) -> Statistic:
    """sacrebleu's value of drawn rows. Args: counts: [num_rows, K] of ``answer_rows``."""
    metric = make()

    def statistic(draws: Floats) -> Floats:
        sums = np.atleast_2d(draws) @ counts
        return np.array([metric._compute_score_from_stats(np.rint(row).astype(int).tolist()).score for row in sums])

    return statistic


def corpus_score(metric: Any, answers: Sequence[str], references: Sequence[str]) -> float:
    """0..100."""
    return float(metric.corpus_score(list(answers), [list(references)]).score)
