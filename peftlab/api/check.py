"""``check``: shows what a recipe would train; needs the tokenizer and the data only."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import numpy as np

from peftlab.assembly import Assembly
from peftlab.assembly.account import findings, previews, shared_rows
from peftlab.assembly.checks import check_room_to_answer, check_settings
from peftlab.assembly.estimate import estimate_seconds
from peftlab.assembly.model_findings import model_findings
from peftlab.assembly.plan import make_plan, plan_notes
from peftlab.assembly.process import located, prepare_libraries
from peftlab.data import Ledger, packing_figures
from peftlab.experiments.distill_checks import describe_distillation
from peftlab.experiments.unlabelled import find_unlabelled
from peftlab.runs import open_source
from peftlab.tasks import Contrasts
from peftlab.training.progress import Progress, make_progress


def check(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    show: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Returns the loss ledger of a recipe. Trains nothing, loads no weights, writes nothing.

    Args:
        recipe: path, shipped name, dict, or a run folder (its recipe.lock.yaml is used).
        overrides: ``section.key=value``.
        show: number of training rows to preview.
        progress: where progress goes; default: stderr.

    Returns: plain values. ``ok``: whether ``data.allow`` covers all errors. ``train``, ``held_out``: rows, tokens,
        roles, special tokens, answers, lengths, labels, and the dropped rows with reason and place. ``shared``: rows
        in both. ``distill``: teachers, their caches and the student; None without the section. ``unlabelled``: lines on
        the rows of a self-training.
        ``findings``: errors and notes with their rows. ``estimate``: steps, tokens and seconds.
        ``preview``: text segments with role and whether they are trained.
    Raises: RecipeError, DataError if the data cannot be read or rendered as text.
    """
    prepare_libraries(measured_plans=False)
    progress = progress or make_progress()
    loaded, _ = open_source(recipe, overrides)
    with located(loaded), progress:
        for line in loaded.notes:
            progress.note(line)
        assembly = Assembly(loaded, transfer=True)
        settings = assembly.recipe
        check_settings(assembly)
        progress.stage("reading data")
        data = assembly.data
        progress.stage(f"loading {assembly.spec.reader} of {settings.model.name}")
        task, limit = assembly.task, assembly.limit
        _ = assembly.metrics
        if settings.eval.prompts:
            check_room_to_answer(settings.eval.max_new_tokens, assembly, key="eval.max_new_tokens")
        skeleton = assembly.skeleton()
        of_model = model_findings(assembly)
        distillation = None
        if settings.distill is not None:
            distillation, skeleton = describe_distillation(assembly)
        progress.stage(f"encoding {len(data.train) + len(data.eval):,} rows")
        encode = functools.partial(task.encode, max_length=limit, too_long=settings.data.too_long, keep=False)
        labelled = data.has_labels
        train = encode(data.train, training=True, labelled=labelled).ledger
        held_out = encode(data.eval, training=False).ledger
        progress.stage("estimating steps and time")
        notes = findings(
            train,
            held_out,
            allow=settings.data.allow,
            unread=assembly.unread_columns,
            of_model=of_model,
            num_embeddings=assembly.num_embeddings,
        )
        estimate = estimate_training(assembly, skeleton, train)
        for key, message in [] if estimate is None else plan_notes(settings, estimate["steps"]):
            note = {"kind": "no_effect", "level": "note", "data": "train", "message": f"{key}: {message}"}
            notes.append({**note, "key": key, "where": []})
        ok = not any(f["level"] == "error" for f in notes)
        in_rounds = ok and settings.train.self_training is not None
        return {
            "ok": ok,
            "recipe": loaded.name,
            "task": settings.task,
            "model": settings.model.name,
            "style": train.style,
            "format": None if train.formatter is None else train.formatter.title,
            "findings": notes,
            "split": settings.data.eval is None,
            "train": train.report(),
            "held_out": held_out.report(),
            "shared": shared_rows(train, held_out),
            "distill": distillation,
            "unlabelled": list(find_unlabelled(assembly).lines()) if in_rounds else [],
            "estimate": estimate,
            "preview": [asdict(p) for p in previews(task, train, show)],
        }


def estimate_training(
    assembly: Assembly, skeleton: Any, train: Ledger, *, flops_per_s: float | None = None
) -> dict[str, Any] | None:
    """Steps, tokens and time; None if no rows remain, rows are refused, or the student will write the rows.

    Args: flops_per_s: as for ``estimate_seconds``.
    """
    recipe, lengths, limit = assembly.recipe, train.lengths, assembly.limit
    writes = recipe.distill is not None and recipe.distill.answers == "teacher" and recipe.spec.generates
    if writes or (recipe.distill is not None and recipe.distill.on_policy is not None):
        return None
    if not len(lengths) or any(reason.startswith("refused") for reason in train.left_out):
        return None
    plan = make_plan(assembly, lengths, packing=limit if recipe.data.packing else None)
    seen = plan.times_seen()
    rows, tokens, trained = int(seen.sum()), int(seen @ lengths), int(seen @ train.trained)
    scored = rows if train.per_row else trained  # positions with computed logits
    contrasts = assembly.spec.contrasts and recipe.distill is None and cast(Contrasts, assembly.task).whole_step
    return {
        "steps": plan.total_steps,
        "epochs": rows / len(lengths),
        "rows": rows,
        "tokens": tokens,
        "trained_tokens": None if train.per_row else trained,
        "packing": packing_figures(lengths, limit) if recipe.data.packing else None,
        **estimate_seconds(
            assembly,
            skeleton,
            steps=plan.total_steps,
            tokens=tokens,
            squares=float(seen @ lengths.astype(np.float64) ** 2),
            scored=scored,
            reads_twice=contrasts and len(plan.step(0).micro_batches) > 1,
            flops_per_s=flops_per_s,
        ),
    }
