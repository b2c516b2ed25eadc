"""Metrics of several labels, ranks and numbers, streamed in batches, against scikit-learn and scipy on all rows."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from peftlab.evaluation.scorer import Scorer

RNG = np.random.default_rng(0)
TRUE, SCORES = (RNG.random((60, 3)) < [0.2, 0.5, 0.8]).astype(int), RNG.random((60, 3))
CHOSEN = (SCORES > 0.5).astype(int)


def streamed(
    names: list[str], columns: dict[str, np.ndarray], classes: list[str] | None = None
) -> dict[str, float | None]:
    scorer = Scorer(names, class_names=classes)
    for part in np.array_split(np.arange(len(next(iter(columns.values())))), 7):
        scorer.add({name: values[part].tolist() for name, values in columns.items()})
    return scorer.compute()


def test_metrics_of_label_sets() -> None:
    names = [
        "labels_f1",
        "labels_f1_micro",
        "labels_f1_samples",
        "labels_precision",
        "labels_recall",
        "labels_exact_match",
    ]
    columns = {"predicted_labels": CHOSEN, "true_labels": TRUE, "label_probabilities": SCORES}
    found = streamed([*names, "average_precision"], columns, ["a", "b", "c"])
    assert found["labels_f1_macro"] == pytest.approx(sk.f1_score(TRUE, CHOSEN, average="macro"))
    assert found["labels_f1_micro"] == pytest.approx(sk.f1_score(TRUE, CHOSEN, average="micro"))
    assert found["labels_f1_samples"] == pytest.approx(sk.f1_score(TRUE, CHOSEN, average="samples", zero_division=1.0))
    assert found["labels_exact_match"] == pytest.approx(sk.accuracy_score(TRUE, CHOSEN))
    assert found["average_precision_macro"] == pytest.approx(sk.average_precision_score(TRUE, SCORES, average="macro"))
    for i, name in enumerate("abc"):
        assert found[f"labels_recall_{name}"] == pytest.approx(sk.recall_score(TRUE[:, i], CHOSEN[:, i]))
        assert found[f"labels_precision_{name}"] == pytest.approx(sk.precision_score(TRUE[:, i], CHOSEN[:, i]))


def test_a_label_that_no_row_has_is_not_in_the_mean() -> None:
    true = TRUE.copy()
    true[:, 2] = 0
    found = streamed(["labels_f1"], {"predicted_labels": CHOSEN, "true_labels": true}, ["a", "b", "c"])
    assert found["labels_f1_c"] is None
    assert found["labels_f1_macro"] == pytest.approx(sk.f1_score(true[:, :2], CHOSEN[:, :2], average="macro"))


def test_metrics_of_ranks() -> None:
    true, found = RNG.integers(0, 5, 60), RNG.integers(0, 5, 60)
    values = streamed(["rank_mae", "quadratic_kappa"], {"predicted_ranks": found, "true_ranks": true})
    assert values["rank_mae"] == pytest.approx(np.abs(true - found).mean())
    assert values["quadratic_kappa"] == pytest.approx(sk.cohen_kappa_score(true, found, weights="quadratic"))


def test_metrics_of_numbers() -> None:
    true = RNG.normal(2000, 5, 60)
    found = true + RNG.normal(0, 3, 60)
    names = ["mse", "rmse", "mae", "r2", "pearson", "spearman"]
    values = streamed(names, {"predicted_numbers": found, "true_numbers": true})
    assert values["mse"] == pytest.approx(np.square(true - found).mean())
    assert values["rmse"] == pytest.approx(np.sqrt(np.square(true - found).mean()))
    assert values["mae"] == pytest.approx(np.abs(true - found).mean())
    assert values["r2"] == pytest.approx(1 - np.square(true - found).sum() / np.square(true - true.mean()).sum())
    assert values["pearson"] == pytest.approx(np.corrcoef(true, found)[0, 1])
    assert values["spearman"] == pytest.approx(stats.spearmanr(true, found).statistic)
    constant = streamed(["spearman"], {"predicted_numbers": np.ones(60), "true_numbers": true})
    assert np.isnan(constant["spearman"])
