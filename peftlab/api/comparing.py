"""The report card's figures: teacher, student and baseline on the held-out rows, side by side, loaded from their files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftlab.api import build
from peftlab.api.headline import headline_of
from peftlab.api.opening import Target, find_target, open_target
from peftlab.api.teachers import Teachers
from peftlab.data import Rows, eval_batches
from peftlab.evaluation.card import as_metrics, make_card, paired
from peftlab.evaluation.card_metrics import class_metrics
from peftlab.evaluation.card_shape import Seed
from peftlab.evaluation.comparison import SHARES, Comparison
from peftlab.evaluation.embeddings import EmbeddingComparison
from peftlab.evaluation.intervals import Estimate, bootstrap
from peftlab.evaluation.latency import measure_latency
from peftlab.evaluation.modules import class_statistic, row_statistics
from peftlab.models import num_parameters
from peftlab.recipe import LoadedRecipe, Recipe
from peftlab.tasks import Encoded, Task
from peftlab.training.distilling import TaughtLogits
from peftlab.training.memory import release_memory
from peftlab.training.progress import Progress

# Positions whose logits exist at a time, of each model: 256 x 49,152 float32 values are 48 MiB.
_CHUNK = 256
# The rows whose forward pass is timed, and the time spent on that.
_TIMED_ROWS, _TIMED_SECONDS = 32, 20.0
# Name of a training in the run folder -> of its model on the card.
_WHO = {"student": "student", "labels": "baseline"}


def no_baseline(recipe: Recipe) -> str | None:
    """Why no student is trained on labels alone; None where one is."""
    assert recipe.distill is not None
    if not recipe.spec.learns_from_labels:
        return "no labels"
    return None if recipe.distill.baseline else "distill.baseline: false"


def compare_students(
    beginnings: Mapping[int, Recipe],
    teachers: Teachers,
    arms: Mapping[Any, Mapping[str, Any]],
    progress: Progress,
    *,
    from_weights: bool,
) -> dict[str, Any]:
    """The report card of a distillation, and the figures that it is made of.

    Args:
        beginnings: seed -> recipe of its students, with ``model.name`` as they began. arms: each training with its summary.
        from_weights: whether students began with weights that mean something, so that they are scored untrained too.
    """
    recipe = next(iter(beginnings.values()))
    assert recipe.distill is not None
    data = build.load_data(recipe)
    pretrained = build.pretrained_of(recipe)
    tokenizer = build.tokenizer_of(recipe, pretrained)
    task = build.build_task(recipe, tokenizer, data.labelled)
    limit = build.limit_of(recipe, pretrained, tokenizer)
    encoded = build.encode(recipe, task, data.eval, limit=limit, training=False, labelled=task.spec.learns_from_labels)
    comparer = _Comparer(recipe, teachers, task, data.eval, encoded, progress, from_weights=from_weights)
    seeds: list[Seed] = []
    for seed in sorted({arm.seed for arm in arms}):
        seeds.append(comparer.seed(seed, {arm: summary for arm, summary in arms.items() if arm.seed == seed}))
        release_memory()
    figures: dict[str, Any] = {
        "headline": headline_of(recipe),
        "num_rows": len(encoded.examples),
        "seeds": seeds,
        "timed_on": comparer.timed_on,
    }
    if (reason := no_baseline(recipe)) is not None:
        figures["no_baseline"] = reason
    return {"card": make_card(figures), "seeds": seeds}  # type: ignore[arg-type]


class _Comparer:
    """Scores the models of one seed on the same held-out rows, each next to what the teachers say there."""

    def __init__(
        self,
        recipe: Recipe,
        teachers: Teachers,
        task: Task,
        rows: Rows,
        encoded: Encoded,
        progress: Progress,
        *,
        from_weights: bool,
    ) -> None:
        self._cut = _beginning(recipe) if from_weights else None
        self._recipe, self._teachers, self._task, self._encoded = recipe, teachers, task, encoded
        self._progress = progress
        self._device = build.pick_device(recipe.run.device)
        # Classes of another vocabulary cannot be compared one by one.
        self._shares = [] if teachers.translated(task) else teachers.shares(task, None, rows, encoded)
        self._columns = teachers.columns(task)
        self._index = {e.row: i for i, e in enumerate(encoded.examples)}
        room = max(1, recipe.eval.batch_tokens // int(encoded.lengths.max()))
        self._timed = encoded.examples[: min(_TIMED_ROWS, room)]
        self.num_tokens = sum(map(len, self._timed))
        self.timed_on = f"{len(self._timed)} held-out rows, {self.num_tokens:,} tokens, on {self._device}"

    def seed(self, seed: int, arms: Mapping[Any, Mapping[str, Any]]) -> Seed:
        """All figures of one seed."""
        self._progress.stage(f"comparing teacher and student on {len(self._encoded.examples):,} held-out rows")
        models = {_WHO[arm.kind]: open_target(find_target(arm.model), self._progress).model for arm in arms}
        if self._cut is not None:
            models["cut"] = open_target(self._cut, self._progress).model
        headline = headline_of(self._recipe)
        scores = {who: _Scores(self._task, len(self._encoded.examples), headline) for who in ("teacher", *models)}
        self._score(models, scores)
        found = {who: score.estimates() for who, score in scores.items()}
        sides: dict[str, Any] = {
            who: {"metrics": as_metrics(estimates, **scores[who].figures())} for who, estimates in found.items()
        }
        sides["teacher"] |= self._teachers.costs()
        for arm, summary in arms.items():
            sides[_WHO[arm.kind]] |= _costs(models[_WHO[arm.kind]], arm.model, summary)
        if cut := models.pop("cut", None):
            sides["cut"]["num_parameters"] = num_parameters(cut)
        self._progress.stage("timing forward passes in turns")
        runs = self._teachers.runs(self._task, self._timed) | {who: self._run(model) for who, model in models.items()}
        timed = measure_latency(runs, num_tokens=self.num_tokens, device=self._device, seconds=_TIMED_SECONDS)
        for who, latency in timed.items():
            sides[who] |= latency.costs()
        between = paired(
            teacher=found["teacher"], student=found["student"], baseline=found.get("baseline"), cut=found.get("cut")
        )
        return {"seed": seed, **sides, "paired": between}  # type: ignore[typeddict-item]

    @torch.no_grad()
    def _score(self, models: Mapping[str, Any], scores: Mapping[str, _Scores]) -> None:
        first = next(iter(models.values()))
        for part in eval_batches(self._encoded.lengths, self._recipe.eval.batch_tokens):
            batch = self._task.collate([self._encoded.examples[i] for i in part], self._device)
            said = {who: self._task.outputs(model, batch) for who, model in models.items()}
            counts = next(iter(said.values())).counts
            where = torch.tensor([self._index[e.row] for e in batch.examples]).repeat_interleave(torch.tensor(counts))
            told = TaughtLogits(self._shares, first, batch, counts) if self._shares else None
            if self._task.spec.predicts == "vectors":
                for who, outputs in said.items():
                    assert told is not None
                    scores[who].vectors(outputs.values, told.rows(slice(None)))
                continue
            for who, outputs in said.items():
                for chosen in _chunks(len(outputs)):
                    logits = self._columns.of(outputs.logits(chosen))
                    taught = told.rows(chosen).to(logits.dtype) if told else None
                    assert outputs.targets is not None
                    scores[who].logits(logits, outputs.targets[chosen], where[chosen], taught)
            outputs = said["student"]
            for chosen in _chunks(len(outputs) if told else 0):
                assert outputs.targets is not None and told is not None
                scores["teacher"].logits(told.rows(chosen), outputs.targets[chosen], where[chosen])
            if self._task.class_names and self._task.spec.classes_from == "eval.choices":
                for who, model in (*models.items(), *self._teachers.choosers(self._task)):
                    scores[who].choices(self._task.score(model, batch), where)

    def _run(self, model: Any) -> Callable[[], object]:
        batch = self._task.collate(self._timed, self._device)

        @torch.no_grad()
        def run() -> object:
            return self._task.outputs(model, batch).values

        return run


def _beginning(recipe: Recipe) -> Target | None:
    """The student as it began, where its untrained answers mean something: not with a new head or made-up weights."""
    if recipe.spec.classifies or recipe.model.name.startswith("shape:"):
        return None
    return Target("base", LoadedRecipe(recipe.model_copy(update={"distill": None, "lock": None}), "cut"), None)


class _Scores:
    """Streamed scores of one model. Args: headline: which may be a metric of one class."""

    def __init__(self, task: Task, num_rows: int, headline: str) -> None:
        self._task, self._num_rows = task, num_rows
        self._of_class = (headline, *class_metrics(task.class_names).get(headline, ("", -1)))
        self._vectors = EmbeddingComparison() if task.spec.predicts == "vectors" else None
        self._logits = None if self._vectors else Comparison(num_rows, predicts=task.spec.predicts)
        self._chosen: dict[int, tuple[int, int]] = {}
        self._any = False

    def vectors(self, ours: Tensor, taught: Tensor) -> None:
        assert self._vectors is not None
        self._any = True
        self._vectors.add(ours, taught)

    def logits(self, ours: Tensor, targets: Tensor, where: Tensor, taught: Tensor | None = None) -> None:
        assert self._logits is not None
        self._any = True
        self._logits.add(ours, targets, where, taught)

    def choices(self, scores: Any, where: Tensor) -> None:
        """Answers chosen among eval.choices, one per row."""
        rows = where.unique_consecutive().tolist()
        for row, said, right in zip(rows, scores["predictions"], scores["references"], strict=True):
            self._chosen[row] = (said, right)

    def estimates(self) -> dict[str, Estimate]:
        if not self._any:
            return {}
        if self._vectors is not None:
            return self._vectors.estimates()
        assert self._logits is not None
        columns = self._logits.columns()
        if self._chosen:
            chosen, right = (
                np.array([self._chosen[row][i] for row in range(self._num_rows)], dtype=np.float64) for i in (0, 1)
            )
            columns |= {
                "predicted_class": chosen,
                "true_class": right,
                "correct_classes": (chosen == right).astype(np.float64),
                "class_positions": np.ones(self._num_rows),
            }
        statistics = row_statistics(columns)
        some: dict[str, int] = {}
        headline, family, index = self._of_class
        if family:
            # Of the rows of this class, or of those that are taken for it: far fewer than all.
            statistics[headline], some[headline] = class_statistic(family, columns, index)
        return bootstrap(statistics, self._num_rows, shares=SHARES, shares_of=some)

    def figures(self) -> dict[str, float]:
        """What has no interval over rows."""
        return {} if self._logits is None or not self._any else {"ece": self._logits.calibration.ece()}


def _chunks(num: int) -> Iterator[slice]:
    for start in range(0, num, _CHUNK):
        yield slice(start, start + _CHUNK)


def _costs(model: Any, folder: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    training = summary["training"]
    return {
        "num_parameters": num_parameters(model),
        "num_trained": summary["adapter"]["num_trained"],
        "file_bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")),
        "peak_memory_bytes": training["peak_memory_bytes"],
        "seconds": training["seconds"],
        "steps": training["steps"],
    }
