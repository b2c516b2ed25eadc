"""Confidence intervals of measured figures: over held-out rows (bootstrap), over seeds (Student t), and over the repetitions
of a timing (bootstrap of the median).

The resampled unit is the row (one example), never the token: the tokens of one text are correlated, and intervals over
tokens are several times too narrow. Two models scored on the same rows are compared draw by draw (``Estimate.minus``,
``Estimate.over``), so that rows that are hard or easy for both cancel out.
"""

from __future__ import annotations

import math
import statistics as stats
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Over = Literal["rows", "seeds", "rounds"]
# Maps row counts, [D, N] for D draws of N rows, to the metric of each draw, [D].
Statistic = Callable[[Floats], Floats]

CONFIDENCE = 0.95
DRAWS = 1000
# With fewer rows a bootstrap interval is meaningless: three rows that all improve would look certain.
MIN_ROWS = 10
# With fewer repetitions of a timing a bootstrap interval is shorter than the noise.
MIN_ROUNDS = 3


class IntervalDict(TypedDict):
    """An ``Interval`` in JSON: ``low`` and ``high`` are None if the spread is unknown."""

    value: float
    low: float | None
    high: float | None
    over: Over
    n: int


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval.

    Attributes:
        low, high: None if there are too few rows or seeds, or the figure is not finite.
        over: the resampled unit: held-out rows, training seeds, or rounds of a timing. n: the number of units.
    """

    value: float
    low: float | None
    high: float | None
    over: Over
    n: int

    def as_dict(self) -> IntervalDict:
        return {"value": self.value, "low": self.low, "high": self.high, "over": self.over, "n": self.n}


@dataclass(frozen=True, eq=False)
class Estimate:
    """A metric on all rows, and on rows drawn with replacement.

    Attributes:
        draws: [D]; a draw has the same rows for every estimate with equal ``num_rows`` and ``seed``.
        is_share: whether it is a share of the rows (or of their tokens).
        share_of: the number of rows behind the share if not all, as for the recall of one class.
    """

    value: float
    draws: Floats
    num_rows: int
    seed: int
    is_share: bool = False
    share_of: int | None = None

    def interval(self) -> Interval:
        """The 95 % percentile interval (Efron 1979).

        If all rows agree (none or all wrong), all draws are equal and the percentiles would claim certainty; a share then
        gets the exact binomial bound, 1 - 0.025^(1/n) away (Clopper and Pearson 1934).
        """
        if self.num_rows < MIN_ROWS or math.isnan(self.value):
            return Interval(self.value, None, None, "rows", self.num_rows)
        if self.is_share and self.value in (0.0, 1.0):
            bound = 1 - ((1 - CONFIDENCE) / 2) ** (1 / max(1, self.share_of or self.num_rows))
            low, high = (0.0, bound) if self.value == 0 else (1 - bound, 1.0)
        else:
            # Order statistics, because interpolating between infinite draws gives nan.
            cuts = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
            low, high = (float(x) for x in np.quantile(self.draws, cuts, method="inverted_cdf"))
        known = not (math.isnan(low) or math.isnan(high))
        return Interval(self.value, low if known else None, high if known else None, "rows", self.num_rows)

    def minus(self, other: Estimate) -> Estimate:
        """Returns the difference, draw by draw. Raises: ValueError if the draws differ."""
        return self._paired(other, np.subtract)

    def over(self, other: Estimate) -> Estimate:
        """Returns the ratio, draw by draw. Raises: as ``minus``."""
        return self._paired(other, np.divide)

    def _paired(self, other: Estimate, operation: np.ufunc) -> Estimate:
        mine, theirs = ((e.num_rows, e.seed, len(e.draws)) for e in (self, other))
        if mine != theirs:
            raise ValueError(f"expected estimates on the same (rows, seed, draws), found {mine} and {theirs}")
        with np.errstate(all="ignore"):
            value = float(operation(np.float64(self.value), np.float64(other.value)))
            return Estimate(value, operation(self.draws, other.draws), self.num_rows, self.seed)


def bootstrap(
    statistics: Mapping[str, Statistic],
    num_rows: int,
    *,
    shares: Collection[str] = (),
    shares_of: Mapping[str, int] | None = None,
    num_draws: int = DRAWS,
    seed: int = 0,
    max_drawn: int = 2**22,
) -> dict[str, Estimate]:
    """Estimates each metric on all rows and on ``num_draws`` draws of ``num_rows`` rows with replacement.

    All calls with the same ``num_rows`` and ``seed`` use the same draws.

    Args:
        shares: names of the metrics that are shares of the rows; see ``Estimate.interval``.
        shares_of: names of the metrics that are shares of some rows -> number of those rows.
        max_drawn: rows drawn at a time, which limits memory and changes no value.
    """
    if num_rows < 1:
        raise ValueError(f"expected at least one row, found {num_rows}")
    rng = np.random.default_rng(seed)
    draws = {name: np.empty(num_draws) for name in statistics}
    block = max(1, max_drawn // num_rows)
    for first in range(0, num_draws, block):
        size = min(block, num_draws - first)
        drawn = rng.integers(0, num_rows, (size, num_rows)) + num_rows * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * num_rows).reshape(size, num_rows).astype(np.float64)
        for name, statistic in statistics.items():
            draws[name][first : first + size] = statistic(counts)
    once = np.ones((1, num_rows))
    some = shares_of or {}
    return {
        name: Estimate(
            float(statistic(once)[0]), draws[name], num_rows, seed, name in shares or name in some, some.get(name)
        )
        for name, statistic in statistics.items()
    }


def over_seeds(values: Sequence[float]) -> Interval:
    """Returns the mean over seeds, with the Student t interval of the mean if there are at least two."""
    n = len(values)
    with np.errstate(all="ignore"):
        mean = float(np.mean(values))
        if n < 2 or not math.isfinite(mean):
            return Interval(mean, None, None, "seeds", n)
        from scipy.special import stdtrit

        half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2) * np.std(values, ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, "seeds", n)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns first quartile, median and third quartile, interpolated; a single value three times."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = stats.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def over_rounds(values: Sequence[float], *, min_rounds: int = MIN_ROUNDS, seed: int = 0) -> Interval:
    """Returns the median over repetitions, with its percentile interval (Efron 1979) from ``min_rounds`` on."""
    return _of_medians(float(np.median(values)), lambda drawn: _medians(values, drawn), len(values), min_rounds, seed)


def ratio_of_medians(
    above: Sequence[float], below: Sequence[float], *, paired: bool = True, min_rounds: int = MIN_ROUNDS, seed: int = 0
) -> Interval:
    """Returns the ratio of two medians, with its interval over repetitions.

    Args: paired: resample the i-th values together, because they were measured next to each other and share slowdowns of
        the machine. Otherwise each side is resampled separately.
    Raises: ValueError for unequal numbers of pairs.
    """
    if paired and len(above) != len(below):
        raise ValueError(f"expected equally many values on both sides, found {len(above)} and {len(below)}")
    value = float(np.median(above) / np.median(below))
    other = np.random.default_rng(seed + 1).integers(0, len(below), (DRAWS, len(below)))

    def draws(drawn: NDArray[np.int64]) -> Floats:
        return np.asarray(_medians(above, drawn) / _medians(below, drawn if paired else other), dtype=np.float64)

    n = min(len(above), len(below))
    return _of_medians(value, draws, n, min_rounds, seed, num_values=len(above))


def _medians(values: Sequence[float], drawn: NDArray[np.int64]) -> Floats:
    return np.asarray(np.median(np.asarray(values, dtype=np.float64)[drawn], axis=1), dtype=np.float64)


def _of_medians(
    value: float,
    draws: Callable[[NDArray[np.int64]], Floats],
    n: int,
    min_rounds: int,
    seed: int,
    num_values: int | None = None,
) -> Interval:
    if n < min_rounds or not math.isfinite(value):
        return Interval(value, None, None, "rounds", n)
    size = num_values or n
    drawn = np.random.default_rng(seed).integers(0, size, (DRAWS, size))
    low, high = np.quantile(draws(drawn), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Interval(value, float(low), float(high), "rounds", n)
