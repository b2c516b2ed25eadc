"""The metrics of a run: those of the recipe or of its task, and the classes that held-out rows have."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from peftlab.assembly.data import read_class_labels
from peftlab.errors import RecipeError, listed
from peftlab.evaluation.metrics import check_metrics, default_metrics, flat_names
from peftlab.specs.metrics import METRICS, family_of, values_of
from peftlab.tasks import Generates

if TYPE_CHECKING:
    from peftlab.assembly.assembly import Assembly


def run_metrics(assembly: Assembly, *, reads_rows: bool) -> list[str]:
    """Names of the metrics. Args: reads_rows: whether there are held-out rows.

    Raises: RecipeError for an unknown metric, or if eval.best is not among them or cannot be measured.
    """
    e, choices = assembly.recipe.eval, bool(assembly.recipe.eval.choices)
    if e.metrics is not None:
        check_metrics(e.metrics, assembly.spec, choices)
    metrics = e.metrics or default_metrics(assembly.spec, choices)
    if reads_rows and any(METRICS[name].of_answers for name in metrics if name in METRICS):
        cast(Generates, assembly.task).answers_need(assembly.data.eval)
    names = flat_names(metrics, assembly.task.class_names)
    if e.best is not None and e.best not in names:
        raise RecipeError(f"{e.best!r} is not among this run's metrics: {listed(names, most=20)}", key="eval.best")
    if e.best is not None and reads_rows:
        check_class_has_rows(assembly, e.best, key="eval.best")
    return metrics


def check_class_has_rows(assembly: Assembly, metric: str, *, key: str) -> None:
    """Raises RecipeError at ``key`` if ``metric`` is of one class, and no held-out row has that class."""
    classes, family = assembly.task.class_names, family_of(metric)
    if classes is None or family is None:
        return
    name = values_of(family, classes).get(metric)
    if name is not None and name not in _held_out_classes(assembly):
        raise RecipeError(
            f"no held-out row has the class {name!r}, so {metric} cannot be measured; name another metric, or give "
            "data.eval rows of it",
            key=key,
        )


def _held_out_classes(assembly: Assembly) -> set[str]:
    if assembly.spec.classifies:
        return set(read_class_labels(assembly.recipe, assembly.data.eval, all_names_used=False))
    encoded = assembly.task.encode(
        assembly.data.eval,
        max_length=assembly.limit,
        too_long=assembly.recipe.data.too_long,
        training=False,
        keep=False,
    )
    return {entry["label"] for entry in encoded.ledger.label_counts() or () if entry["rows"]}
