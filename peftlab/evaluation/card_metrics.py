"""How the report card shows each metric, and in which order."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from peftlab.errors import RecipeError, listed
from peftlab.evaluation.card_shape import Ratio
from peftlab.evaluation.metrics import unknown_metric
from peftlab.specs.metrics import (
    CARD_ORDER,
    METRICS,
    ROWS,
    ROWS_OF_ANSWERS,
    ROWS_OF_CHOICES,
    ROWS_OF_ENTITIES,
    ROWS_OF_TEXTS,
    family_of,
    values_of,
)
from peftlab.specs.task_spec import TaskSpec


@dataclass(frozen=True)
class CardMetric:
    """See ``card_shape.MetricRow`` for the attributes. lowest, highest: the metric's range."""

    label: str
    higher_is_better: bool
    in_points: bool
    kept_as: Ratio | None
    note: str
    lowest: float
    highest: float


def card_metric(name: str) -> CardMetric:
    """Returns how a card shows a flat metric name. Raises: RecipeError for an unknown metric."""
    spec = family_of(name)
    if spec is None:
        raise RecipeError(unknown_metric(name, list(METRICS), None), key="eval.best")
    named = name == spec.headline and bool(spec.label)
    return CardMetric(
        label=spec.label if named else name.replace("_", " "),
        higher_is_better=spec.higher_is_better,
        in_points=spec.share,
        kept_as=spec.kept_as,
        note=spec.note if named else "",
        lowest=spec.lowest,
        highest=spec.highest,
    )


def in_order(names: set[str], headline: str) -> list[str]:
    """Sorts metric names: the headline, known metrics in the card's order, then the others by name."""
    known = [name for name in CARD_ORDER if name in names and name != headline]
    return [headline, *known, *sorted(names - set(known) - {headline})]


def class_metrics(names: Sequence[str] | None, spec: TaskSpec) -> dict[str, tuple[str, int]]:
    """Maps flat names of per-class metrics, such as ``recall_spam``, to (family, index of the class or entity label)."""
    columns = _columns(spec, has_choices=spec.classes_from == "eval.choices")
    families = [s for s in METRICS.values() if s.rows and (s.of_entities if spec.marks_entities else s.averaged)]
    families = [family for family in families if columns >= set(family.rows)]
    return {value: (f.name, i) for f in families for i, value in enumerate(values_of(f, names or []))}


def check_headline(name: str, spec: TaskSpec, class_names: Sequence[str] | None, *, has_choices: bool) -> None:
    """Raises RecipeError unless ``name`` is a metric with an interval over rows, which a verdict needs."""
    known = [*_verdict_metrics(spec, has_choices), *class_metrics(class_names, spec)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(
            f"expected a metric of the report card ({listed(known, most=20)}), found {name!r}{hint}",
            key="distill.headline",
        )


def _verdict_metrics(spec: TaskSpec, has_choices: bool) -> list[str]:
    columns = _columns(spec, has_choices=has_choices)
    return [s.headline for s in METRICS.values() if s.rows and s.on_card and columns >= set(s.rows)]


def _columns(spec: TaskSpec, *, has_choices: bool) -> frozenset[str]:
    columns = ROWS[spec.predicts] | (ROWS_OF_CHOICES if has_choices else frozenset())
    columns |= ROWS_OF_ENTITIES if spec.marks_entities else frozenset()
    columns |= ROWS_OF_ANSWERS if spec.predicts == "spans" else frozenset()
    return columns | (ROWS_OF_TEXTS if spec.always_writes else frozenset())
