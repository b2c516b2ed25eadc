"""Shrinks a trained adapter: one threshold over the singular values of all its updates."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from peftlab.adapters.lora_files import lora_tensors, write_lora
from peftlab.adapters.spectrum import cut_at, decompose
from peftlab.assembly.target import Target
from peftlab.errors import RecipeError
from peftlab.measuring.memory import release_memory
from peftlab.reworking.publishing import APPROXIMATE, Comparison, check_tolerance, write_verified
from peftlab.reworking.source import Source, check_new
from peftlab.training.progress import Progress

DEFAULT_ENERGY = 0.99


def shrink_run(
    target: Target,
    folder: Path,
    *,
    keep: float | None,
    threshold: float | None,
    budget: int | None,
    tolerance: float | None,
    progress: Progress,
) -> dict[str, Any]:
    """Writes the adapter of ``target`` with its largest singular values only, and verifies it.

    Args and errors: see ``api.shrink_adapter``.
    """
    check_new(folder)
    check_rule(keep, threshold, budget)
    check_tolerance(tolerance)
    source = Source.open(target, progress)
    updates = source.updates()
    progress.stage(f"decomposing {len(updates)} updates")
    parts = {update.name: decompose(update) for update in updates}
    before = sum(update.num_parameters for update in updates)
    cut = cut_at(
        {name: part.values for name, part in parts.items()},
        {update.name: sum(update.shape) for update in updates},
        threshold=threshold,
        budget=budget if keep is None else math.floor(keep * before),
        energy=DEFAULT_ENERGY if keep is threshold is budget is None else None,
    )
    metrics = {"before": source.metrics(progress)}
    tensors: dict[str, Any] = {}
    for update in updates:
        if rank := cut.ranks[update.name]:
            tensors |= lora_tensors(update, *parts[update.name].cut(rank))
    config, others = source.config, source.others()
    comparison = Comparison(target, source.assembly, source.held_out, source.reference)
    report: dict[str, Any] = {
        "verb": "shrink",
        "source": str(target.adapter),
        "rule": _rule(keep, threshold, budget),
        "threshold": cut.threshold,
        "energy": cut.energy,
        "parameters": {"before": before, "after": cut.num_parameters, "share": cut.num_parameters / before},
        "in_full": sum(t.numel() for t in others.values()),
        "metrics": metrics,
        "of_training": source.of_training,
        "modules": [
            {"name": u.name, "rank_before": u.rank, "rank": cut.ranks[u.name], "energy": _held(parts[u.name].values, cut.ranks[u.name])}
            for u in updates
        ],
        "vanished": [name for name, rank in cut.ranks.items() if not rank],
    }  # fmt: skip
    del source, updates, parts  # the first model, before the second is loaded
    release_memory()
    return write_verified(
        folder,
        lambda written: write_lora(written, tensors, cut.ranks, config=config, others=others),
        comparison,
        report,
        tolerance=APPROXIMATE if tolerance is None else tolerance,
        remedy="Keep more (--keep, --budget, --threshold), or allow more with --tolerance",
        progress=progress,
    )


def check_rule(keep: float | None, threshold: float | None, budget: int | None) -> None:
    """Raises RecipeError unless at most one of them is given, in its range."""
    given = [f"--{n}" for n, v in (("keep", keep), ("threshold", threshold), ("budget", budget)) if v is not None]
    if len(given) > 1:
        raise RecipeError(f"{' and '.join(given)} exclude each other: each determines the one threshold")
    for name, value in (("keep", keep), ("threshold", threshold)):
        if value is not None and not 0 < value <= 1:
            raise RecipeError(f"expected --{name} above 0 and at most 1, found {value}")
    if budget is not None and budget < 1:
        raise RecipeError(f"expected a --budget of at least one parameter, found {budget}")


def _rule(keep: float | None, threshold: float | None, budget: int | None) -> dict[str, float]:
    named = {"keep": keep, "threshold": threshold, "budget": budget}
    return {name: value for name, value in named.items() if value is not None} or {"energy": DEFAULT_ENERGY}


def _held(values: Any, rank: int) -> float:
    total = float(values.square().sum())
    return float(values[:rank].square().sum()) / total if total else 1.0
