"""Computes metrics from the columns that a task's ``score`` returns batch by batch.

The ``evaluate`` modules in ``peftlab/evaluation/modules`` compute the values. Importing them takes seconds, so only
``Scorer.compute`` does it.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from peftlab.errors import DataError, RecipeError
from peftlab.evaluation.metrics import unknown_metric
from peftlab.specs.metrics import METRICS, class_slugs, family_of

# Columns whose values are class indices.
_INDICES = {"predictions", "references"}
# The result of a task's ``score`` for one batch, by column name: a number, or a list of numbers, texts or other values.
Columns = Mapping[str, float | int | Sequence[Any]]


class Scorer:
    """Collects columns batch by batch and computes the flat metric values.

    Keeps only the columns, a few numbers per batch or row, and nothing of the size of logits or vocabulary. Writes no files
    and shares no state, so several can coexist.

    Args:
        names: families or flat values; only these are returned.
        class_names: one per class index; required by class metrics.

    Raises:
        RecipeError: key eval.metrics; unknown name, or class metrics without class names.
    """

    def __init__(self, names: Sequence[str], *, class_names: Sequence[str] | None = None) -> None:
        self._class_names = list(class_names or [])
        self._slugs = class_slugs(self._class_names)
        self._families: dict[str, str] = {}
        for name in names:
            family = family_of(name, class_names or None)
            if family is None or not family.needs:
                raise RecipeError(unknown_metric(name, list(METRICS), class_names), key="eval.metrics")
            if family.of_classes and not self._slugs:
                raise RecipeError(f"{name!r} needs classes (causal_lm: eval.choices)", key="eval.metrics")
            self._families[name] = family.name
        needed = dict.fromkeys(column for f in self._families.values() for column in METRICS[f].needs.values())
        self._columns: dict[str, array[Any] | list[Any] | None] = dict.fromkeys(needed)

    @property
    def columns(self) -> set[str]:
        """The columns that its metrics need."""
        return set(self._columns)

    def add(self, columns: Columns) -> None:
        """Adds one batch; ignores columns that no metric needs.

        Args: columns: ``num_...`` counts of the batch, ``nll_sum`` nats summed in float64, or one number per row:
            ``predictions`` and ``references`` of classes are their indices. A task with other columns gives lists of
            numbers, texts or other values, as its metrics take them.
        Raises:
            ValueError: a needed column is missing, related columns differ in length, or an index is not a class.
        """
        if missing := self._columns.keys() - columns.keys():
            raise ValueError(f"expected the columns {', '.join(self._columns)}, but {min(missing)} is missing")
        values = {name: _as_list(columns[name]) for name in self._columns}
        for family in dict.fromkeys(self._families.values()):
            needed = [values[column] for column in METRICS[family].needs.values()]
            if len({len(column) for column in needed}) > 1:
                names = " and ".join(METRICS[family].needs.values())
                raise ValueError(f"expected equally many {names}, found {', '.join(str(len(c)) for c in needed)}")
            if METRICS[family].of_classes and set(METRICS[family].needs.values()) >= _INDICES:
                self._check_classes(values["predictions"], values["references"])
        for name, column in values.items():
            kept = self._columns[name]
            if kept is None and not column:
                continue
            if kept is None:
                kept = self._columns[name] = _store(column)
            kept.extend(column)

    def compute(self) -> dict[str, float | None]:
        """The requested values by flat name: one per family in the order of names, then the per-class values.

        Precision, recall and F1 of a class that no row has are None, and 0.0 if there is nothing else to divide by; the
        macro average is over the classes that occur in predictions or references. ``confusion`` gives
        ``confusion_R_as_P``, the rows of class R predicted as P.
        Values may be ``nan`` or ``inf`` (perplexity beyond float64): JSON writers must handle them.

        Raises:
            DataError: a metric has no data.
        """
        from peftlab.evaluation.modules import load_metric, takes_class_names

        columns = {name: list(kept or ()) for name, kept in self._columns.items()}
        values: dict[str, float | None] = {}
        # The modules create a cache folder even if they keep everything in memory.
        with tempfile.TemporaryDirectory(prefix="peftlab-metrics-") as scratch:
            for family in dict.fromkeys(self._families.values()):
                metric = load_metric(family)
                arguments: dict[str, Any] = {name: columns[of] for name, of in METRICS[family].needs.items()}
                if not all(arguments.values()) or not any(arguments.get("num_tokens", [1])):
                    raise DataError("expected rows to score, found none: the evaluation data has no rows to score")
                if takes_class_names(metric):
                    arguments["class_names"] = self._class_names if METRICS[family].of_entities else self._slugs
                computed = metric(keep_in_memory=True, cache_dir=scratch, seed=0).compute(**arguments)
                wanted = self._families
                flat = self._flat(computed)
                values |= {v: number for v, number in flat.items() if family in wanted or v in wanted}
        headlines = {spec.headline for spec in METRICS.values()}
        return dict(sorted(values.items(), key=lambda item: item[0] not in headlines))

    def _check_classes(self, *columns: Sequence[Any]) -> None:
        outside = {int(i) for column in columns for i in column} - set(range(len(self._slugs)))
        if outside:
            raise ValueError(f"expected class indices in 0..{len(self._slugs) - 1}, found {sorted(outside)}")

    def _flat(self, computed: Mapping[str, Any]) -> dict[str, float | None]:
        """Flattens ``computed``: a matrix over classes becomes one value per pair."""
        flat: dict[str, float | None] = {}
        for name, value in computed.items():
            if not isinstance(value, list):
                flat[name] = value
                continue
            for reference, row in zip(self._slugs, value, strict=True):
                flat |= {
                    f"{name}_{reference}_as_{predicted}": float(n)
                    for predicted, n in zip(self._slugs, row, strict=True)
                }
        return flat


def _store(column: Sequence[Any]) -> array[Any] | list[Any]:
    """An empty store for such values."""
    if not all(isinstance(v, int | float) for v in column):
        return []
    return array("d" if any(isinstance(v, float) for v in column) else "q")


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, int | float) else [v.item() if hasattr(v, "item") else v for v in value]
