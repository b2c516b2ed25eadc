"""What ``check`` says of a recipe's section ``distill``: teachers, student, and what is stored of them already."""

from __future__ import annotations

from typing import Any

from peftlab.api import build
from peftlab.api.stored import cache_folder, lesson_identity, open_stored
from peftlab.api.student import student_cut
from peftlab.api.teacher_models import check_teacher, teacher_target
from peftlab.api.teachers import check_routes, inner_settings
from peftlab.models import load_skeleton
from peftlab.models.student import check_cut
from peftlab.recipe import Recipe
from peftlab.recipe.distillation import SELF
from peftlab.tasks import Task
from peftlab.training.inner_losses import plan_inner_losses


def check_distillation(
    recipe: Recipe, task: Task, skeleton: Any, data: build.DataParts, limit: int
) -> dict[str, Any] | None:
    """Plain values for ``check``: ``teachers``, each with its cache, and ``student``; None for a recipe without teachers.

    Args: skeleton: of ``model.name``, without weights; it is cut to the student's layers where no measurement chooses them.
    Raises: what ``distill`` would, as far as no weights are needed for it: RecipeError, DataError, ArtifactError.
    """
    distill = recipe.distill
    if distill is None:
        return None
    student: dict[str, Any] = {"cut_from": None, "layers_before": None, "layers": None}
    known = True
    if distill.student_init is not None:
        before = getattr(skeleton.config.get_text_config(), "num_hidden_layers", None)
        student |= {"cut_from": recipe.model.name, "layers_before": before}
        cut = student_cut(distill.student_init)
        check_cut(cut, skeleton)
        known = not cut.is_measured
        student["layers"] = distill.student_init.num_layers or len(distill.student_init.layers or ()) or before
    student["num_parameters"] = _num_parameters(skeleton) if known else None
    check_routes(recipe, data)
    teachers = []
    for index in range(len(distill.all_teachers)):
        check_teacher(recipe, index, task)
        own = distill.all_teachers[index].name == SELF
        theirs = skeleton if own else _teacher_skeleton(recipe, task, index)
        if known and (inner := inner_settings(recipe, distill.losses)):
            plan_inner_losses(inner, skeleton, theirs)
        teachers.append(
            {
                "name": distill.all_teachers[index].name,
                "num_parameters": None if own else _num_parameters(theirs),
                "cache": _cache(recipe, task, data, limit, index),
            }
        )
    return {
        "teachers": teachers,
        "student": student,
        "transfer": distill.transfer,
        "baseline": distill.baseline,
        "seeds": distill.seeds,
    }


def _teacher_skeleton(recipe: Recipe, task: Task, index: int) -> Any:
    theirs = teacher_target(recipe, index).loaded.recipe
    pretrained = build.pretrained_of(theirs)
    return load_skeleton(pretrained, auto_class=task.auto_class, **task.model_kwargs())


def _num_parameters(skeleton: Any) -> int:
    return sum(p.numel() for p in skeleton.parameters())


def _cache(recipe: Recipe, task: Task, data: build.DataParts, limit: int, index: int) -> dict[str, Any] | None:
    """Folder of a teacher's cache and what is in it; examples None: nothing complete."""
    assert recipe.distill is not None
    if recipe.distill.cache is None:
        return None
    folder = cache_folder(recipe, index)
    if not (folder / "manifest.json").is_file():
        return {"folder": str(folder), "examples": None, "begun": (folder / "capture.json").is_file()}
    split = open_stored(lesson_identity(recipe, task, data, limit), recipe, index).manifest["splits"]["train"]
    return {"folder": str(folder), "begun": True, **{k: split[k] for k in ("examples", "bytes", "bytes_per_position")}}
