"""The metrics, one module each, named as in ``specs.metrics``, in lower case.

The module of a metric that evaluation computes has an ``evaluate.Metric`` and loads by path with ``evaluate.load``, without
a hub. The module of a metric with an interval over rows has ``statistic``, the same value as a function of row counts, or
``statistic_of_class`` for one class.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from peftlab.measuring.intervals import Floats, Statistic
from peftlab.specs.metrics import METRICS


@functools.cache
def load_metric(name: str) -> Any:
    """The ``evaluate.Metric`` class of a family that evaluation computes."""
    import evaluate

    module = import_module(f".{METRICS[name].name.lower()}", __name__)
    (metric,) = [
        kind
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, evaluate.Metric) and kind.__module__ == module.__name__
    ]
    return metric


def takes_class_names(metric: Any) -> bool:
    """Whether a metric is computed per class."""
    return "class_names" in inspect.signature(metric._compute).parameters


def row_statistics(rows: Mapping[str, Floats]) -> dict[str, Statistic]:
    """Returns the headline statistics available from the columns ``rows``, [num_rows] each, by flat name."""
    return {
        spec.headline: import_module(f".{spec.name.lower()}", __name__).statistic(rows)
        for spec in METRICS.values()
        if spec.rows and spec.on_card and rows.keys() >= set(spec.rows)
    }


def class_statistic(family: str, rows: Mapping[str, Floats], index: int) -> tuple[Statistic, int]:
    """Returns the statistic of one class, and its number of rows."""
    statistic: tuple[Statistic, int] = import_module(f".{METRICS[family].name.lower()}", __name__).statistic_of_class(
        rows, index
    )
    return statistic
