"""Converts adapters of other methods to LoRA through PEFT's conversion."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftlab.adapters.lora_files import lora_tensors, write_lora
from peftlab.adapters.spectrum import decompose, rank_holding
from peftlab.adapters.updates import Update
from peftlab.assembly.target import Target
from peftlab.errors import RecipeError
from peftlab.measuring.memory import release_memory
from peftlab.reworking.publishing import APPROXIMATE, Comparison, check_tolerance, write_verified
from peftlab.reworking.source import Source, check_new
from peftlab.training.progress import Progress

Factors = dict[str, tuple[Tensor, Tensor]]


def check_rank(rank: float) -> None:
    """Raises RecipeError unless it is a rank, or a share of the squared norm."""
    if isinstance(rank, int) and rank < 1:
        raise RecipeError(f"expected a --rank of at least 1, or a share of the squared norm such as 0.99, found {rank}")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise RecipeError(f"expected a whole --rank, or a share above 0 and at most 1, found {rank}")


def convert_run(
    target: Target, folder: Path, *, rank: float, tolerance: float | None, progress: Progress
) -> dict[str, Any]:
    """Writes the adapter of ``target`` as LoRA, and verifies it. Args and errors: see ``api.convert_adapter``."""
    check_new(folder)
    check_rank(rank)
    check_tolerance(tolerance)
    source = Source.open(target, progress)
    is_dora = source.method == "LORA" and bool(source.config.use_dora)
    if source.method == "LORA" and not is_dora:
        raise RecipeError(f"{target.adapter} is a LoRA adapter already; peftlab adapters shrink lowers its rank")
    updates = source.updates()
    progress.stage(f"converting {len(updates)} modules to LoRA")
    factors = _of_dora(updates, rank) if is_dora else _through_peft(source.opened.model, updates, rank)
    metrics = {"before": source.metrics(progress)}
    ranks = {update.name: factors[update.name][0].shape[1] for update in updates}
    tensors: dict[str, Tensor] = {}
    for update in updates:
        if ranks[update.name]:
            tensors |= lora_tensors(update, *factors[update.name])
    modules, total = _errors(updates, factors)
    report: dict[str, Any] = {
        "verb": "convert",
        "source": str(target.adapter),
        "method": "DORA" if is_dora else source.method,
        "error": total,
        "parameters": {
            "before": sum(u.num_parameters for u in updates),
            "after": sum(ranks[u.name] * sum(u.shape) for u in updates),
        },
        "metrics": metrics,
        "of_training": source.of_training,
        "modules": modules,
    }
    config, others = source.config, source.others()
    comparison = Comparison(target, source.assembly, source.held_out, source.reference)
    report["in_full"] = sum(t.numel() for t in others.values())
    del source, updates, factors
    release_memory()
    return write_verified(
        folder,
        lambda written: write_lora(written, tensors, ranks, config=config, others=others),
        comparison,
        report,
        tolerance=APPROXIMATE if tolerance is None else tolerance,
        remedy="Use a larger --rank, or allow more with --tolerance",
        progress=progress,
    )


def _through_peft(model: Any, updates: Sequence[Update], rank: float) -> Factors:
    """Left and right factors by module, by PEFT. Raises: RecipeError with PEFT's reason."""
    from peft.tuners.lora.conversion import convert_to_lora

    if (odd := next((u for u in updates if u.layout != "linear"), None)) is not None:
        raise RecipeError(f"PEFT converts linear layers only, and {odd.name} is of kind {odd.layout}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, state = convert_to_lora(model, rank=rank)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise RecipeError(f"PEFT cannot convert this adapter to LoRA: {reason}") from error
    return {u.name: (state[f"{u.path}.lora_B.weight"], state[f"{u.path}.lora_A.weight"]) for u in updates}


def _of_dora(updates: Sequence[Update], rank: float) -> Factors:
    """Left and right factors of W' - W. PEFT (0.21) would convert B A and drop the magnitudes, without a word."""
    factors = {}
    for update in updates:
        parts = decompose(update)
        count = rank if isinstance(rank, int) else rank_holding(parts.values, rank)
        factors[update.name] = parts.cut(min(int(count), len(parts.values)))
    return factors


@torch.no_grad()
def _errors(updates: Sequence[Update], factors: Factors) -> tuple[list[dict[str, Any]], float]:
    """The Frobenius error of each module, relative to its update, and that of all together."""
    modules, lost, whole = [], 0.0, 0.0
    for update in updates:
        left, right = factors[update.name]
        matrix = update.matrix().double()
        error, norm = float((matrix - left.double() @ right.double()).norm()), float(matrix.norm())
        lost, whole = lost + error**2, whole + norm**2
        modules.append({"name": update.name, "rank": left.shape[1], "error": error / norm if norm else 0.0})
    return modules, (lost / whole) ** 0.5 if whole else 0.0
