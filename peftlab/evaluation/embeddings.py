"""Measures how well a student keeps the geometry of the teacher's embeddings."""

# Shapes: B texts of one call, N texts in all, H width of a vector, P pairs of texts.

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from peftlab.errors import DataError, VerificationError
from peftlab.evaluation import row_metrics
from peftlab.measuring.intervals import Estimate, Floats, Statistic, bootstrap

NEIGHBOURS = 10
# Maximum number of ranked pairs of texts; the sampling error of the correlation is then below 0.003.
MAX_PAIRS = 100_000
_PAIRS_SEED = 0
# Texts per block of similarities to all others.
_QUERIES = 512


class EmbeddingComparison:
    """Compares the student's and teacher's vectors of the same texts, and their neighbourhoods.

    Keeps all vectors as float32 on the CPU: 4 (H_student + H_teacher) bytes per text.
    """

    def __init__(self) -> None:
        self._student: list[Tensor] = []
        self._teacher: list[Tensor] = []

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Adds texts.

        Args:
            student: [B, H_student]. teacher: [B, H_teacher], of the same texts. Norms do not matter: cosines are compared.

        Raises:
            VerificationError: a vector is not finite. ValueError: mismatched shapes.
        """
        if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher):
            raise ValueError(f"expected two [B, H], found {list(student.shape)} and {list(teacher.shape)}")
        for whose, vectors, kept in (("student", student, self._student), ("teacher", teacher, self._teacher)):
            if not bool(vectors.isfinite().all()):
                raise VerificationError(
                    f"expected finite vectors, found nan or inf in those of the {whose}: training diverged?"
                )
            kept.append(F.normalize(vectors.detach().float(), dim=-1).cpu())

    def statistics(self) -> dict[str, Statistic]:
        """The metrics by name, for ``bootstrap`` over texts.

        spearman: rank correlation of the cosine similarities of pairs of texts; over ``MAX_PAIRS`` pairs, drawn with a
            fixed seed, if there are more.
        neighbour_recall: mean share of the teacher's 10 nearest texts that are among the student's 10 nearest.
        cosine: mean cosine between the student's and the teacher's vector of a text, if they are equally wide.

        Raises:
            DataError: fewer than three texts.
        """
        student, teacher = (torch.cat(kept) if kept else torch.zeros(0, 1) for kept in (self._student, self._teacher))
        if len(student) < 3:
            raise DataError(
                f"expected at least 3 texts to compare embeddings on, found {len(student)}: use a larger data.eval"
            )
        pairs = _pairs(len(student))
        metrics = {
            "spearman": _spearman(_similarities(student, pairs), _similarities(teacher, pairs), pairs),
            "neighbour_recall": row_metrics.mean(_neighbour_recall(student, teacher)),
        }
        if student.shape == teacher.shape:
            metrics["cosine"] = row_metrics.mean((student * teacher).sum(-1).numpy())
        return metrics

    def estimates(self, *, seed: int = 0) -> dict[str, Estimate]:
        """``statistics`` on all texts and on resampled texts; about 3 s. Raises: as ``statistics``."""
        num = sum(len(part) for part in self._student)
        return bootstrap(self.statistics(), num, shares={"neighbour_recall"}, seed=seed)


def _pairs(num: int) -> NDArray[np.int64]:
    """[2, P] indices of two different texts."""
    if num * (num - 1) // 2 <= MAX_PAIRS:
        return np.stack(np.triu_indices(num, k=1))
    rng = np.random.default_rng(_PAIRS_SEED)
    first = rng.integers(0, num, MAX_PAIRS)
    return np.stack([first, (first + rng.integers(1, num, MAX_PAIRS)) % num])


def _similarities(vectors: Tensor, pairs: NDArray[np.int64]) -> Floats:
    """[P] cosines of unit vectors [N, H]; summed in float64, so that equal vectors give equal cosines."""
    cosines = [
        (vectors[a].double() * vectors[b].double()).sum(-1).numpy()
        for a, b in (torch.from_numpy(part) for part in np.array_split(pairs, -(-pairs.shape[1] // 4096), axis=1))
    ]
    return np.concatenate(cosines)


def _spearman(x: Floats, y: Floats, pairs: NDArray[np.int64]) -> Statistic:
    """Spearman's correlation of ``x`` and ``y`` [P]; a pair counts as often as both of its texts were drawn.

    A text drawn twice makes no pair with itself. Ranks are recomputed for every draw; ties get their middle rank.
    """
    (num_x, place_x), (num_y, place_y) = ((len(u), i) for u, i in (np.unique(v, return_inverse=True) for v in (x, y)))

    def ranks(weights: Floats, places: NDArray[np.int64], num: int) -> Floats:
        at = np.bincount(places, weights, minlength=num)
        middle = np.cumsum(at) - at / 2
        return np.asarray(middle[places])

    def statistic(counts: Floats) -> Floats:
        values = np.empty(len(counts))
        for draw, count in enumerate(counts):
            weights = count[pairs[0]] * count[pairs[1]]
            a, b = (ranks(weights, places, num) for places, num in ((place_x, num_x), (place_y, num_y)))
            with np.errstate(all="ignore"):
                a, b = (r - np.dot(weights, r) / weights.sum() for r in (a, b))
                values[draw] = np.dot(weights, a * b) / np.sqrt(np.dot(weights, a * a) * np.dot(weights, b * b))
        return values

    return statistic


def _neighbour_recall(student: Tensor, teacher: Tensor) -> Floats:
    """[N] share of the teacher's nearest texts that are among the student's nearest; a text is not its own neighbour."""
    num = min(NEIGHBOURS, len(student) - 1)
    shares = []
    for first in range(0, len(student), _QUERIES):
        nearest = []
        for vectors in (student, teacher):
            similar = vectors[first : first + _QUERIES] @ vectors.T
            similar.diagonal(offset=first).fill_(-2.0)
            nearest.append(similar.topk(num, dim=-1).indices)
        matches = (nearest[0][:, :, None] == nearest[1][:, None, :]).any(-1)
        shares.append(matches.double().mean(-1))
    return torch.cat(shares).numpy()
