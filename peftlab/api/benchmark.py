"""``benchmark``: how fast and how large a recipe's training is here, over adapters, weights and kernels."""

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
    """Measures every cell of a sweep in processes of its own, and writes bench.json, bench.csv and a picture.

    Args:
        recipe, overrides: as for ``train``. methods: of ``specs.methods.VARIANTS``. ranks: of the adapters. quantize: of
            ``specs.storages``. kernels: of ``specs.kernels``: auto is fused, reference PEFT's own. batch: rows of a step.
            length: tokens of a row. adapters: that the rows of a batch are spread over. what: train, generate. Each is the
            recipe's own value if None; quantize then none and nf4, kernels both.
        repeats: processes per cell. steps: measured in each, after the warm-up. new_tokens: of each generated answer.
        out: the folder; default runs/bench-NAME. resume: measure what its folder lacks. replace: begin it anew.
        plan: list the cells and measure nothing. progress: told (jobs done, all jobs, the next).

    Returns: the contents of bench.json, ``header``, ``ceilings`` and ``cells`` (see ``bench.summary``), with ``folder``.
    Raises: RecipeError, DataError, ArtifactError (another benchmark to resume), Interrupted. Cells that are red, too large
        or impossible are rows that say so, not errors.
    """
    prepare_libraries()
    loaded = load_recipe(recipe, overrides)
    asked = {"what": what, "methods": methods, "ranks": ranks, "quantize": quantize, "kernels": kernels}
    asked |= {"batch": batch, "length": length, "adapters": adapters}
    protocol = {"repeats": repeats, "steps": steps, "new_tokens": new_tokens}
    with located(loaded):
        return run_benchmark(
            Assembly(loaded),
            overrides,
            asked,
            protocol,
            folder=Path(out) if out is not None else Path("runs") / f"bench-{loaded.name}",
            resume=resume,
            replace=replace,
            plan=plan,
            progress=progress,
        )
