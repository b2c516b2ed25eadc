"""``teach``: caches the teacher's outputs for every training example, for any number of distillations."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from peftlab.assembly import Assembly
from peftlab.assembly.checks import check_settings
from peftlab.assembly.process import located, prepare_libraries
from peftlab.errors import RecipeError
from peftlab.measuring.memory import frozen_heap
from peftlab.runs import open_source
from peftlab.teaching.alignment import check_routes
from peftlab.teaching.capture import capture_all, plan_capture, taught_examples
from peftlab.teaching.teacher import named_teachers
from peftlab.training.progress import Progress, make_progress


def teach(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    plan: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Stores the teacher's outputs for the training examples in ``distill.cache``. Resumes an interrupted capture.

    Args:
        recipe: path, shipped name, dict, or a run folder, with a section ``distill``.
        overrides: ``section.key=value``.
        plan: estimate disk and time; store nothing.
        replace: overwrite a complete cache. verbose: show every detail.

    Returns: plain values, one entry per teacher: folder, examples, positions, bytes, bytes_per_position, seconds, and the
        teacher's held-out metrics. A plan has estimates and no metrics.
    Raises: RecipeError, DataError, ResourceError, ArtifactError.
    """
    prepare_libraries()
    progress = progress or make_progress(verbose=verbose)
    loaded, _ = open_source(recipe, overrides)
    with located(loaded), frozen_heap(), progress:
        for line in loaded.notes:
            progress.note(line)
        assembly = Assembly(loaded, transfer=True)
        if assembly.distill.answers == "teacher":
            raise RecipeError(
                "the teacher first writes the answers that the student learns from; run peftlab distill, which does both",
                key="distill.answers",
            )
        if assembly.distill.cache is None:
            raise RecipeError("expected a folder for the targets, such as caches/mine", key="distill.cache")
        if assembly.distill.on_policy is not None:
            raise RecipeError(
                "on-policy distillation has no cache to prepare; run peftlab distill",
                key="distill.on_policy",
            )
        check_settings(assembly)
        progress.stage("reading data")
        taught, teachers = taught_examples(assembly), named_teachers(assembly)
        # Check all teachers before loading the first.
        check_routes(assembly)
        for teacher in teachers:
            teacher.check()
        if plan:
            return {"plan": True, "teachers": [plan_capture(taught, teacher) for teacher in teachers]}
        return {"plan": False, "teachers": capture_all(taught, progress, replace=replace)}
