"""The metrics that a recipe may name. ``scorer`` computes them; nothing heavy is imported here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from peftlab.errors import RecipeError
from peftlab.specs.metrics import METRICS, family_of, values_of
from peftlab.specs.task_spec import TaskSpec


def default_metrics(spec: TaskSpec, has_choices: bool) -> list[str]:
    """The metric families used if the recipe names none."""
    chosen = spec.default_metrics
    available = [n for n in _available(spec, has_choices) if spec.always_writes or not METRICS[n].of_answers]
    return [n for n in available if (n in chosen if chosen else METRICS[n].by_default)]


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
    problems = [] if names else ["the list is empty"]
    for name in names:
        family = family_of(name, class_names)
        if family is None or not family.needs:
            problems.append(unknown_metric(name, with_choices, class_names))
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
        elif METRICS[name].better is not None:
            flat += [METRICS[name].headline, *values_of(METRICS[name], class_names or [])]
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


def unknown_metric(name: str, families: Sequence[str], class_names: Sequence[str] | None) -> str:
    """The error for an unknown metric, with the nearest name among those of ``families``."""
    nearest = difflib.get_close_matches(name, _spelled_out(families, class_names or ()), n=1)
    return f"unknown metric {name!r}" + (f", did you mean {nearest[0]!r}?" if nearest else "")


def _available(spec: TaskSpec, has_choices: bool) -> list[str]:
    columns = {*spec.scores, *spec.answer_scores, *(spec.scores_with_classes if has_choices else ())}
    return [name for name, metric in METRICS.items() if metric.needs and columns.issuperset(metric.needs.values())]


def _spelled_out(families: Iterable[str], class_names: Sequence[str] | None = None) -> list[str]:
    """Args: class_names: None: ``CLASS`` or ``LABEL`` stands for them."""
    names: list[str] = []
    for spec in (METRICS[family] for family in families):
        of_classes = ("B-LABEL" if spec.of_entities else "CLASS",) if class_names is None else class_names
        names += dict.fromkeys([spec.name, spec.headline, *values_of(spec, of_classes)])
    return names
