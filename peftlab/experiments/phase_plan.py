"""Plans the phases of an on-policy distillation: the prompts and the training steps of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from peftlab.assembly import Assembly
from peftlab.errors import DataError
from peftlab.recipe.distillation import OnPolicySection
from peftlab.tasks import Generates
from peftlab.teaching.capture import TaughtExamples, taught_examples
from peftlab.training.progress import Progress


@dataclass(frozen=True)
class PhasePlan:
    """The settings shared by all phases of a training.

    Attributes:
        assembly: that of the student, with the steps of all phases. folder: the training's folder. base: all training rows
            with their original answers. candidates: [N] examples whose prompts may be used.
        spans: the steps of each phase.
    """

    assembly: Assembly
    folder: Path
    base: TaughtExamples
    candidates: np.ndarray
    rows: int
    spans: list[tuple[int, int]]
    progress: Progress

    @property
    def settings(self) -> OnPolicySection:
        return on_policy_of(self.assembly)

    def choose(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the examples of phase ``number`` (from 1): those that the student answers, and those kept unchanged.

        No row repeats until too few unused rows are left.
        """
        phases_a_pass = len(self.candidates) // self.rows
        a_pass, place = divmod(number - 1, phases_a_pass)
        order = np.random.default_rng([self.assembly.recipe.run.seed, a_pass]).permutation(self.candidates)
        chosen = order[place * self.rows : (place + 1) * self.rows]
        written = max(1, round(self.settings.student_share * self.rows))
        return np.sort(chosen[:written]), np.sort(chosen[written:])


def on_policy_of(assembly: Assembly) -> OnPolicySection:
    """The section ``on_policy`` of a recipe that has one."""
    settings = assembly.distill.on_policy
    assert settings is not None
    return settings


def plan_phases(assembly: Assembly, folder: Path, progress: Progress) -> PhasePlan:
    settings = on_policy_of(assembly)
    progress.stage("reading data")
    base = taught_examples(assembly)
    cast(Generates, assembly.task).answers_need(base.rows)
    candidates = _candidates(base, progress)
    rows = settings.rows or len(candidates) // settings.phases
    if not 1 <= rows <= len(candidates):
        raise DataError(
            f"expected at least {settings.rows or settings.phases:,} training rows, found {len(candidates):,}; lower "
            f"distill.on_policy.{'rows' if settings.rows else 'phases'}",
            key="distill.on_policy",
        )
    spans = _spans(assembly, rows)
    steps = {"train.epochs": None, "train.max_steps": spans[-1][1]}
    return PhasePlan(assembly.derive(steps), folder, base, candidates, rows, spans, progress)


def _candidates(base: TaughtExamples, progress: Progress) -> np.ndarray:
    """Returns the examples whose prompt leaves room for the longest answer. Raises: DataError if a prompt does not and
    data.too_long is error."""
    assembly, limit = base.assembly, base.assembly.limit
    task = cast(Generates, assembly.task)
    room = limit - on_policy_of(assembly).max_new_tokens
    kept = base.rows.select([e.row for e in base.train.examples])
    lengths = np.array(task.prompt_lengths(kept), dtype=np.int64)
    long = np.flatnonzero(lengths > room)
    if len(long):
        problem = (
            f"{kept.where(int(long[0]))}: {len(long):,} of {len(kept):,} prompts, of up to {lengths.max():,} tokens, leave no room "
            f"for an answer of {limit - room:,} within {limit:,} tokens"
        )
        if assembly.recipe.data.too_long == "error":
            raise DataError(
                f"{problem}; lower it, raise data.max_length, or drop such rows with data.too_long: drop",
                key="distill.on_policy.max_new_tokens",
            )
        progress.note(f"{problem}; these rows are dropped")
    return np.flatnonzero(lengths <= room)


def _spans(assembly: Assembly, rows: int) -> list[tuple[int, int]]:
    """The first step of each phase and the one after its last; independent of the student's answers."""
    t, phases = assembly.recipe.train, on_policy_of(assembly).phases
    if t.max_steps is not None:
        ends = [t.max_steps * (i + 1) // phases for i in range(phases)]
    else:
        a_pass = -(-rows // ((t.batch_size or 8) * t.accumulate))
        steps = max(1, int(np.ceil((t.epochs or 1.0) * a_pass)))
        ends = [steps * (i + 1) for i in range(phases)]
    return list(zip([0, *ends], ends, strict=False))
