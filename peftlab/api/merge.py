"""``merge``: folds an adapter into its base model and verifies the written files (contract C6)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftlab.assembly.merging import merge_run
from peftlab.assembly.process import located, prepare_libraries
from peftlab.assembly.target import RecipeSource, find_target
from peftlab.errors import RecipeError
from peftlab.measuring.memory import frozen_heap
from peftlab.training.progress import Progress, make_progress


def merge(
    target: str | os.PathLike[str],
    *,
    recipe: RecipeSource | None = None,
    overrides: Sequence[str] = (),
    base: str | None = None,
    output: str | os.PathLike[str] | None = None,
    dtype: str = "auto",
    max_kl: float | None = None,
    min_top1: float | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Merges a run's adapter, writes a plain transformers folder, and compares the written files with the model that was
    trained, by its witness; or with base + adapter, for an adapter that has no witness of its training.

    Args:
        target: a run folder or its adapter folder, or a folder with an adapter of PEFT, which needs ``recipe``.
        recipe: the recipe that names base model, task and data; default: that of the run.
        overrides: ``section.key=value``.
        base: ``original`` (published weights) or ``dequantized`` (the quantized weights the adapter was trained on,
            written out); default: dequantized for a quantized run. The report has the errors of both.
        output: folder to write; default ``RUN/merged``.
        dtype: dtype of the written weights; auto: that of the original weights.
        max_kl, min_top1: thresholds on mean KL in nats and on top-1 agreement; override the defaults.
        replace: overwrite ``output``.

    Returns: the report, also written to ``RUN/merge.json``. ``of_training`` says what the outputs were compared with, ``layers``
        how many layers were compared by formula and by outputs.
    Raises: VerificationError if the merged model exceeds a threshold or a layer is wrong; ``output`` is then not written.
    """
    prepare_libraries()
    resolved = find_target(target, recipe, overrides)
    if resolved.adapter is None:
        full = (
            f": {resolved.loaded.recipe.model.name} is its trained model"
            if resolved.kind == "run"
            else "; name a run folder"
        )
        raise RecipeError(f"{target} has no adapter to merge{full}")
    with located(resolved.loaded), frozen_heap(), progress or make_progress() as progress:
        for line in resolved.loaded.notes:
            progress.note(line)
        return merge_run(
            Path(target),
            base=base,
            output=Path(output) if output else None,
            dtype=dtype,
            limits={k: v for k, v in (("kl_mean", max_kl), ("top1", min_top1)) if v is not None},
            replace=replace,
            progress=progress,
            target=resolved,
        )
