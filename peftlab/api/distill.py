"""``distill``: trains a student from a teacher, and a baseline on the labels alone, and compares them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from peftlab import ranks
from peftlab.assembly import Assembly
from peftlab.assembly.checks import check_launch, check_settings
from peftlab.assembly.process import located, pick_device, prepare_libraries
from peftlab.errors import RecipeError
from peftlab.experiments.arms import Distillation
from peftlab.measuring.memory import frozen_heap
from peftlab.recipe import check_same_settings
from peftlab.runs import Run, check_unfinished, choose_folder, open_run, open_source
from peftlab.training.progress import Progress, make_progress


def distill(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    seeds: int | None = None,
    resume: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
    verbose: bool = False,
) -> Run:
    """Trains the recipe's student from its teacher and returns the run.

    Args:
        recipe: path, shipped name, dict, or a run folder (its recipe.lock.yaml is used), with a section ``distill``.
        overrides: ``section.key=value``.
        seeds: number of seeds; overrides distill.seeds.
        resume: resume the run in the run folder: keep finished trainings, continue an interrupted one from its newest
            checkpoint. A finished run is an error and stays as it is.
        replace: overwrite an earlier run in the run folder.
        progress: where progress goes; default: a live bar or plain lines on stderr, with ``verbose`` every detail.

    Returns: the ``Run``: ``student/`` is the student as a plain transformers folder, ``summary["card"]`` the report card.
    Raises: RecipeError, DataError, ResourceError, ArtifactError, VerificationError, Interrupted.
    """
    prepare_libraries()
    progress = progress or make_progress(verbose=verbose)
    seed_override = [f"distill.seeds={seeds}"] if seeds else []
    loaded, folder = open_source(recipe, [*overrides, *seed_override], resume=resume)
    with located(loaded), frozen_heap(), contextlib.ExitStack() as stack:
        stack.callback(progress.stop)
        for line in loaded.notes:
            progress.note(line)
        if loaded.recipe.distill is None:
            raise RecipeError(
                f"{loaded.name} has no section distill, which names the teacher; to train without a teacher: peftlab train"
            )
        ranks.join(pick_device(loaded.recipe.run.device))
        folder = folder or ranks.on_first(lambda: choose_folder(loaded, resume=resume, replace=replace))
        if resume:
            check_same_settings(loaded, open_run(folder).recipe())
            check_unfinished(folder)
        assembly = Assembly(loaded, transfer=True)
        check_settings(assembly)
        check_launch(assembly)
        distillation = Distillation(assembly, folder, progress, resume=resume)
        distillation.run(distillation.check(), replace=replace)
    return open_run(folder)
