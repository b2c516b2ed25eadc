"""``train``: trains a recipe and writes a run folder with a verified result."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from peftlab import ranks
from peftlab.assembly import Assembly
from peftlab.assembly.checks import check_launch, check_settings
from peftlab.assembly.finish import complete
from peftlab.assembly.fit import fit
from peftlab.assembly.process import located, pick_device, prepare_libraries
from peftlab.errors import RecipeError
from peftlab.experiments.self_training import self_train
from peftlab.measuring.memory import frozen_heap
from peftlab.recipe import check_lock, check_same_settings
from peftlab.runs import Run, check_unfinished, checkpoint_to_resume, choose_folder, open_run, open_source
from peftlab.training.progress import Progress, make_progress


def train(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
    verbose: bool = False,
) -> Run:
    """Trains a recipe and returns the run.

    Args:
        recipe: path, shipped name, dict, or a run folder (its recipe.lock.yaml is used).
        overrides: ``section.key=value``.
        resume: resume the run in the run folder from its newest checkpoint, or merge it if only that is missing. A finished
            run is an error and stays as it is.
        replace: remove an earlier run in the run folder once this one is ready to start.
        progress: where progress goes; default: a live bar or plain lines on stderr, with ``verbose`` every detail.

    Returns: the ``Run``; its ``summary`` has metrics before and after, speed, memory, samples and the merge report.
    Raises: RecipeError, DataError, ResourceError, ArtifactError, VerificationError, Interrupted.
    """
    prepare_libraries()
    progress = progress or make_progress(verbose=verbose)
    loaded, folder = open_source(recipe, overrides, resume=resume)
    with located(loaded), frozen_heap(), contextlib.ExitStack() as stack:
        stack.callback(progress.stop)
        for line in loaded.notes:
            progress.note(line)
        if loaded.recipe.distill is not None:
            raise RecipeError("this recipe names a teacher; run peftlab distill, or remove the section", key="distill")
        ranks.join(pick_device(loaded.recipe.run.device))
        folder = folder or ranks.on_first(lambda: choose_folder(loaded, resume=resume, replace=replace))
        checkpoint, in_rounds = None, loaded.recipe.train.self_training is not None
        if resume:
            stored = open_run(folder).recipe()
            check_same_settings(loaded, stored)
            if in_rounds:
                check_unfinished(folder)
            else:
                checkpoint = checkpoint_to_resume(folder)
        if not loaded.recipe.spec.learns_from_labels:
            raise RecipeError(
                "rows of one text each have no labels. To learn from pairs, name their columns: data.columns={anchor: COLUMN, "
                "positive: COLUMN} (and negative), or {sentence1: COLUMN, sentence2: COLUMN, score: COLUMN}. To learn from a "
                "teacher's vectors, name the teacher in a section distill and run `peftlab distill`",
                key="task",
            )
        assembly = Assembly(loaded)
        check_settings(assembly)
        check_launch(assembly)
        if in_rounds:
            return self_train(assembly, folder, progress, resume=resume, replace=replace)
        if resume and loaded.recipe.lock is None:
            for line in check_lock(stored, fingerprints=assembly.fingerprints, resumed=True):
                progress.note(line)
        if resume and checkpoint is None:
            return ranks.on_first(lambda: complete(assembly, folder, progress))
        return fit(assembly, folder, progress, checkpoint=checkpoint, replace=replace)
