"""Intervals against scipy, and how often they cover the truth."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from peftlab.evaluation import row_metrics
from peftlab.evaluation.modules.f1 import macro_f1
from peftlab.measuring.intervals import Estimate, bootstrap, over_rounds, over_seeds, quartiles, ratio_of_medians

SETS = 200


def _coverage(one_set: Callable[[np.random.Generator], Estimate], truth: float) -> float:
    """Share of simulated data sets whose interval covers the truth."""
    intervals = [one_set(np.random.default_rng(seed)).interval() for seed in range(SETS)]
    return sum(f.low is not None and f.high is not None and f.low <= truth <= f.high for f in intervals) / SETS


def _texts(rng: np.random.Generator, num: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Texts of 5 to 100 tokens with different shares of right tokens: (right tokens, tokens), [num]."""
    tokens = rng.integers(5, 100, num)
    return rng.binomial(tokens, rng.beta(2, 2, num)), tokens


def test_bootstrap_interval_of_a_share_covers_in_95_of_100() -> None:
    def one_set(rng: np.random.Generator) -> Estimate:
        return bootstrap({"m": row_metrics.mean(rng.random(100) < 0.7)}, 100)["m"]

    assert 0.90 <= _coverage(one_set, 0.7) <= 0.99


def test_bootstrap_of_a_ratio_covers_over_rows_and_not_over_tokens() -> None:
    """The fault: tokens are drawn one by one, as if the tokens of a text were independent."""

    def by_rows(rng: np.random.Generator) -> Estimate:
        return bootstrap({"m": row_metrics.ratio(*_texts(rng))}, 60)["m"]

    def by_tokens(rng: np.random.Generator) -> Estimate:
        right, tokens = _texts(rng)
        single = np.repeat([1.0, 0.0], [right.sum(), tokens.sum() - right.sum()])
        return bootstrap({"m": row_metrics.mean(single)}, len(single), num_draws=200)["m"]

    # The mean of the beta distribution, at any length.
    assert 0.90 <= _coverage(by_rows, 0.5) <= 0.99
    assert _coverage(by_tokens, 0.5) < 0.6


def test_paired_difference_covers_and_is_narrower_than_an_unpaired_one() -> None:
    def both(rng: np.random.Generator) -> tuple[Estimate, Estimate]:
        ease = rng.random(120)
        a, b = (0.8 * ease + 0.2 * rng.random(120) > cut for cut in (0.4, 0.5))
        estimates = bootstrap({"a": row_metrics.mean(a), "b": row_metrics.mean(b)}, 120)
        return estimates["a"], estimates["b"]

    many = np.random.default_rng(9)
    ease = many.random(2_000_000)
    truth = [np.mean(0.8 * ease + 0.2 * many.random(len(ease)) > cut) for cut in (0.4, 0.5)]
    assert 0.90 <= _coverage(lambda rng: (lambda p: p[0].minus(p[1]))(both(rng)), truth[0] - truth[1]) <= 0.99
    assert 0.90 <= _coverage(lambda rng: (lambda p: p[1].over(p[0]))(both(rng)), truth[1] / truth[0]) <= 0.99
    a, b = both(np.random.default_rng(0))
    # The fault: the draws are of different rows.
    apart = Estimate(a.value - b.value, a.draws - b.draws[::-1], 120, 0).interval()
    together = a.minus(b).interval()
    assert together.low is not None and together.high is not None and apart.low is not None and apart.high is not None
    assert together.high - together.low < 0.8 * (apart.high - apart.low)


def test_bootstrap_interval_equals_scipys() -> None:
    values = np.random.default_rng(1).exponential(2.0, 80)
    ours = bootstrap({"m": row_metrics.mean(values)}, 80, num_draws=9999)["m"].interval()
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(2)).confidence_interval
    # Two times 9,999 random draws: the 2.5 % points differ by about 1 % of the standard error of 0.22.
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)
    assert ours.value == pytest.approx(values.mean()) and ours.over == "rows" and ours.n == 80


def test_ratio_draws_numerators_and_denominators_together() -> None:
    nats, tokens = np.array([2.0, 30.0, 1.0]), np.array([1.0, 10.0, 5.0])
    counts = np.array([[1.0, 1.0, 1.0], [2.0, 0.0, 1.0]])
    assert row_metrics.ratio(nats, tokens)(counts) == pytest.approx([33 / 16, 5 / 7])
    assert row_metrics.exp_ratio(nats, tokens)(counts) == pytest.approx([math.exp(33 / 16), math.exp(5 / 7)])


