"""Metrics as functions of how often each row counts: what ``intervals.bootstrap`` draws.

Each function takes one number per row and returns a ``Statistic``. A ratio (token accuracy, perplexity) sums its
numerators and denominators over the drawn rows before it divides: a row with many tokens weighs more, as it does in
the metric itself.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from peftlab.evaluation.intervals import Floats, Statistic


def mean(values: ArrayLike) -> Statistic:
    """The mean of ``values`` [N], one per row."""
    column = _column(values)
    return ratio(column, np.ones_like(column))


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> Statistic:
    """``sum(numerators) / sum(denominators)``, both [N]; nan where no drawn row has a denominator."""
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


def macro_f1(predictions: ArrayLike, references: ArrayLike) -> Statistic:
    """F1 averaged over the classes that occur among the drawn rows, as prediction or reference (scikit-learn's rule).

    Args:
        predictions, references: [N] class indices.
    """
    from scipy.sparse import csr_array

    predicted, true = np.asarray(predictions), np.asarray(references)
    num_classes = int(max(predicted.max(), true.max())) + 1
    everyone = np.arange(len(true))

    def one_hot(classes: np.ndarray, rows: np.ndarray) -> csr_array:
        return csr_array((np.ones(len(rows)), (rows, classes)), shape=(len(true), num_classes))

    hits = np.flatnonzero(predicted == true)
    hit, found, there = one_hot(true[hits], hits), one_hot(predicted, everyone), one_hot(true, everyone)

    def statistic(counts: Floats) -> Floats:
        size = counts @ found + counts @ there
        f1 = np.divide(2 * (counts @ hit), size, out=np.zeros_like(size), where=size > 0)
        return np.asarray(f1.sum(axis=1) / (size > 0).sum(axis=1))

    return statistic


def of_class(family: str, predictions: ArrayLike, references: ArrayLike, index: int) -> Statistic:
    """Recall, precision or F1 of the class ``index``; 0 where no drawn row has it (scikit-learn's rule).

    Args: family: recall, precision or f1. predictions, references: [N] class indices.
    """
    predicted, true = (np.asarray(values) == index for values in (predictions, references))
    divisor = {"recall": 2.0 * true, "precision": 2.0 * predicted, "f1": 1.0 * true + predicted}[family]
    share = ratio(2.0 * (predicted & true), divisor)

    def statistic(counts: Floats) -> Floats:
        return np.nan_to_num(share(counts), nan=0.0)

    return statistic


def _column(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _weighted_sums(counts: Floats, columns: Floats) -> Floats:
    """[K, D] sums of ``columns`` [K, N] over the rows of each draw of ``counts`` [D, N].

    A row that was not drawn adds nothing even where its value is infinite: 0 * inf would be nan.
    """
    finite = np.isfinite(columns)
    sums = np.where(finite, columns, 0.0) @ counts.T
    for column, row in zip(*np.nonzero(~finite), strict=True):
        sums[column, counts[:, row] > 0] += columns[column, row]
    return sums
