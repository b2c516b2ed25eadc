"""``tune_kernels``: which plan of an adapted linear is fastest on this machine."""

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
    """Measures the plans and writes the faster ones to a file that later runs read.

    Args:
        model: preset whose linears are measured, ``shape:NAME``. rows: of the input, each standing for its power of two.
        rank: of the adapter. kinds: of dense, nf4, int8. dropout: probabilities; plans only tell zero from the rest.
        out: default is the file that every run reads, in the cache. progress: told (cases done, all cases, the next).
    Returns: ``{"file", "plans", "kept", "notes", "machine", "versions", "date"}``; a plan has the key that it is chosen by,
        what was chosen and what the rule says, and milliseconds per candidate.
    Raises: RecipeError (wrong arguments, a file that cannot be written), ResourceError (memory), VerificationError (a
        plan computes something else than the formula).
    """
    prepare_libraries(measured_plans=False)  # a damaged file of them is replaced here
    return plan_tuning.tune(
        model=model,
        rows=rows,
        rank=rank,
        kinds=kinds,
        dropout=dropout,
        out=None if out is None else Path(out),
        progress=progress,
    )
