"""``benchmark``: measures speed and memory of a recipe's training over adapters, weights and kernels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.assembly import Assembly
from peftlab.assembly.process import located, prepare_libraries
from peftlab.bench.runner import Tell
from peftlab.bench.speed_run import run_benchmark
from peftlab.recipe import load_recipe
from peftlab.specs.protocol import NEW_TOKENS, REPEATS


def benchmark(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    quantize: Sequence[str] | None = None,
    kernels: Sequence[str] | None = None,
    batch: Sequence[int] | None = None,
    length: Sequence[int] | None = None,
    adapters: Sequence[int] | None = None,
    what: Sequence[str] | None = None,
    repeats: int = REPEATS,
    steps: int | None = None,
    new_tokens: int = NEW_TOKENS,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    replace: bool = False,
    plan: bool = False,
    progress: Tell = lambda done, total, text: None,
) -> dict[str, Any]:
    """Measures every cell of a sweep in separate processes, and writes bench.json, bench.csv and a picture.

    Args:
        recipe, overrides: as for ``train``. methods: names in ``specs.methods.VARIANTS``. ranks: adapter ranks. quantize:
            names in ``specs.storages``. kernels: names in ``specs.kernels``; auto is fused, reference is PEFT's path. batch:
            rows per step. length: tokens per row. adapters: number of adapters in one batch. what: train, generate. None
            means the recipe's value; for quantize none and nf4, for kernels both.
        repeats: processes per cell. steps: measured steps per process, after the warm-up. new_tokens: per generated answer.
        out: the folder; default runs/bench-NAME. resume: measure only the missing cells. replace: overwrite the folder.
        plan: list the cells and measure nothing. progress: called with (jobs done, all jobs, next job).

    Returns: the contents of bench.json, ``header``, ``ceilings`` and ``cells`` (see ``bench.summary``), with ``folder``.
    Raises: RecipeError, DataError, ArtifactError (resume of another benchmark), Interrupted. Cells that fail their check, do
        not fit in memory or are impossible become rows with that status, not errors.
    """
    prepare_libraries()
    loaded = load_recipe(recipe, overrides)
    choices = {"what": what, "methods": methods, "ranks": ranks, "quantize": quantize, "kernels": kernels}
    choices |= {"batch": batch, "length": length, "adapters": adapters}
    protocol = {"repeats": repeats, "steps": steps, "new_tokens": new_tokens}
    with located(loaded):
        return run_benchmark(
            Assembly(loaded),
            overrides,
            choices,
            protocol,
            folder=Path(out) if out is not None else Path("runs") / f"bench-{loaded.name}",
            resume=resume,
            replace=replace,
            plan=plan,
            progress=progress,
        )
