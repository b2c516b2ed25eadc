"""``teach``: what the teacher says about every training example, stored for any number of distillations."""

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
    """Stores what the recipe's teacher says about its training examples in ``distill.cache``; a capture that was cut off
    goes on where it ended.

    Args:
        recipe: path, shipped name, dict, or a run folder, with a section ``distill``.
        overrides: ``section.key=value``.
        plan: say what it takes in disk and time, and do nothing.
        replace: a complete cache that is there is made anew. verbose: show every detail on the way.

    Returns: plain values, one entry per teacher: folder, examples, positions, bytes, bytes_per_position, seconds, and the
        teacher's held-out metrics; of a plan the first ones, as estimates.
    Raises: RecipeError, DataError, ResourceError, ArtifactError.
    """
    prepare_libraries()
    progress = progress or make_progress(verbose=verbose)
    loaded, _ = open_source(recipe, overrides)
    with located(loaded), frozen_heap(), progress:
        assembly = Assembly(loaded, transfer=True)
        if assembly.distill.cache is None:
            raise RecipeError("expected the folder to store the targets in, such as caches/mine", key="distill.cache")
        if assembly.distill.on_policy is not None:
            raise RecipeError(
                "the teacher will read what the student writes, phase by phase: peftlab distill asks it then",
                key="distill.on_policy",
            )
        check_settings(assembly)
        progress.stage("reading data")
        taught, teachers = taught_examples(assembly), named_teachers(assembly)
        # Of all teachers, before the first of them is loaded.
        check_routes(assembly)
        for teacher in teachers:
            teacher.check()
        if plan:
            return {"plan": True, "teachers": [plan_capture(taught, teacher) for teacher in teachers]}
        return {"plan": False, "teachers": capture_all(taught, progress, replace=replace)}
