"""Calibration: expected calibration error from streamed counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 15
# Cells per bin of the streamed counts; equal-mass bins are built from them, to 1/15,000 of confidence.
_CELLS_PER_BIN = 1000


class Calibration:
    """Counts over confidence, the probability of a model's top class; always 360 KB.

    Attributes:
        counts: [cells, 3] float64: number of predictions, summed confidence, number correct.
    """

    def __init__(self) -> None:
        self.counts = np.zeros((NUM_BINS * _CELLS_PER_BIN, 3))

    def add(self, confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> None:
        """Adds predictions: ``confidence`` [N] in (0, 1] and whether each is correct, [N]."""
        cells = len(self.counts)
        # Bins exclude their left end and include the right one, as in the paper: 0.2 is in (2/15, 3/15].
        cell = np.clip(np.ceil(confidence * cells).astype(np.int64) - 1, 0, cells - 1)
        for column, weights in enumerate((np.ones_like(confidence), confidence, correct.astype(np.float64))):
            self.counts[:, column] += np.bincount(cell, weights, minlength=cells)

    def ece(self) -> float:
        """Expected calibration error with 15 bins of equal width: ``sum over bins n_b / n |right_b - confidence_b|``.

        0 to 1; nan without predictions. Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3.
        """
        return _error(self.counts.reshape(NUM_BINS, _CELLS_PER_BIN, 3).sum(axis=1))

    def adaptive_ece(self) -> float:
        """The same with 15 bins of equal counts, as a cross-check: most confidences are near 1.

        Predictions in one cell of 1/15,000 share a bin, as equal confidences must.
        Source: Nixon et al. 2019, "Measuring Calibration in Deep Learning", section 3.
        """
        filled = self.counts[self.counts[:, 0] > 0]
        if not len(filled):
            return float("nan")
        # A cell goes into the bin of its middle prediction in sorted order.
        middle = np.cumsum(filled[:, 0]) - filled[:, 0] / 2
        bins = np.minimum((middle * NUM_BINS / filled[:, 0].sum()).astype(np.int64), NUM_BINS - 1)
        return _error(np.stack([np.bincount(bins, column, minlength=NUM_BINS) for column in filled.T], axis=1))


def _error(bins: NDArray[np.float64]) -> float:
    """Calibration error of ``bins`` [B, 3]: predictions, summed confidence, number correct."""
    total = bins[:, 0].sum()
    return float(np.abs(bins[:, 2] - bins[:, 1]).sum() / total) if total else float("nan")
