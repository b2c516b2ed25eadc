"""``extract_adapter``: a LoRA adapter from two checkpoints of one model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftlab.assembly.process import located, prepare_libraries
from peftlab.assembly.target import RecipeSource
from peftlab.measuring.memory import frozen_heap
from peftlab.recipe import load_recipe
from peftlab.reworking.extracting import extract_from
from peftlab.training.progress import Progress, make_progress


def extract_adapter(
    base: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    rank: int,
    save_rest: bool = False,
    recipe: RecipeSource | None = None,
    overrides: Sequence[str] = (),
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes a plain LoRA adapter on ``base`` that approximates ``finetuned``: per linear layer the largest singular values of
    the difference of the weights. Weights are read one layer at a time.

    Args:
        base, finetuned: model names, as in ``model.name``; ``finetuned`` may be a run that trained all weights.
        folder: to write; with a recipe, `eval`, `predict` and `merge` take it.
        rank: of each layer; less where the difference has less.
        save_rest: store the other parameters that differ (biases, norms, embeddings, a head) in full; without it they are lost.
        recipe: names the task and the held-out rows on which the adapter is compared with ``finetuned``; default: no
            comparison of outputs, only of weights.
        tolerance: largest mean KL in nats; default 0.02. Only with ``recipe``.

    Returns: the report, also in ``FOLDER/extract.json``: the error of each layer's update and of all, relative to its Frobenius
        norm; ``rest``, the other parameters that differ; with a recipe the agreement and the metrics of both models.
    Raises: ArtifactError for checkpoints of different models; VerificationError beyond the tolerance, with nothing written.
    """
    prepare_libraries()
    loaded = None if recipe is None else load_recipe(recipe, [f"model.name={base}", "model.adapter=", *overrides])
    with located(loaded), frozen_heap(), progress or make_progress() as progress:
        for line in loaded.notes if loaded is not None else ():
            progress.note(line)
        return extract_from(
            str(base),
            str(finetuned),
            Path(folder),
            rank=rank,
            save_rest=save_rest,
            loaded=loaded,
            tolerance=tolerance,
            progress=progress,
        )
