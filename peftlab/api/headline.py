"""Which metric of the report card its verdict is about."""

from __future__ import annotations

from peftlab.api import build
from peftlab.data import class_names
from peftlab.evaluation import card_metrics
from peftlab.recipe import Recipe


def headline_of(recipe: Recipe) -> str:
    """The recipe's, or the task's own."""
    assert recipe.distill is not None
    if recipe.distill.headline is not None:
        return recipe.distill.headline
    spec = recipe.spec
    return spec.headline_with_classes if recipe.eval.choices and spec.headline_with_classes else spec.headline


def check_headline(recipe: Recipe) -> None:
    """Raises RecipeError where distill.headline is no metric of the card: before anything is trained."""
    assert recipe.distill is not None
    name, names = recipe.distill.headline, recipe.eval.choices
    if name is None:
        return
    if recipe.spec.classifies:
        names = class_names(build.read_class_labels(recipe, build.load_data(recipe).labelled))
    card_metrics.check_headline(name, recipe.task, names, has_choices=bool(recipe.eval.choices))
