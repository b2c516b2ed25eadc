"""``benchmark_quality``: trains and scores the adapter methods on one recipe, with equal steps and seeds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.assembly import Assembly
from peftlab.assembly.process import located, prepare_libraries
from peftlab.bench.quality_run import QualityRequest, run_quality
from peftlab.bench.runner import Tell
from peftlab.recipe import load_recipe
from peftlab.specs.protocol import SEEDS


def benchmark_quality(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    seeds: int = SEEDS,
    learning_rates: Sequence[float] | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    replace: bool = False,
    plan: bool = False,
    progress: Tell = lambda done, total, text: None,
) -> dict[str, Any]:
    """Trains each method and rank with ``seeds`` seeds and writes quality.json, quality.csv and a picture.

    All methods use the recipe's steps, batches, alpha and held-out rows. Methods need different learning rates: with the
    first seed each method tries all of ``learning_rates`` and keeps its best for the other seeds. For every method that
    choice uses the held-out rows. Without ``learning_rates`` each method searches: it begins with the recipe's rate, a third
    and three times it, and goes on by factors of three while the best is the first or the last that it tried.

    Args: methods: default all of ``specs.methods.VARIANTS``. ranks: default the recipe's. learning_rates: default a
        search. out: default runs/quality-NAME. plan: train nothing.
        resume, replace, progress: as for ``benchmark``.
    Returns: the contents of quality.json, ``header`` and ``methods`` (see ``bench.quality``), with ``folder``.
    Raises: RecipeError, DataError, ArtifactError, Interrupted.
    """
    prepare_libraries()
    loaded = load_recipe(recipe, overrides)
    with located(loaded):
        return run_quality(
            Assembly(loaded),
            overrides,
            QualityRequest(methods, ranks, seeds, learning_rates),
            folder=Path(out) if out is not None else Path("runs") / f"quality-{loaded.name}",
            resume=resume,
            replace=replace,
            plan=plan,
            progress=progress,
        )
