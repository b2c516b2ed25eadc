"""``check``: what a recipe would train, from tokenizer and data alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from peftlab.adapters import check_targets
from peftlab.api import build
from peftlab.api.check_distill import check_distillation
from peftlab.api.estimate import estimate_seconds
from peftlab.api.findings import findings, previews, shared_rows
from peftlab.api.parts import check_settings, make_plan, metrics_of
from peftlab.api.run import LOCK_NAME, open_run
from peftlab.data import Ledger, packing_figures
from peftlab.models import load_skeleton
from peftlab.recipe import Recipe, load_recipe
from peftlab.training.progress import Progress, make_progress


def check(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    show: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The loss ledger of a recipe: nothing is trained, no weights are loaded, nothing is written.

    Args:
        recipe: path, shipped name, dict, or a run folder (its recipe.lock.yaml is used).
        overrides: ``section.key=value``.
        show: number of training rows to preview.
        progress: where progress goes; default: stderr.

    Returns: plain values. ``ok``: no error that ``data.allow`` does not name. ``train``, ``held_out``: rows, tokens,
        roles, special tokens, answers, lengths, labels, and the rows left out with reason and place. ``shared``: rows
        in both. ``distill``: teachers, their caches and the student, where the recipe has them; else None.
        ``findings``: errors and notes with the rows concerned. ``estimate``: steps, tokens and seconds.
        ``preview``: segments of text with role and whether they are trained.
    Raises: RecipeError, DataError where the data cannot be read or turned into text at all.
    """
    build.prepare_libraries(measured_plans=False)
    progress = progress or make_progress()
    if not isinstance(recipe, Mapping) and Path(recipe).is_dir():
        recipe = open_run(recipe).folder / LOCK_NAME
    loaded = load_recipe(recipe, overrides)
    with build.located(loaded), progress:
        settings = loaded.recipe
        check_settings(settings)
        progress.stage("reading data")
        data = build.load_data(settings, transfer=True)
        progress.stage(f"loading {settings.spec.reader} of {settings.model.name}")
        pretrained = build.pretrained_of(settings)
        tokenizer = build.tokenizer_of(settings, pretrained)
        task = build.build_task(settings, tokenizer, data.labelled)
        metrics_of(settings, task)
        skeleton = load_skeleton(pretrained, auto_class=task.spec.auto_class, **task.model_kwargs())
        if settings.adapter.method != "none":
            check_targets(skeleton, settings.adapter.targets)
        limit = build.limit_of(settings, pretrained, tokenizer)
        distillation, skeleton = check_distillation(settings, task, skeleton, data, limit)
        progress.stage(f"encoding {len(data.train) + len(data.eval):,} rows")
        options = {"max_length": limit, "too_long": settings.data.too_long, "keep": False}
        labelled = data.train is data.labelled
        train = task.encode(data.train, training=True, labelled=labelled, **options).ledger
        held_out = task.encode(data.eval, training=False, **options).ledger
        progress.stage("estimating steps and time")
        found = findings(train, held_out, allow=settings.data.allow)
        return {
            "ok": not any(f["level"] == "error" for f in found),
            "recipe": loaded.name,
            "task": settings.task,
            "model": settings.model.name,
            "style": train.style,
            "findings": found,
            "split": settings.data.eval is None,
            "train": train.report(),
            "held_out": held_out.report(),
            "shared": shared_rows(train, held_out),
            "distill": distillation,
            "estimate": _estimate(settings, skeleton, train, limit),
            "preview": [asdict(p) for p in previews(task, train, show)],
        }


def _estimate(recipe: Recipe, skeleton: Any, train: Ledger, limit: int) -> dict[str, Any] | None:
    """Steps, tokens and time; None where no row is left to train on, rows are refused, or the student will write them."""
    lengths = train.lengths
    if recipe.distill is not None and recipe.distill.on_policy is not None:
        return None
    if not len(lengths) or any(reason.startswith("refused") for reason in train.left_out):
        return None
    device = build.pick_device(recipe.run.device)
    plan = make_plan(recipe, lengths, device, packing=limit if recipe.data.packing else None)
    seen = plan.times_seen()
    rows, tokens, trained = int(seen.sum()), int(seen @ lengths), int(seen @ train.trained)
    scored = rows if train.per_row else trained  # positions whose logits are computed
    return {
        "steps": plan.total_steps,
        "epochs": rows / len(lengths),
        "rows": rows,
        "tokens": tokens,
        "trained_tokens": None if train.per_row else trained,
        "packing": packing_figures(lengths, limit) if recipe.data.packing else None,
        **estimate_seconds(
            recipe,
            skeleton,
            steps=plan.total_steps,
            tokens=tokens,
            squares=float(seen @ lengths.astype(np.float64) ** 2),
            scored=scored,
            device=device,
        ),
    }
