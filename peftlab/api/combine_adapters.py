"""``combine_adapters``: one adapter from several of the same base, verified."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftlab.assembly.process import located, prepare_libraries
from peftlab.assembly.target import RecipeSource
from peftlab.measuring.memory import frozen_heap
from peftlab.reworking.combining import check_method, combine_runs
from peftlab.reworking.source import find_adapter
from peftlab.training.progress import Progress, make_progress


def combine_adapters(
    targets: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    tolerance: float | None = None,
    recipe: RecipeSource | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes one plain LoRA adapter from several LoRA adapters of the same base, and verifies it on held-out rows of the first.

    Args:
        targets: run or adapter folders. What they train in full, such as a head, comes from the first.
        folder: to write; `eval`, `predict` and `merge` take it, with the lock of the first.
        method: ``linear`` (the weighted sum of the updates, of the sum of the ranks), ``difference`` (the first minus the
            second), ``svd`` (the sum, cut to ``rank``; default: the largest rank of the first), or ``ties``, ``dare_linear``
            and ``dare_ties`` as PEFT computes them on the factors.
        weights: one per adapter; default 1 each. density: share of the values that ties and dare keep; default 0.5.
        tolerance: largest mean KL in nats; default 1e-4, for an ``svd`` that loses something 0.02.

    Returns: the report, also in ``FOLDER/combine.json``: the metrics of each adapter and of the result, all on the rows of the
        first, and the agreement with the sum of the updates (PEFT's forward with all adapters active), or for ties and dare
        with PEFT's combined adapter in memory.
    Raises: ArtifactError for adapters of different bases; VerificationError beyond the tolerance, with nothing written.
    """
    check_method(method, weights, len(targets), density, rank)
    prepare_libraries()
    resolved = [find_adapter(target, recipe, overrides) for target in targets]
    with located(resolved[0].loaded), frozen_heap(), progress or make_progress() as progress:
        for line in resolved[0].loaded.notes:
            progress.note(line)
        return combine_runs(
            resolved,
            Path(folder),
            method=method,
            weights=weights,
            density=density,
            rank=rank,
            tolerance=tolerance,
            progress=progress,
        )
