"""Sentence embeddings that are learned from pairs, triplets, or pairs with a score."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.data import Rows, read_scores
from peftlab.errors import DataError, RecipeError
from peftlab.specs.objectives import OBJECTIVES
from peftlab.specs.task_spec import TaskSpec
from peftlab.specs.tasks import spec_of
from peftlab.tasks.base import Columns, TaskParts
from peftlab.tasks.batch import Batch
from peftlab.tasks.contrast import Objective, share_loss
from peftlab.tasks.embedding import Embedding
from peftlab.tasks.example import Encoded, Example
from peftlab.tasks.inputs import NO_SCORE, blank_values
from peftlab.tasks.outputs import Outputs, weighted_sum
from peftlab.tasks.retrieval import gathered_ranks

_OPTIONS = {"scale": "train.embedding_scale", "margin": "train.margin"}


class _Sets(Embedding):
    """Rows of several texts. Args: objective: the loss. score_range: the lowest and the highest score of the data."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        objective: Objective | None = None,
        score_range: tuple[float, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, **options)
        self.objective = objective or Objective(self.spec.objectives[0])
        self._score_range = score_range

    @classmethod
    def _options(cls, parts: TaskParts) -> dict[str, Any]:
        settings = parts.settings
        width, widths = parts.hidden_size, settings["train.matryoshka"]
        if width is not None and widths and max(widths) > width:
            raise RecipeError(
                f"the model's vectors have {width:,} numbers, found the width {max(widths):,}", key="train.matryoshka"
            )
        name = settings["train.objective"] or cls.spec.objectives[0]
        options = {o: settings[key] for o, key in _OPTIONS.items() if key in settings}
        return {"objective": Objective(name, widths=widths, **options), "score_range": settings.get("data.score_range")}

    @property
    def whole_step(self) -> bool:
        return OBJECTIVES[self.objective.name].whole_step

    def losses(self, outputs: Outputs) -> Tensor:
        """[N] at each text the loss of its row."""
        assert outputs.targets is not None
        count = len(self.roles)
        rows = self.objective.losses(
            outputs.values.unflatten(0, (-1, count)), outputs.targets.unflatten(0, (-1, count))
        )
        return rows.repeat_interleave(count)

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs = self.outputs(model, batch)
        if batch.share is not None:
            return share_loss(outputs, batch.share)
        return weighted_sum(self.losses(outputs), outputs.weights)

    def _compared(self, examples: Sequence[Example], device: Any) -> Tensor | None:
        """[N] a number for each text; equal texts have the same."""
        return torch.tensor([_key(ids) for e in examples for ids in e.texts], device=device)

    def encode(self, rows: Rows, **options: Any) -> Encoded:
        encoded = super().encode(rows, **options)
        if options["training"] and self.objective.name == "in_batch" and len(self.roles) == 2:
            self._check_varied(rows)
        return encoded

    def _check_varied(self, rows: Rows) -> None:
        """Raises DataError if no row has a negative."""
        if len(rows) and len(set(map(str, rows.column(self._texts.columns[1])))) == 1:
            raise DataError(
                f"all {len(rows):,} rows of {rows.name} have the same positive, so there are no negatives to tell it from",
                key="data.columns.positive",
            )


class EmbeddingPairs(_Sets):
    """See ``base.Task``, ``base.Contrasts`` and ``base.Gathers``."""

    spec: TaskSpec = spec_of("embedding", ("anchor", "positive"))
    roles: tuple[str, ...] = ("anchor", "positive")

    def score(self, model: nn.Module, batch: Batch) -> Columns:
        """The vectors [B, K, H] and keys [B, K] of the texts, for ``gathered``."""
        outputs = self.outputs(model, batch)
        assert outputs.targets is not None
        shape = (-1, len(self.roles))
        return {
            "vectors": F.normalize(outputs.values.unflatten(0, shape), dim=-1).float().cpu(),
            "keys": outputs.targets.unflatten(0, shape).cpu(),
        }

    def gathered(self, parts: Sequence[Mapping[str, Any]]) -> Columns:
        vectors, keys = (torch.cat([part[name] for part in parts]) for name in ("vectors", "keys"))
        return gathered_ranks(vectors[:, 0], vectors[:, 1], keys)


class EmbeddingTriplets(EmbeddingPairs):
    """See ``base.Task``, ``base.Contrasts`` and ``base.Gathers``."""

    spec = spec_of("embedding", ("negative",))
    roles = ("anchor", "positive", "negative")

    def gathered(self, parts: Sequence[Mapping[str, Any]]) -> Columns:
        vectors = torch.cat([part["vectors"] for part in parts])
        near, far = ((vectors[:, 0] * vectors[:, i]).sum(-1) for i in (1, 2))
        return {**super().gathered(parts), "triplets_right": (near > far).long().tolist()}


class EmbeddingScores(_Sets):
    """See ``base.Task`` and ``base.Contrasts``."""

    spec = spec_of("embedding", ("score",))
    roles = ("sentence1", "sentence2")

    def __init__(self, tokenizer: Any, *, columns: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(tokenizer, columns=columns, **options)
        self._score_column = (columns or {}).get("score", "score")

    @property
    def read_columns(self) -> set[str]:
        return {*super().read_columns, self._score_column}

    @classmethod
    def blank_rows(cls, parts: TaskParts, rows: Rows, *, labelled: bool) -> dict[int, str]:
        blank = super().blank_rows(parts, rows, labelled=labelled)
        scores = blank_values(rows, {parts.column("score"): NO_SCORE}, key="data.columns.score") if labelled else {}
        return dict(sorted((scores | blank).items()))

    def _targets(self, rows: Rows) -> np.ndarray | None:
        return read_scores(rows, self._score_column, scale=self._score_range, lowest=-1.0)

    def _compared(self, examples: Sequence[Example], device: Any) -> Tensor | None:
        """[N] at each text the score of its row."""
        if any(e.label is None for e in examples):
            return None
        scores = [e.label for e in examples for _ in e.texts]
        return torch.tensor(scores, dtype=torch.float64, device=device)

    def probe(self, ids: np.ndarray) -> Example:
        return self._example(np.tile(ids, 2), 0, (len(ids),) * 2, label=1.0)

    def score(self, model: nn.Module, batch: Batch) -> Columns:
        outputs = self.outputs(model, batch)
        assert outputs.targets is not None
        vectors = outputs.values.unflatten(0, (-1, 2))
        cosines = F.cosine_similarity(vectors[:, 0], vectors[:, 1], dim=-1)
        return {"cosines": cosines.double().tolist(), "scores": outputs.targets[::2].tolist()}


def _key(ids: np.ndarray) -> int:
    """A number for the tokens of a text; two of a million texts have the same with probability 1e-7."""
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little", signed=True)
