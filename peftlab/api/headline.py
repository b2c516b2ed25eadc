"""Which metric of the report card its verdict is about."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from peftlab.api import build
from peftlab.data import class_names
from peftlab.errors import RecipeError
from peftlab.evaluation.metrics import class_slugs
from peftlab.recipe import Recipe

_DEFAULT = {"causal_lm": "perplexity", "seq_cls": "accuracy", "image_cls": "accuracy", "embedding": "spearman"}
_CLASSES = ("accuracy", "f1_macro")
# Of each task, with an interval over rows: a verdict needs one. cosine is missing where the widths differ.
_ALWAYS = {
    "causal_lm": ("perplexity", "loss", "token_accuracy", "exact_match", "agreement", "kl"),
    "seq_cls": (*_CLASSES, "loss", "brier", "agreement", "kl"),
    "image_cls": (*_CLASSES, "loss", "brier", "agreement", "kl"),
    "embedding": ("spearman", "neighbour_recall"),
}
FAMILIES = ("recall", "precision", "f1")


def headline_of(recipe: Recipe) -> str:
    """The recipe's, or the task's own."""
    assert recipe.distill is not None
    if recipe.distill.headline is not None:
        return recipe.distill.headline
    return "accuracy" if recipe.eval.choices else _DEFAULT[recipe.task]


def class_metrics(names: Sequence[str] | None) -> dict[str, tuple[str, int]]:
    """Flat name of each metric of one class, such as ``recall_spam`` -> (family, class index)."""
    slugs = class_slugs(names or [])
    return {f"{family}_{slug}": (family, i) for family in FAMILIES for i, slug in enumerate(slugs)}


def check_headline(recipe: Recipe) -> None:
    """Raises RecipeError where distill.headline is no metric of the card: before anything is trained."""
    assert recipe.distill is not None
    name = recipe.distill.headline
    if name is None:
        return
    names = recipe.eval.choices
    if recipe.classifies:
        names = class_names(build.read_class_labels(recipe, build.load_data(recipe).labelled))
    known = [*_ALWAYS[recipe.task], *(_CLASSES if recipe.eval.choices else ()), *class_metrics(names)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(
            f"expected a metric of the report card ({', '.join(known)}), found {name!r}{hint}", key="distill.headline"
        )
