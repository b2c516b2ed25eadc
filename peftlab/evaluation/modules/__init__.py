"""The metrics, a module each, by the names in ``specs.metrics``.

Of a metric that evaluation computes the module holds an ``evaluate.Metric``, and loads by path with ``evaluate.load``, without
a hub. Of one with an interval over rows it holds ``statistic``: the same value as a function of how often each row counts,
or ``statistic_of_class`` for one class.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from peftlab.measuring.intervals import Floats, Statistic
from peftlab.specs.metrics import METRICS


def load_metric(name: str) -> Any:
    """The ``evaluate.Metric`` class of a family that evaluation computes."""
    import evaluate

    module = import_module(f".{METRICS[name].name}", __name__)
    (metric,) = [
        found
        for found in vars(module).values()
        if inspect.isclass(found) and issubclass(found, evaluate.Metric) and found.__module__ == module.__name__
    ]
    return metric


def takes_class_names(metric: Any) -> bool:
    """Whether a metric is computed class by class."""
    return "class_names" in inspect.signature(metric._compute).parameters


def row_statistics(rows: Mapping[str, Floats]) -> dict[str, Statistic]:
    """The headline values that can be computed from the columns ``rows``, [num_rows] each, by flat name."""
    return {
        spec.headline: import_module(f".{spec.name}", __name__).statistic(rows)
        for spec in METRICS.values()
        if spec.rows and spec.on_card and rows.keys() >= set(spec.rows)
    }


def class_statistic(family: str, rows: Mapping[str, Floats], index: int) -> tuple[Statistic, int]:
    """The value of one class, and how many rows it is about."""
    found: tuple[Statistic, int] = import_module(f".{METRICS[family].name}", __name__).statistic_of_class(rows, index)
    return found
