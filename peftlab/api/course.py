"""The course of an on-policy distillation: which prompts each phase asks, and which steps of the training are its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from peftlab.api import build
from peftlab.api.teaching import Lesson, read_lesson
from peftlab.errors import DataError
from peftlab.recipe import LoadedRecipe, Recipe
from peftlab.recipe.distillation import OnPolicySection
from peftlab.training.progress import Progress


@dataclass(frozen=True)
class Course:
    """What all phases of a training have in common.

    Attributes:
        loaded: the recipe, with the steps of all phases. folder: of the training. base: all training rows, with their
            own answers. limit: longest row in tokens. candidates: [N] examples whose prompts may be asked.
        spans: steps of each phase.
    """

    loaded: LoadedRecipe
    folder: Path
    base: Lesson
    limit: int
    candidates: np.ndarray
    rows: int
    spans: list[tuple[int, int]]
    progress: Progress

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def settings(self) -> OnPolicySection:
        assert self.recipe.distill is not None and self.recipe.distill.on_policy is not None
        return self.recipe.distill.on_policy

    def choose(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Examples of phase ``number``, counted from 1: those that the student answers, and those that stay as they are.

        No row comes again before there are too few left that have not been.
        """
        phases_a_pass = len(self.candidates) // self.rows
        a_pass, place = divmod(number - 1, phases_a_pass)
        order = np.random.default_rng([self.recipe.run.seed, a_pass]).permutation(self.candidates)
        chosen = order[place * self.rows : (place + 1) * self.rows]
        written = max(1, round(self.settings.student_share * self.rows))
        return np.sort(chosen[:written]), np.sort(chosen[written:])


def plan_course(loaded: LoadedRecipe, folder: Path, progress: Progress) -> Course:
    recipe = loaded.recipe
    assert recipe.distill is not None and recipe.distill.on_policy is not None
    settings = recipe.distill.on_policy
    base = read_lesson(recipe, progress)
    task: Any = base.task
    if task.formatter.style == "text":
        raise DataError(
            "these rows are plain text, and on_policy needs a prompt for the student to answer: expected messages, prompt and "
            "completion, or a template",
            key=task.formatter.key,
        )
    limit = build.limit_of(recipe, build.pretrained_of(recipe), task.tokenizer)
    candidates = _candidates(recipe, base, limit, progress)
    rows = settings.rows or len(candidates) // settings.phases
    if not 1 <= rows <= len(candidates):
        raise DataError(
            f"expected at least {settings.rows or settings.phases:,} training rows, found {len(candidates):,}; lower "
            f"distill.on_policy.{'rows' if settings.rows else 'phases'}",
            key="distill.on_policy",
        )
    spans = _spans(recipe, rows)
    train = recipe.train.model_copy(update={"epochs": None, "max_steps": spans[-1][1]})
    loaded = replace(loaded, recipe=recipe.model_copy(update={"train": train}))
    return Course(loaded, folder, base, limit, candidates, rows, spans, progress)


def _candidates(recipe: Recipe, base: Lesson, limit: int, progress: Progress) -> np.ndarray:
    """Examples whose prompt leaves room for the longest answer. Raises: DataError where one does not and data.too_long
    has no other way."""
    assert recipe.distill is not None and recipe.distill.on_policy is not None
    task: Any = base.task
    room = limit - recipe.distill.on_policy.max_new_tokens
    kept = base.data.train.select([e.row for e in base.train.examples])
    lengths = np.array(task.prompt_lengths(kept), dtype=np.int64)
    long = np.flatnonzero(lengths > room)
    if len(long):
        told = (
            f"{kept.where(int(long[0]))}: {len(long):,} of {len(kept):,} prompts, of up to {lengths.max():,} tokens, leave no room "
            f"for an answer of {limit - room:,} within {limit:,} tokens"
        )
        if recipe.data.too_long == "error":
            raise DataError(
                f"{told}; lower it, raise data.max_length, or leave such rows out with data.too_long: drop",
                key="distill.on_policy.max_new_tokens",
            )
        progress.note(f"{told}; these rows are left out")
    return np.flatnonzero(lengths <= room)


def _spans(recipe: Recipe, rows: int) -> list[tuple[int, int]]:
    """The first step of each phase, and the one after its last. They do not depend on what the student will write."""
    assert recipe.distill is not None and recipe.distill.on_policy is not None
    t, phases = recipe.train, recipe.distill.on_policy.phases
    if t.max_steps is not None:
        ends = [t.max_steps * (i + 1) // phases for i in range(phases)]
    else:
        a_pass = -(-rows // ((t.batch_size or 8) * t.accumulate))
        steps = max(1, int(np.ceil((t.epochs or 1.0) * a_pass)))
        ends = [steps * (i + 1) for i in range(phases)]
    return list(zip([0, *ends], ends, strict=False))
