"""Compares a model with its teacher on held-out rows: a few numbers per row, from streamed logits (contract C10)."""

# Shapes: N scored positions of one call, V classes or vocabulary entries.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peftlab.errors import DataError, VerificationError
from peftlab.evaluation.calibration import Calibration
from peftlab.evaluation.entity_counts import entities_per_row
from peftlab.evaluation.pixel_counts import COLUMNS as PIXELS
from peftlab.measuring.intervals import Estimate, Floats, Statistic, bootstrap
from peftlab.specs.metrics import METRICS
from peftlab.specs.task_spec import Predicts

# Metrics that range from 0 (no row or token correct) to 1 (all correct); see ``Estimate.interval``.
SHARES = frozenset(spec.headline for spec in METRICS.values() if spec.share and spec.rows)
# Maximum number of logits per softmax: 16 MB of float32.
_BLOCK = 2**22
_COLUMNS = ("positions", "nll", "correct", "brier", "agree", "kl")


class Comparison:
    """Per-row sums for the report card of one model. Keeps 56 bytes per row, with ``tags`` 12 per position, and nothing of
    size V.

    Args:
        num_rows: number of held-out rows. Compare models on the same rows only.
        predicts: see ``TaskSpec``. "tokens", "token classes", "spans", "pixels": a row has any number of scored positions.
            "classes": exactly one.
        tags: the class names, if they mark entities; a row's positions then come in order.

    Attributes:
        calibration: over all positions.
    """

    def __init__(self, num_rows: int, *, predicts: Predicts, tags: Sequence[str] | None = None) -> None:
        self.num_rows, self.predicts = num_rows, predicts
        self._tags = tags
        self._tagged: list[NDArray[np.int32]] = []
        self.calibration = Calibration()
        self._sums = {name: np.zeros(num_rows) for name in _COLUMNS}
        self._classes = np.full((2, num_rows), -1, dtype=np.int32)
        self._pixels: Floats | None = None
        self._has_teacher: bool | None = None

    @torch.no_grad()
    def add(self, logits: Tensor, targets: Tensor, row: Tensor, teacher: Tensor | None = None) -> None:
        """Adds scored positions; a row's positions may be split over several calls.

        Args:
            logits: [N, V]; float64 is computed in float64, other dtypes in float32. -inf marks a class that does not exist.
            targets: [N] int64, the correct classes. row: [N] int64 in 0..num_rows-1, the row of each position.
            teacher: [N, V] logits of the teacher at the same positions, on the same device; in every call or in none.

        Raises:
            VerificationError: a logit is nan or +inf.
            ValueError: mismatched shapes, a row out of range, or a teacher in some calls only.
        """
        self._check(logits, targets, row, teacher)
        where = row.cpu().numpy()
        for part in _blocks(*logits.shape):
            seen = {"targets": targets[part], "logits": logits[part]}
            figures = _position_figures(**seen, teacher=None if teacher is None else teacher[part])
            values = {name: value.cpu().numpy() for name, value in figures.items()}
            for name in self._sums.keys() & values.keys():
                # On the CPU, so that the order of additions is fixed.
                self._sums[name] += np.bincount(where[part], values[name].astype(np.float64), minlength=self.num_rows)
            self.calibration.add(values["confidence"].astype(np.float64), values["correct"])
            if self._tags is not None:
                tagged = np.stack([where[part], values["top"], targets[part].cpu().numpy()])
                self._tagged.append(tagged.astype(np.int32))
            if self.predicts == "pixels":
                self._add_pixels(where[part], values["top"], targets[part].cpu().numpy(), logits.shape[1])
            if self.predicts == "classes":
                self._classes[0, where[part]] = values["top"]
                self._classes[1, where[part]] = targets[part].cpu().numpy()

    def _add_pixels(self, row: Any, found: Any, true: Any, num_classes: int) -> None:
        if self._pixels is None:
            self._pixels = np.zeros((len(PIXELS), self.num_rows, num_classes))
        right = found == true
        chosen = ((row[right], true[right]), (row, found), (row, true))
        for counts, (at, classes) in zip(self._pixels, chosen, strict=True):
            added = np.bincount(at * num_classes + classes, minlength=counts.size)
            counts += added.reshape(counts.shape)

    def sums(self, name: str) -> Floats:
        """[num_rows] sums over the positions of each row.

        Args:
            name: "positions", "nll" (nats), "correct", "brier" (0 to 2 each); with a teacher "agree" (same top class) and
                "kl" (KL(teacher || model) in nats at temperature 1).
        """
        return self._sums[name]

    @property
    def predictions(self) -> NDArray[np.int32]:
        """[num_rows] the top class of each row (predicts "classes")."""
        return self._class_rows(0)

    @property
    def references(self) -> NDArray[np.int32]:
        """[num_rows] the target of each row (predicts "classes")."""
        return self._class_rows(1)

    def statistics(self) -> dict[str, Statistic]:
        """The metrics by name, for ``bootstrap``.

        tokens: loss, perplexity, token_accuracy, exact_match (share of rows with every position correct, among rows with positions).
        classes: loss, accuracy, f1_macro, brier. With a teacher: agreement, kl.

        Raises:
            DataError: no positions were added.
        """
        from peftlab.evaluation.modules import row_statistics  # slow to import

        return row_statistics(self.columns())

    def columns(self) -> dict[str, Floats]:
        """The inputs of ``statistics``, [num_rows] each, by the names in ``specs.metrics``; of entities and pixels [num_rows,
        labels].

        Raises:
            DataError: no positions were added.
        """
        if not self._sums["positions"].any():
            raise DataError("expected positions to score, found none: the evaluation data has no rows to score")
        positions, correct = self._sums["positions"], self._sums["correct"]
        columns: dict[str, Floats] = {"positions": positions, "nll": self._sums["nll"]}
        if self.predicts == "tokens":
            columns |= {"tokens": positions, "correct_tokens": correct}
        elif self._pixels is not None:
            columns |= zip(PIXELS, self._pixels, strict=True)
        elif self.predicts != "spans":
            columns |= {"class_positions": positions, "correct_classes": correct}
        if self.predicts == "classes":
            predicted, true = (np.asarray(rows, dtype=np.float64) for rows in (self.predictions, self.references))
            columns |= {"brier": self._sums["brier"], "predicted_class": predicted, "true_class": true}
        if self._tags is not None:
            where, predictions, references = np.concatenate(self._tagged, axis=1)
            columns |= entities_per_row(where, predictions, references, tags=self._tags, num_rows=self.num_rows)
        if self._has_teacher:
            columns |= {"agree": self._sums["agree"], "kl": self._sums["kl"]}
        return columns

    def estimates(self, *, seed: int = 0) -> dict[str, Estimate]:
        """``statistics`` on all rows and on resampled rows. Raises: as ``statistics``."""
        return bootstrap(self.statistics(), self.num_rows, shares=SHARES, seed=seed)

    def _class_rows(self, which: int) -> NDArray[np.int32]:
        positions = self._sums["positions"]
        if self.predicts != "classes" or (positions != 1).any():
            raise ValueError(
                f"expected classes and one position in each of {self.num_rows} rows, found {self.predicts} and "
                f"{int((positions != 1).sum())} rows with none or several"
            )
        rows: NDArray[np.int32] = self._classes[which]
        return rows

    def _check(self, logits: Tensor, targets: Tensor, row: Tensor, teacher: Tensor | None) -> None:
        num = logits.shape[:1]
        fits = logits.dim() == 2 and targets.shape == num == row.shape
        if not fits or (teacher is not None and teacher.shape != logits.shape):
            shapes = [list(t.shape) for t in (logits, targets, row, teacher) if t is not None]
            raise ValueError(f"expected logits [N, V], targets [N], row [N] and teacher [N, V] or None, found {shapes}")
        if len(row) and not 0 <= int(row.min()) <= int(row.max()) < self.num_rows:
            raise ValueError(f"expected rows in 0..{self.num_rows - 1}, found {int(row.min())}..{int(row.max())}")
        if self._has_teacher not in (None, teacher is not None):
            raise ValueError("expected teacher logits in every call or in none, found both")
        self._has_teacher = teacher is not None
        for whose, tensor in (("model", logits), ("teacher", teacher)):
            if tensor is not None and not bool((tensor < float("inf")).all()):
                raise VerificationError(
                    f"expected finite logits, found nan or inf in the {whose}'s outputs on held-out rows: its training "
                    "diverged (try a lower learning rate) or its dtype is too narrow"
                )