def test_mean_counts_an_infinite_row_only_where_it_was_drawn() -> None:
    means = row_metrics.mean([1.0, np.inf, 3.0])(np.array([[1.0, 0.0, 2.0], [1.0, 1.0, 1.0]]))
    assert means.tolist() == [pytest.approx(7 / 3), np.inf]


def test_macro_f1_of_drawn_rows_equals_scikit_learns_on_repeated_rows() -> None:
    rng = np.random.default_rng(3)
    predictions, references = rng.integers(0, 5, 40), rng.integers(0, 6, 40)
    counts = rng.multinomial(40, np.ones(40) / 40, 20)
    expected = [
        f1_score(np.repeat(references, count), np.repeat(predictions, count), average="macro") for count in counts
    ]
    assert macro_f1(predictions, references)(counts.astype(float)) == pytest.approx(expected, abs=1e-12)


def test_bootstrap_in_blocks_gives_the_same_draws() -> None:
    metric = {"m": row_metrics.mean(np.arange(50.0))}
    whole = bootstrap(metric, 50, num_draws=20)["m"].draws
    assert bootstrap(metric, 50, num_draws=20, max_drawn=150)["m"].draws.tolist() == whole.tolist()


def test_bootstrap_of_rows_that_all_agree_has_the_exact_binomial_bound() -> None:
    for right in (True, False):
        interval = bootstrap({"m": row_metrics.mean([right] * 30)}, 30, shares={"m"})["m"].interval()
        exact = stats.binomtest(30 * right, 30).proportion_ci(0.95, method="exact")
        assert (interval.low, interval.high) == pytest.approx((exact.low, exact.high))
    # A mean that is no share, such as a KL of 0 in every row, gets no binomial bound.
    interval = bootstrap({"m": row_metrics.mean([0.0] * 30)}, 30)["m"].interval()
    assert (interval.low, interval.high) == (0.0, 0.0)


def test_bootstrap_of_too_few_rows_gives_no_interval() -> None:
    interval = bootstrap({"m": row_metrics.mean(np.arange(9.0))}, 9)["m"].interval()
    assert interval.as_dict() == {"value": 4.0, "low": None, "high": None, "over": "rows", "n": 9}


def test_minus_refuses_estimates_on_other_draws() -> None:
    metric = row_metrics.mean(np.arange(20.0))
    a, b = (bootstrap({"m": metric}, 20, seed=seed)["m"] for seed in (0, 1))
    with pytest.raises(ValueError, match=r"expected estimates on the same \(rows, seed, draws\)"):
        a.minus(b)


def test_over_seeds_equals_students_t() -> None:
    values = [0.695, 0.701, 0.688, 0.699, 0.692]
    interval = over_seeds(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.value == pytest.approx(0.695) and (interval.over, interval.n) == ("seeds", 5)


@pytest.mark.parametrize("values", [[0.5], [0.5, math.inf], [math.nan, 0.5]])
def test_over_seeds_of_one_or_infinite_values_has_no_bounds(values: list[float]) -> None:
    assert (over_seeds(values).low, over_seeds(values).high) == (None, None)


def test_over_seeds_of_two_covers_in_95_of_100() -> None:
    rng = np.random.default_rng(4)
    intervals = [over_seeds(rng.normal(1.0, 0.3, 2).tolist()) for _ in range(1000)]
    share = np.mean([f.low is not None and f.high is not None and f.low <= 1.0 <= f.high for f in intervals])
    # Three standard errors of a share of 1,000.
    assert share == pytest.approx(0.95, abs=0.021)


def test_quartiles_of_five_of_two_and_of_one() -> None:
    assert quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)
    assert quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_over_rounds_of_two_gives_no_interval() -> None:
    assert over_rounds([1.0, 2.0]).as_dict() == {"value": 1.5, "low": None, "high": None, "over": "rounds", "n": 2}
    interval = over_rounds([1.0, 2.0, 3.0])
    assert (interval.value, interval.low, interval.high) == (2.0, 1.0, 3.0)


def test_ratio_of_medians_ignores_a_slow_spell_that_hits_both() -> None:
    """The machine is ten times as slow in the last two repetitions. Within each repetition the first takes twice the
    second."""
    slow = [1.0, 1.1, 0.9, 10.0, 11.0]
    interval = ratio_of_medians([2 * s for s in slow], slow)
    assert (interval.value, interval.low, interval.high) == pytest.approx((2.0, 2.0, 2.0))
    with pytest.raises(ValueError, match="equally many values on both sides, found 1 and 2"):
        ratio_of_medians([1.0], [1.0, 2.0])
