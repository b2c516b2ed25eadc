"""Three synthetic, realistic runs for the tests of the card and of its output."""

from __future__ import annotations

from typing import Any

import numpy as np

from peftlab.evaluation import row_metrics
from peftlab.evaluation.card import as_metrics, paired
from peftlab.evaluation.card_shape import Costs, Figures, Seed, Side
from peftlab.measuring.intervals import Estimate, bootstrap

ROWS = 1500


def side(estimates: dict[str, Estimate], costs: Costs, **values: float) -> Side:
    return Side(metrics=as_metrics(estimates, **values), **costs)


def _costs(half: bool, *, trained: bool = True, size: int = 10_649_088) -> Costs:
    num = size // 2 if half else size
    costs = Costs(num_parameters=num, file_bytes=4 * num, latency_ms=71.2 if half else 150.6)
    costs |= Costs(latency_low_ms=70.1 if half else 149.2, latency_high_ms=74.0 if half else 153.0)
    costs |= Costs(tokens_per_s=57_528.0 if half else 27_198.0)
    ratio = (2.115, 2.05, 2.18) if half else (1.0, None, None)
    costs["speed"] = {"value": ratio[0], "low": ratio[1], "high": ratio[2], "over": "rounds", "n": 50}
    if trained:
        costs |= Costs(num_trained=num, peak_memory_bytes=1_204_000_000, seconds=88.3, steps=300)
    return costs


def right(share: float, seed: int, rows: int = ROWS) -> np.ndarray:
    """[rows]: the rows that a model of this accuracy gets right. All models get the easy rows right."""
    ease = np.random.default_rng(1000).random(rows)
    noise = np.random.default_rng(seed).random(rows)
    return np.argsort(np.argsort(0.6 * ease + 0.4 * noise)) < round(share * rows)


def _classes(share: float, seed: int, kl: float | None, rows: int) -> dict[str, Estimate]:
    correct = right(share, seed, rows)
    metrics = {"accuracy": row_metrics.mean(correct), "f1_macro": row_metrics.mean(0.98 * correct)}
    if kl is not None:
        metrics["agreement"] = row_metrics.mean(right(share + 0.1, seed, rows))
        metrics["kl"] = row_metrics.mean(np.random.default_rng(seed).exponential(kl, rows))
    return bootstrap(metrics, rows, shares={"accuracy", "agreement"})


def classification(
    num_seeds: int = 5,
    *,
    teacher: float = 0.741,
    baseline: float | None = 0.472,
    student: float = 0.695,
    spread: float = 0.006,
    rows: int = ROWS,
) -> Figures:
    """The given shares of right answers. Baseline and student vary between seeds by about ``spread``."""
    seeds: list[Seed] = []
    for seed in range(num_seeds):
        offset = spread * (seed - (num_seeds - 1) / 2)
        estimates = {
            "teacher": _classes(teacher, 1, None, rows),
            "student": _classes(student + offset, 2 + seed, 0.21, rows),
        }
        if baseline is not None:
            estimates["baseline"] = _classes(baseline - offset, 20 + seed, 0.93, rows)
        one: Any = {
            "seed": 17 + seed,
            "teacher": side(estimates["teacher"], _costs(False, trained=False), ece=0.041),
            "student": side(estimates["student"], _costs(True), ece=0.032 + offset),
            "paired": paired(**estimates),
        }
        if baseline is not None:
            one["baseline"] = side(estimates["baseline"], _costs(True), ece=0.187 + offset)
        seeds.append(one)
    figures: Figures = {
        "headline": "accuracy",
        "num_rows": rows,
        "seeds": seeds,
        "timed_on": "32 rows, 4,096 tokens, CPU",
    }
    if baseline is None:
        figures["no_baseline"] = "distill.baseline: false"
    return figures


def _language(nll: float, seed: int, kl: float | None) -> dict[str, Estimate]:
    ease = np.random.default_rng(1000).normal(0, 0.5, ROWS)
    tokens = np.random.default_rng(1001).integers(20, 200, ROWS)
    noise = np.random.default_rng(seed)
    nats = tokens * np.maximum(0.05, nll + ease + noise.normal(0, 0.1, ROWS))
    correct = noise.binomial(tokens, max(0.05, 0.9 - 0.15 * nll))
    metrics = {
        "perplexity": row_metrics.exp_ratio(nats, tokens),
        "loss": row_metrics.ratio(nats, tokens),
        "token_accuracy": row_metrics.ratio(correct, tokens),
    }
    if kl is not None:
        metrics["kl"] = row_metrics.ratio(tokens * noise.exponential(kl, ROWS), tokens)
        metrics["agreement"] = row_metrics.ratio(noise.binomial(tokens, 1 - 0.6 * kl), tokens)
    return bootstrap(metrics, ROWS, shares={"token_accuracy", "agreement"})


def language_model(headline: str = "kl", *, baseline_nll: float = 3.02, student_nll: float = 2.94) -> Figures:
    """One seed; the student is 20 of 30 layers of a 134.5 M teacher."""
    estimates = {
        "teacher": _language(2.71, 1, None),
        "student": _language(student_nll, 2, 0.214),
        "baseline": _language(baseline_nll, 3, 0.351),
        "cut": _language(7.4, 4, 1.2),
    }
    small = Costs(num_parameters=99_200_000, num_trained=4_884_480, file_bytes=198_400_000, latency_ms=31.9, steps=2000)
    small |= Costs(latency_low_ms=31.7, latency_high_ms=32.4, tokens_per_s=128_401.0, seconds=611.0)
    small |= Costs(peak_memory_bytes=9_100_000_000)
    small["speed"] = {"value": 1.44, "low": 1.42, "high": 1.46, "over": "rounds", "n": 50}
    large = Costs(num_parameters=134_515_008, file_bytes=269_030_016, latency_ms=45.9, tokens_per_s=89_237.0)
    large |= Costs(latency_low_ms=45.6, latency_high_ms=46.3)
    one: Any = {
        "seed": 17,
        "teacher": side(estimates["teacher"], large, ece=0.012),
        "student": side(estimates["student"], small, ece=0.019),
        "baseline": side(estimates["baseline"], small, ece=0.031),
        "cut": side(estimates["cut"], Costs(num_parameters=99_200_000), ece=0.21),
        "paired": paired(**estimates),
    }
    return {"headline": headline, "num_rows": ROWS, "seeds": [one], "timed_on": "8 rows, 4,096 tokens, NVIDIA H200"}


def embedding() -> Figures:
    """One seed without a baseline. spearman and the other metrics compare with the teacher, which has no values of its
    own."""
    noise = np.random.default_rng(5)

    def estimates(spearman: float, recall: float) -> dict[str, Estimate]:
        draws = spearman + noise.normal(0, 0.004, 1000)
        recalls = noise.binomial(10, recall, ROWS) / 10
        recall_estimate = bootstrap({"neighbour_recall": row_metrics.mean(recalls)}, ROWS)
        return {"spearman": Estimate(spearman, draws, ROWS, 0), **recall_estimate}

    student, cut = estimates(0.845, 0.594), estimates(0.573, 0.383)
    one: Any = {
        "seed": 17,
        "teacher": side({}, _costs(False, trained=False)),
        "student": side(student, _costs(True)),
        "cut": side(cut, Costs(num_parameters=5_324_544)),
        "paired": paired(teacher={}, student=student, cut=cut),
    }
    return {
        "headline": "spearman",
        "num_rows": ROWS,
        "seeds": [one],
        "no_baseline": "task embedding has no labels",
        "timed_on": "32 rows, 1,952 tokens, CPU",
    }
