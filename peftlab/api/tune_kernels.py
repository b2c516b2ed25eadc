"""``tune_kernels``: finds the fastest plans for adapted linears on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peftlab.assembly.process import prepare_libraries
from peftlab.bench import plan_tuning


def tune_kernels(
    *,
    model: str | None = None,
    rows: Sequence[int] = plan_tuning.ROWS,
    rank: int = plan_tuning.RANK,
    kinds: Sequence[str] = plan_tuning.KINDS,
    dropout: Sequence[float] = plan_tuning.DROPOUT,
    out: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> dict[str, Any]:
    """Measures the plans and writes the fastest to a file that later runs read.

    Args:
        model: preset whose linears are measured, ``shape:NAME``. rows: input rows; each count covers its power of two.
        rank: adapter rank. kinds: among dense, nf4, int8. dropout: probabilities; plans differ only between zero and nonzero.
        out: default: the file in the cache that every run reads. progress: called with (cases done, all cases, next case).
    Returns: ``{"file", "plans", "kept", "notes", "machine", "versions", "date"}``; a plan has its lookup key, the choice,
        the choice by rule, and milliseconds per candidate.
    Raises: RecipeError (invalid arguments, a file that cannot be written), ResourceError (memory), VerificationError (a
        plan does not match the formula).
    """
    prepare_libraries(measured_plans=False)  # this function replaces a damaged plans file
    return plan_tuning.tune(
        model=model,
        rows=rows,
        rank=rank,
        kinds=kinds,
        dropout=dropout,
        out=None if out is None else Path(out),
        progress=progress,
    )
