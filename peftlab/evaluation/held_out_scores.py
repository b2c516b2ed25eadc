"""Streams the scores of one model on held-out rows, for the report card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from peftlab.evaluation.card_metrics import class_metrics
from peftlab.evaluation.comparison import SHARES, Comparison
from peftlab.evaluation.embeddings import EmbeddingComparison
from peftlab.evaluation.modules import class_statistic, row_statistics
from peftlab.evaluation.squad_scores import scores_by_row
from peftlab.measuring.intervals import Estimate, bootstrap
from peftlab.specs.task_spec import TaskSpec

# Each draws a precision at every recall of every class: a thousand would take minutes.
_DRAWS_OF_BOXES = 200


class HeldOutScores:
    """Streamed scores of one model, depending on what its task predicts.

    Args: headline: may be a metric of one class.
    """

    def __init__(
        self, spec: TaskSpec, num_rows: int, headline: str, *, class_names: Sequence[str] | None = None
    ) -> None:
        self._num_rows = num_rows
        self._of_class = (headline, *class_metrics(class_names, spec).get(headline, ("", -1)))
        self._vectors = EmbeddingComparison() if spec.predicts == "vectors" else None
        self._numbers = np.zeros((2, num_rows)) if spec.predicts == "numbers" else None
        self._objects: dict[int, tuple[Any, Any]] | None = {} if spec.predicts == "boxes" else None
        own = self._vectors is not None or self._numbers is not None or self._objects is not None
        tags = class_names if spec.marks_entities else None
        self._logits = None if own else Comparison(num_rows, predicts=spec.predicts, tags=tags)
        self._chosen: dict[int, tuple[int, int]] = {}
        self._answers: tuple[list[Mapping[str, Any]], list[Sequence[str]]] = ([], [])
        self._texts: dict[int, tuple[str, str]] = {}
        self._any = False

    def add_vectors(self, ours: Tensor, taught: Tensor) -> None:
        """See ``EmbeddingComparison.add``."""
        assert self._vectors is not None
        self._any = True
        self._vectors.add(ours, taught)

    def add_logits(self, ours: Tensor, targets: Tensor, where: Tensor, taught: Tensor | None = None) -> None:
        """See ``Comparison.add``."""
        assert self._logits is not None
        self._any = True
        self._logits.add(ours, targets, where, taught)

    def add_numbers(self, rows: Sequence[int], predicted: Sequence[float], right: Sequence[float]) -> None:
        """One number per row, and the right one."""
        assert self._numbers is not None
        self._any = True
        self._numbers[:, list(rows)] = [predicted, right]

    def add_objects(self, rows: Sequence[int], found: Sequence[Any], objects: Sequence[Any]) -> None:
        """What is found and right in the image of each row, as ``box_matches`` takes it."""
        assert self._objects is not None
        self._any = True
        self._objects |= zip(rows, zip(found, objects, strict=True), strict=True)

    def add_choices(self, rows: Sequence[int], predictions: Sequence[int], references: Sequence[int]) -> None:
        """Answers chosen among eval.choices, one per row, as class indices."""
        for row, predicted, right in zip(rows, predictions, references, strict=True):
            self._chosen[row] = (predicted, right)

    def add_answers(self, windows: Sequence[Mapping[str, Any]], references: Sequence[Sequence[str]]) -> None:
        """Answers to questions, per window, as ``squad_scores`` takes them; ``row`` counts the held-out rows."""
        self._answers[0].extend(windows)
        self._answers[1].extend(references)

    def add_texts(self, rows: Sequence[int], written: Sequence[str], references: Sequence[str]) -> None:
        """Texts that the model wrote, one per row."""
        self._texts |= zip(rows, zip(written, references, strict=True), strict=True)

    def estimates(self) -> dict[str, Estimate]:
        """The metrics with an interval over rows; empty if nothing was added."""
        if not self._any:
            return {}
        if self._vectors is not None:
            return self._vectors.estimates()
        if self._numbers is not None:
            numbers = dict(zip(("predicted_numbers", "true_numbers"), self._numbers, strict=True))
            return bootstrap(row_statistics(numbers), self._num_rows, shares=SHARES)
        if self._objects is not None:
            images = [self._objects[row] for row in range(self._num_rows)]
            boxes: dict[str, Any] = {
                name: [image[i] for image in images] for i, name in enumerate(("found", "objects"))
            }
            return bootstrap(row_statistics(boxes), self._num_rows, shares=SHARES, num_draws=_DRAWS_OF_BOXES)
        assert self._logits is not None
        columns = self._logits.columns()
        if self._chosen:
            predicted, right = (
                np.array([self._chosen[row][i] for row in range(self._num_rows)], dtype=np.float64) for i in (0, 1)
            )
            columns |= {
                "predicted_class": predicted,
                "true_class": right,
                "correct_classes": (predicted == right).astype(np.float64),
                "class_positions": np.ones(self._num_rows),
            }
        if self._answers[0]:
            scores = scores_by_row(*self._answers)
            for which, name in enumerate(("answer_exact", "answer_f1")):
                columns[name] = np.array([scores[row][which] for row in range(self._num_rows)])
        if self._texts:
            from peftlab.evaluation.text_scores import answer_rows  # slow to import

            columns |= answer_rows(*zip(*(self._texts[row] for row in range(self._num_rows)), strict=True))
        statistics = row_statistics(columns)
        some: dict[str, int] = {}
        headline, family, index = self._of_class
        if family:
            # Based on the rows of this class, or those predicted as it: far fewer than all.
            statistics[headline], some[headline] = class_statistic(family, columns, index)
        return bootstrap(statistics, self._num_rows, shares=SHARES, shares_of=some)

    def figures(self) -> dict[str, float]:
        """The metrics without an interval over rows."""
        return {} if self._logits is None or not self._any else {"ece": self._logits.calibration.ece()}