def _blocks(num: int, width: int) -> Iterator[slice]:
    """Slices of positions whose logits fit in one block."""
    step = max(1, _BLOCK // width)
    return (slice(first, first + step) for first in range(0, num, step))


def _position_figures(logits: Tensor, targets: Tensor, teacher: Tensor | None) -> dict[str, Tensor]:
    """The figures of one block of positions, [N] each."""
    log_q = _log_softmax(logits)
    q = log_q.exp()
    confidence, top = q.max(dim=-1)
    at_target = q.gather(-1, targets[:, None])[:, 0]
    figures = {
        "positions": torch.ones_like(confidence),
        "nll": -log_q.gather(-1, targets[:, None])[:, 0],
        "correct": top == targets,
        "confidence": confidence,
        "top": top,
        # Sum over classes of (q - one_hot)^2. Source: Brier 1950, for several classes.
        "brier": q.square().sum(-1) - 2 * at_target + 1,
    }
    if teacher is not None:
        figures["agree"] = top == teacher.argmax(dim=-1)
        figures["kl"] = _kl(_log_softmax(teacher), log_q, q)
    return figures


def _kl(log_p: Tensor, log_q: Tensor, q: Tensor) -> Tensor:
    """[N] KL(p || q) in nats; infinite where q lacks a class that p has.

    Summed as ``p log(p / q) - p + q``: no term is negative, and the deviation of the float32 softmaxes from a sum of 1 has
    only a second-order effect.
    """
    p = log_p.exp()
    # A class missing in both gives -inf - -inf; p is 0 there, and the term is q.
    log_ratio = torch.where(p > 0, log_p - log_q, 0.0)
    return (p * log_ratio - p + q).sum(-1, dtype=torch.float64)


def _log_softmax(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=-1)
