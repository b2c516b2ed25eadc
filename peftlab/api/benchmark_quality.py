"""``benchmark_quality``: the adapter methods trained on the recipe, equally long and with equal seeds, and scored."""

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

    All have the recipe's steps, batches and held-out rows, and are scored at the end. Alpha stays the recipe's. A learning rate
    that is right for one method is wrong for another: with the first seed each tries all of ``learning_rates``, and goes on
    to the other seeds with the best. That choice looks at the held-out rows, of all methods alike.

    Args: methods: default all of ``specs.methods.VARIANTS``. ranks: default the recipe's. learning_rates: default a tenth of the
        recipe's, which full fine-tuning often needs, and the recipe's. out: default runs/quality-NAME. plan: train nothing.
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
