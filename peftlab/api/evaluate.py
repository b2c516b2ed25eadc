"""``evaluate``: computes the metrics of a run, a merged model or a base model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftlab.assembly.process import located, prepare_libraries
from peftlab.assembly.target import RecipeSource, find_target, open_target
from peftlab.assembly.witness import check_witness
from peftlab.errors import RecipeError
from peftlab.evaluation.loop import answer_signatures, evaluate_examples
from peftlab.evaluation.metrics import check_metrics, default_metrics
from peftlab.evaluation.picture import draw_confusion
from peftlab.measuring.drawing import check_picture
from peftlab.training.progress import Progress, make_progress


def evaluate(
    target: str | os.PathLike[str],
    *,
    recipe: RecipeSource | None = None,
    overrides: Sequence[str] = (),
    picture: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Computes the metrics of a target on the held-out rows of its recipe.

    Args:
        target: a run folder, its merged/ folder, an adapter folder, or a base model (which needs ``recipe``).
        overrides: ``section.key=value``, such as ``data.eval=other.csv``.
        picture: a .png or .svg file to write: the confusion matrix of a task with one class per row.

    Returns: ``{"target", "kind", "rows", "metrics": {flat name: value}}``.
    Raises: RecipeError, DataError, ArtifactError, ResourceError; VerificationError if a run's files do not give the outputs of
        the model that was trained.
    """
    prepare_libraries()
    progress = progress or make_progress()
    resolved = find_target(target, recipe, overrides)
    with located(resolved.loaded), progress:
        for line in resolved.loaded.notes:
            progress.note(line)
        settings = resolved.loaded.recipe
        if not settings.spec.learns_from_labels:
            raise RecipeError(
                "this task has no labels to score vectors with; `peftlab distill` compares a student's vectors with its teacher's",
                key="task",
            )
        if settings.eval.metrics is not None:
            check_metrics(settings.eval.metrics, settings.spec, bool(settings.eval.choices))
        if picture is not None:
            check_picture(Path(picture))
            check_metrics(["confusion"], settings.spec, bool(settings.eval.choices))
        progress.stage("reading data")
        assembly = resolved.assembly(reads_data=True)
        held_out = assembly.held_out  # before the model, which takes longer
        opened = open_target(resolved, progress, assembly=assembly)
        if not any(text.startswith("model.") for text in overrides):
            check_witness(opened, progress)
        count = held_out.num_rows
        progress.stage(f"evaluating on {count:,} row{'' if count == 1 else 's'}")
        # eval.best chooses among checkpoints, so rows need not allow it here.
        names = settings.eval.metrics or default_metrics(settings.spec, bool(settings.eval.choices))
        if picture is not None:
            names = list(dict.fromkeys([*names, "confusion"]))
        metrics = evaluate_examples(
            opened.model,
            opened.task,
            held_out,
            metrics=names,
            batch_tokens=settings.eval.batch_tokens,
            device=opened.device,
            autocast=opened.autocast,
        )
        if picture is not None:
            draw_confusion(metrics, opened.task.class_names or [], Path(picture))
        result = {"target": str(target), "kind": resolved.kind, "rows": count, "metrics": metrics}
        signatures = answer_signatures(names)
        result |= {"signatures": signatures} if signatures else {}
        return result | ({} if picture is None else {"picture": str(picture)})
