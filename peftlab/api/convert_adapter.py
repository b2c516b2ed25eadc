"""``convert_adapter``: an adapter of another method as LoRA, verified."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftlab.assembly.process import located, prepare_libraries
from peftlab.assembly.target import RecipeSource
from peftlab.measuring.memory import frozen_heap
from peftlab.reworking.converting import convert_run
from peftlab.reworking.source import find_adapter
from peftlab.training.progress import Progress, make_progress


def convert_adapter(
    target: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    rank: float,
    tolerance: float | None = None,
    recipe: RecipeSource | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes an adapter of another method (LoHa, LoKr, VeRA, FourierFT, DoRA, ...) as plain LoRA, and verifies it.

    PEFT converts each module: LoRA's factors are the largest singular values of its update.

    Args:
        target: a run folder or its adapter folder, or a folder with an adapter of PEFT, which needs ``recipe``.
        folder: to write; `eval`, `predict` and `merge` take it.
        rank: an int is the rank of each module; a float the share of each module's squared norm to keep.
        tolerance: largest mean KL in nats from the outputs of the original adapter; default 0.02.

    Returns: the report, also in ``FOLDER/convert.json``: the error of each update and of all, relative to the Frobenius norm
        of the update, the agreement on held-out rows, and the metrics before and after.
    Raises: RecipeError with PEFT's reason for a method that it cannot convert; VerificationError beyond the tolerance, with
        nothing written.
    """
    prepare_libraries()
    resolved = find_adapter(target, recipe, overrides)
    with located(resolved.loaded), frozen_heap(), progress or make_progress() as progress:
        for line in resolved.loaded.notes:
            progress.note(line)
        return convert_run(resolved, Path(folder), rank=rank, tolerance=tolerance, progress=progress)
