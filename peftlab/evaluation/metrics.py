"""The metrics that a recipe may name. ``scorer`` computes them; nothing heavy is imported here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from peftlab.errors import RecipeError
from peftlab.specs.metrics import METRICS, class_slugs, family_of
from peftlab.specs.task_spec import TaskSpec


def default_metrics(spec: TaskSpec, has_choices: bool) -> list[str]:
    """The metric families used if the recipe names none."""
    return [name for name in _available(spec, has_choices) if METRICS[name].by_default]


def check_metrics(
    names: Sequence[str], spec: TaskSpec, has_choices: bool, *, class_names: Sequence[str] | None = None
) -> None:
    """Checks the recipe's ``eval.metrics``.

    Args:
        names: families ("f1") or flat values ("f1_macro", "f1_spam").
        spec: of the recipe's task.
        has_choices: whether eval.choices is given.
        class_names: without them any NAME_CLASS of a per-class family passes; ``Scorer`` checks it again.

    Raises:
        RecipeError: key eval.metrics, with all invalid names at once.
    """
    available, with_choices = _available(spec, has_choices), _available(spec, True)
    slugs = None if class_names is None else class_slugs(class_names)
    problems = [] if names else ["the list is empty"]
    for name in names:
        family = family_of(name, slugs)
        if family is None or not family.needs:
            problems.append(unknown_metric(name, with_choices, slugs))
        elif family.name not in with_choices:
            problems.append(f"{name!r} does not apply to task: {spec.name}")
        elif family.name not in available:
            problems.append(f"{name!r} needs eval.choices, the possible completions")
    if problems:
        valid = f"metrics for task {spec.name}: {', '.join(_spelled_out(available))}"
        raise RecipeError(f"{'; '.join(problems)}; {valid}", key="eval.metrics")


def flat_names(names: Sequence[str], class_names: Sequence[str] | None) -> list[str]:
    """The flat values of ``names`` that can be ranked: the valid values of eval.best."""
    flat = []
    for name in names:
        if name not in METRICS:
            flat.append(name)
        elif METRICS[name].averaged:
            flat += [f"{name}_macro", *(f"{name}_{slug}" for slug in class_slugs(class_names or []))]
        elif METRICS[name].better is not None:
            flat.append(name)
    return flat


def higher_is_better(name: str) -> bool:
    """Whether larger values of a family or flat value are better.

    Raises:
        RecipeError: key eval.best; unknown metric, or one that cannot be ranked (confusion).
    """
    family = family_of(name)
    if family is None:
        raise RecipeError(unknown_metric(name, list(METRICS), None), key="eval.best")
    if family.better is None:
        raise RecipeError(f"{name!r} has no best value; name one number, such as accuracy or f1_macro", key="eval.best")
    return family.higher_is_better


def unknown_metric(name: str, families: Sequence[str], slugs: Sequence[str] | None) -> str:
    """The error for an unknown metric, with the nearest name among those of ``families``."""
    nearest = difflib.get_close_matches(name, _spelled_out(families, slugs or ()), n=1)
    return f"unknown metric {name!r}" + (f", did you mean {nearest[0]!r}?" if nearest else "")


def _available(spec: TaskSpec, has_choices: bool) -> list[str]:
    columns = {*spec.scores, *spec.answer_scores, *(spec.scores_with_classes if has_choices else ())}
    return [name for name, metric in METRICS.items() if metric.needs and columns.issuperset(metric.needs.values())]


def _spelled_out(families: Iterable[str], slugs: Sequence[str] = ("CLASS",)) -> list[str]:
    names = []
    for family in families:
        names.append(family)
        if METRICS[family].averaged:
            names += [f"{family}_{slug}" for slug in ("macro", *slugs)]
    return names
