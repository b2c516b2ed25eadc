"""What an adapter changes, module by module: the figures of ``peftlab adapters show``."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from peftlab.adapters import method_of
from peftlab.adapters.spectrum import decompose, effective_rank, places, rank_holding
from peftlab.adapters.updates import Update, changed_base, read_updates, trained_in_full
from peftlab.assembly.target import Target, open_target
from peftlab.specs.methods import METHODS
from peftlab.training.progress import Progress

_MOST_VALUES = 16


def adapter_figures(target: Target, progress: Progress) -> dict[str, Any]:
    """The figures of each adapted module, of each kind of module, and of all; see ``api.show_adapter``."""
    opened = open_target(target, progress, check=False)
    config = opened.model.peft_config["default"]
    notes, method = [], method_of(config)
    if config.is_prompt_learning:
        notes.append(f"{METHODS[method].label} adds virtual tokens to the input: there is no update matrix")
    if (name := changed_base(config)) is not None:
        notes.append(f"initialised with {name}: updates are relative to the base weights that it changed")
    progress.stage("decomposing the updates")
    modules = [] if config.is_prompt_learning else [_figures(update) for update in read_updates(opened.model)]
    where = places([m["name"] for m in modules])
    for module in modules:
        module["layer"], module["kind"] = where[module["name"]]
    return {
        "target": str(target.adapter),
        "method": method,
        "base": target.loaded.recipe.model.name,
        "modules": modules,
        "kinds": kind_totals(modules),
        "total": _total(modules),
        "in_full": trained_in_full(opened.model) if modules else {},
        "notes": notes,
    }


def _figures(update: Update) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": update.name,
        "rank": update.rank,
        "num_parameters": update.num_parameters,
        "weight_norm": update.weight_norm,
        "shape": list(update.shape) if update.reason is None else None,
        "reason": update.reason,
    }
    if update.reason is not None:
        return {**facts, "norm": None, "relative": None, "values": [], "effective_rank": None, "rank_99": None}
    values = decompose(update).values.cpu()
    norm = float(values.square().sum().sqrt())
    return {
        **facts,
        "norm": norm,
        "relative": norm / update.weight_norm if update.weight_norm else math.inf,
        "values": values[:_MOST_VALUES].tolist(),
        "effective_rank": effective_rank(values),
        "rank_99": rank_holding(values, 0.99),
    }


def kind_totals(modules: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The figures of each kind of module, those with the largest relative norm first."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for module in modules:
        groups[module["kind"]].append(module)
    kinds = [{"kind": kind, **_total(group)} for kind, group in groups.items()]
    return sorted(kinds, key=lambda kind: -(kind["relative"] if kind["relative"] is not None else -1.0))


def _total(modules: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of several modules: norms as of one block-diagonal matrix, ranks as means."""
    known = [m for m in modules if m["reason"] is None]
    norm = math.sqrt(sum(m["norm"] ** 2 for m in known))
    weight = math.sqrt(sum(m["weight_norm"] ** 2 for m in known))
    ranks = [m["rank"] for m in known if m["rank"] is not None]

    def mean(values: Sequence[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "num_modules": len(modules),
        "num_parameters": sum(m["num_parameters"] for m in modules),
        "norm": norm if known else None,
        "relative": norm / weight if weight else None,
        "effective_rank": mean([m["effective_rank"] for m in known]),
        "rank_99": mean([m["rank_99"] for m in known]),
        "rank": mean(ranks),
    }
