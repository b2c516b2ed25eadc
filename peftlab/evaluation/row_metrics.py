"""Metrics as functions of row counts, for ``intervals.bootstrap``.

Each function takes one number per row and returns a ``Statistic``. A ratio (token accuracy, perplexity) sums numerators
and denominators over the drawn rows before dividing, so that a row with many tokens weighs more, as in the metric.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from peftlab.measuring.intervals import Floats, Statistic


def mean(values: ArrayLike) -> Statistic:
    """The mean of ``values`` [N], one per row."""
    column = _column(values)
    return ratio(column, np.ones_like(column))


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> Statistic:
    """``sum(numerators) / sum(denominators)``, both [N]; nan if no drawn row has a denominator."""
    columns = np.stack([_column(numerators), _column(denominators)])

    def statistic(counts: Floats) -> Floats:
        above, below = _weighted_sums(counts, columns)
        with np.errstate(all="ignore"):
            return np.asarray(above / below)

    return statistic


def exp_ratio(numerators: ArrayLike, denominators: ArrayLike) -> Statistic:
    """``exp`` of ``ratio``: perplexity of summed nats and tokens."""
    inner = ratio(numerators, denominators)

    def statistic(counts: Floats) -> Floats:
        with np.errstate(over="ignore"):
            return np.asarray(np.exp(inner(counts)))

    return statistic


def share_of_class(numerators: ArrayLike, denominators: ArrayLike) -> Statistic:
    """``ratio``, but 0 if no drawn row has a denominator (scikit-learn's rule)."""
    share = ratio(numerators, denominators)

    def statistic(counts: Floats) -> Floats:
        return np.nan_to_num(share(counts), nan=0.0)

    return statistic


def of_classes(
    family: str, values: Sequence[float], references: Sequence[int], class_names: Sequence[str]
) -> dict[str, float | None]:
    """``FAMILY_CLASS`` -> value of each class; None for a class that no row has, of which nothing is measured."""
    present = set(references)
    return {
        f"{family}_{name}": float(value) if i in present else None
        for i, (name, value) in enumerate(zip(class_names, values, strict=True))
    }


def label_means(
    family: str, values: Sequence[float], references: Sequence[Sequence[int]], class_names: Sequence[str]
) -> dict[str, float | None]:
    """``FAMILY_macro``, the mean over the labels that some row has, and ``FAMILY_LABEL`` -> value of each; None for others."""
    present = {i for row in references for i, has in enumerate(row) if has}
    macro = float(np.mean([values[i] for i in sorted(present)])) if present else 0.0
    labels = {
        f"{family}_{name}": float(value) if i in present else None
        for i, (name, value) in enumerate(zip(class_names, values, strict=True))
    }
    return {f"{family}_macro": macro, **labels}


def varies(numbers: Sequence[float]) -> bool:
    """Whether there are two different ones."""
    return min(numbers) < max(numbers)


def _column(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _weighted_sums(counts: Floats, columns: Floats) -> Floats:
    """[K, D] sums of ``columns`` [K, N] over the rows of each draw of ``counts`` [D, N].

    A row that was not drawn adds nothing even if its value is infinite: 0 * inf would be nan.
    """
    finite = np.isfinite(columns)
    sums = np.where(finite, columns, 0.0) @ counts.T
    for column, row in zip(*np.nonzero(~finite), strict=True):
        sums[column, counts[:, row] > 0] += columns[column, row]
    return sums
