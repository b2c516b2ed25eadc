"""Checks of a distillation before weights are loaded: teachers, student, losses, headline, caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftlab.assembly import Assembly
from peftlab.assembly.metrics import check_class_has_rows
from peftlab.distillation.cache.manifest import CAPTURE, MANIFEST
from peftlab.evaluation.card_metrics import check_headline
from peftlab.experiments.student import student_cut
from peftlab.models.student import check_cut, fresh_skeleton
from peftlab.teaching.alignment import check_routes
from peftlab.teaching.caches import (
    cache_folder,
    check_begun_cache,
    check_cache_folder,
    examples_identity,
    open_stored,
    planned_fill,
)
from peftlab.teaching.teacher import NamedTeacher, named_teachers
from peftlab.teaching.teachers import inner_settings
from peftlab.training.inner_losses import plan_inner_losses


@dataclass(frozen=True)
class Skeletons:
    """The models of a distillation, without weights.

    Attributes:
        student: already cut, unless measurements decide the cut. figures: the student's part of ``check``. teachers: in order.
    """

    student: Any
    figures: dict[str, Any]
    teachers: list[Any]


def describe_distillation(assembly: Assembly) -> tuple[dict[str, Any], Any]:
    """Returns plain values for ``check`` (``teachers``, each with its cache, and ``student``), and the student without
    weights, already cut unless measurements decide the cut.

    Raises: the errors of ``distill`` that need no weights: RecipeError, DataError, ArtifactError.
    """
    distill = assembly.distill
    check_routes(assembly)
    models = check_models(assembly)
    teachers = [
        {
            "name": teacher.name,
            "num_parameters": None if teacher.is_self else _num_parameters(skeleton),
            "cache": _cache(assembly, teacher),
        }
        for teacher, skeleton in zip(named_teachers(assembly), models.teachers, strict=True)
    ]
    about = {
        "teachers": teachers,
        "student": models.figures,
        "transfer": distill.transfer,
        "baseline": distill.baseline,
        "seeds": distill.seeds,
    }
    return about, models.student


def check_models(assembly: Assembly) -> Skeletons:
    """Checks headline, teachers and student of a recipe, but not caches or rows. Raises: as ``describe_distillation``."""
    distill = assembly.distill
    if distill.headline is not None:
        choices = bool(assembly.recipe.eval.choices)
        check_headline(distill.headline, assembly.spec, assembly.classes, has_choices=choices)
        check_class_has_rows(assembly, distill.headline, key="distill.headline")
    student: dict[str, Any] = {"cut_from": None, "layers_before": None, "layers": None}
    skeleton, known = assembly.skeleton(), True
    if (init := distill.student_init) is not None:
        before = getattr(skeleton.config.get_text_config(), "num_hidden_layers", None)
        student |= {"cut_from": assembly.recipe.model.name, "layers_before": before}
        cut = student_cut(init)
        if init.weights == "random":
            skeleton = fresh_skeleton(skeleton, cut)
        else:
            check_cut(cut, skeleton)
            known = not cut.is_measured
        student["layers"] = init.num_layers or len(init.layers or ()) or before
    student["num_parameters"] = _num_parameters(skeleton) if known else None
    teachers = []
    for teacher in named_teachers(assembly):
        teacher.check()
        theirs = skeleton if teacher.is_self else teacher.skeleton()
        if known and (inner := inner_settings(distill.losses, assembly.spec.predicts)):
            plan_inner_losses(inner, skeleton, theirs)
        if distill.cache is not None:
            planned_fill(assembly, theirs)
        teachers.append(theirs)
    return Skeletons(skeleton, student, teachers)


def _num_parameters(skeleton: Any) -> int:
    return sum(p.numel() for p in skeleton.parameters())


def _cache(assembly: Assembly, teacher: NamedTeacher) -> dict[str, Any] | None:
    """The folder and contents of a teacher's cache; examples is None if it is incomplete."""
    if assembly.distill.cache is None:
        return None
    folder = cache_folder(assembly, teacher)
    if assembly.distill.on_policy is not None:  # one cache per phase, for answers that do not exist yet
        return {"folder": str(folder), "examples": None, "begun": False}
    check_cache_folder(folder)
    identity = examples_identity(assembly, assembly.data.train)
    if not (folder / MANIFEST).is_file():
        check_begun_cache(identity, assembly, teacher)
        return {"folder": str(folder), "examples": None, "begun": (folder / CAPTURE).is_file()}
    split = open_stored(identity, assembly, teacher).manifest["splits"]["train"]
    return {"folder": str(folder), "begun": True, **{k: split[k] for k in ("examples", "bytes", "bytes_per_position")}}
