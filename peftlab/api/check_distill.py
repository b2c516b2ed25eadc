"""What ``check`` says of a recipe's section ``distill``: teachers, student, and what is stored of them already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftlab.api import build
from peftlab.api.headline import check_headline
from peftlab.api.stored import (
    cache_folder,
    check_begun_cache,
    check_cache_folder,
    lesson_identity,
    open_stored,
    planned_fill,
)
from peftlab.api.student import student_cut
from peftlab.api.teacher_models import check_teacher, teacher_target
from peftlab.api.teachers import check_routes, inner_settings
from peftlab.models import load_skeleton
from peftlab.models.student import check_cut, fresh_skeleton
from peftlab.recipe import Recipe
from peftlab.recipe.distillation import SELF
from peftlab.tasks import Task
from peftlab.training.inner_losses import plan_inner_losses


def check_distillation(
    recipe: Recipe, task: Task, skeleton: Any, data: build.DataParts, limit: int
) -> tuple[dict[str, Any] | None, Any]:
    """Plain values for ``check``: ``teachers``, each with its cache, and ``student``; None for a recipe without teachers.
    Beside them the student without weights, as far as no measurement chooses what is cut.

    Args: skeleton: of ``model.name``, without weights; what is cut off for the student is cut off there.
    Raises: what ``distill`` would, as far as no weights are needed for it: RecipeError, DataError, ArtifactError.
    """
    distill = recipe.distill
    if distill is None:
        return None, skeleton
    check_routes(recipe, data)
    models = check_models(recipe, task, skeleton)
    teachers = [
        {
            "name": section.name,
            "num_parameters": None if section.name == SELF else _num_parameters(theirs),
            "cache": _cache(recipe, task, data, limit, index),
        }
        for index, (section, theirs) in enumerate(zip(distill.all_teachers, models.teachers, strict=True))
    ]
    found = {
        "teachers": teachers,
        "student": models.figures,
        "transfer": distill.transfer,
        "baseline": distill.baseline,
        "seeds": distill.seeds,
    }
    return found, models.student


@dataclass(frozen=True)
class Skeletons:
    """The models of a distillation without weights.

    Attributes:
        student: cut, as far as no measurement chooses what. figures: of it, as ``check`` gives them. teachers: in order.
    """

    student: Any
    figures: dict[str, Any]
    teachers: list[Any]


def check_models(recipe: Recipe, task: Task, skeleton: Any) -> Skeletons:
    """Teachers and student of a recipe. Arguments and errors as ``check_distillation``; caches and rows are not looked at."""
    distill = recipe.distill
    assert distill is not None
    check_headline(recipe)
    student: dict[str, Any] = {"cut_from": None, "layers_before": None, "layers": None}
    known = True
    if (init := distill.student_init) is not None:
        before = getattr(skeleton.config.get_text_config(), "num_hidden_layers", None)
        student |= {"cut_from": recipe.model.name, "layers_before": before}
        cut = student_cut(init)
        if init.weights == "random":
            skeleton = fresh_skeleton(skeleton, cut)
        else:
            check_cut(cut, skeleton)
            known = not cut.is_measured
        student["layers"] = init.num_layers or len(init.layers or ()) or before
    student["num_parameters"] = _num_parameters(skeleton) if known else None
    teachers = []
    for index, section in enumerate(distill.all_teachers):
        check_teacher(recipe, index, task)
        theirs = skeleton if section.name == SELF else _teacher_skeleton(recipe, task, index)
        if known and (inner := inner_settings(recipe, distill.losses)):
            plan_inner_losses(inner, skeleton, theirs)
        if distill.cache is not None:
            planned_fill(recipe, task, theirs)
        teachers.append(theirs)
    return Skeletons(skeleton, student, teachers)


def _teacher_skeleton(recipe: Recipe, task: Task, index: int) -> Any:
    theirs = teacher_target(recipe, index).loaded.recipe
    pretrained = build.pretrained_of(theirs)
    return load_skeleton(pretrained, auto_class=task.spec.auto_class, **task.model_kwargs())


def _num_parameters(skeleton: Any) -> int:
    return sum(p.numel() for p in skeleton.parameters())


def _cache(recipe: Recipe, task: Task, data: build.DataParts, limit: int, index: int) -> dict[str, Any] | None:
    """Folder of a teacher's cache and what is in it; examples None: nothing complete."""
    assert recipe.distill is not None
    if recipe.distill.cache is None:
        return None
    folder = cache_folder(recipe, index)
    if recipe.distill.on_policy is not None:  # it holds a cache for each phase, of answers that do not exist yet
        return {"folder": str(folder), "examples": None, "begun": False}
    check_cache_folder(folder)
    if not (folder / "manifest.json").is_file():
        check_begun_cache(lesson_identity(recipe, task, data, limit), recipe, index)
        return {"folder": str(folder), "examples": None, "begun": (folder / "capture.json").is_file()}
    split = open_stored(lesson_identity(recipe, task, data, limit), recipe, index).manifest["splits"]["train"]
    return {"folder": str(folder), "begun": True, **{k: split[k] for k in ("examples", "bytes", "bytes_per_position")}}
