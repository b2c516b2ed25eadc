"""Builds the batch plan and the training loop's settings from a recipe."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from peftlab.assembly.assembly import Assembly
from peftlab.data import BatchPlan
from peftlab.ranks import num_ranks
from peftlab.recipe import Recipe
from peftlab.specs.optimizers import OPTIMIZERS
from peftlab.specs.storages import STORAGES
from peftlab.training.loop import LoopSettings
from peftlab.training.schedules import learning_rate

# Twice as many rows per micro-batch are no faster on 2 cores and use 200 MB more for MiniLM (bench/README.md).
_MOST_TOKENS = {"cpu": 1024, "cuda": None}
DEFAULT_BATCH_SIZE = 8


def make_plan(
    assembly: Assembly,
    lengths: npt.NDArray[np.int64],
    *,
    packing: int | None = None,
    span: tuple[int, int] | None = None,
    device: str | None = None,
) -> BatchPlan:
    """Returns the batch plan for training rows of [N] ``lengths``, in packs of up to ``packing`` tokens or padded.

    Args: span: see ``BatchPlan``. device: ``cpu`` or ``cuda``; None: that of the run.
    """
    t, device = assembly.recipe.train, device or assembly.device
    return BatchPlan(
        lengths,
        batch_size=None if t.batch_tokens else (t.batch_size or DEFAULT_BATCH_SIZE),
        batch_tokens=t.batch_tokens,
        accumulate=t.accumulate,
        grouping=t.grouping,
        seed=assembly.recipe.run.seed,
        epochs=t.epochs,
        max_steps=t.max_steps,
        split_cost=STORAGES[assembly.storage].split_cost[device],
        most_tokens=_MOST_TOKENS[device],
        packing=packing,
        span=span,
    )


def padded_plan(assembly: Assembly, lengths: npt.NDArray[np.int64], span: tuple[int, int] | None = None) -> BatchPlan:
    """Returns the padded plan for a packing recipe whose model cannot pack, with equal tokens per step."""
    t = assembly.recipe.train
    if t.batch_tokens is None:
        rows = (t.batch_size or DEFAULT_BATCH_SIZE) * t.accumulate
        changes = {"train.batch_size": None, "train.batch_tokens": assembly.limit, "train.accumulate": rows}
        assembly = assembly.derive(changes)
    return make_plan(assembly, lengths, span=span)


def plan_notes(recipe: Recipe, total_steps: int) -> list[tuple[str, str]]:
    """``(key, message)`` for each setting that never takes effect, because the run has only ``total_steps`` steps."""
    t, e, run = recipe.train, recipe.eval, f"the run has {total_steps:,} step{'' if total_steps == 1 else 's'}"
    notes = []
    if t.warmup >= 1 and t.warmup >= total_steps:
        lr = learning_rate(total_steps - 1, total_steps=total_steps, peak=t.lr, schedule=t.schedule, warmup=t.warmup)
        message = f"a warm-up of {t.warmup:,.0f} steps, but {run}: the learning rate ends at {lr:.3g} and never reaches {t.lr:.3g}"
        notes.append(("train.warmup", message))
    if e.every is not None and e.every > total_steps:
        alone = f"; eval.best compares nothing but the last step ({e.best})" if e.best else ""
        notes.append(("eval.every", f"every {e.every:,} steps, but {run}: it is evaluated at its end only{alone}"))
    elif e.every is not None and e.patience is not None and (e.patience + 1) * e.every >= total_steps:
        message = f"{e.patience:,} evaluations every {e.every:,} steps, but {run}: it never stops early"
        notes.append(("eval.patience", message))
    if recipe.run.save_every is not None and recipe.run.save_every >= total_steps:
        message = (
            f"every {recipe.run.save_every:,} steps, but {run}: no checkpoint is saved, so a killed run starts over"
        )
        notes.append(("run.save_every", message))
    if t.accumulate < num_ranks():
        few = "1 micro-batch" if t.accumulate == 1 else f"{t.accumulate} micro-batches"
        message = (
            f"{few} per step for {num_ranks()} processes: some have nothing to do; set a multiple of {num_ranks()}"
        )
        notes.append(("train.accumulate", message))
    return notes


def loop_settings(assembly: Assembly) -> LoopSettings:
    t, e, r = assembly.recipe.train, assembly.recipe.eval, assembly.recipe.run
    return LoopSettings(
        lr=t.lr,
        optimizer=t.optimizer,
        optimizer_options={key: getattr(t, key) for key in OPTIMIZERS[t.optimizer].keys},
        loraplus_lr_ratio=t.loraplus_lr_ratio,
        schedule=t.schedule,
        warmup=t.warmup,
        max_grad_norm=t.max_grad_norm,
        eval_every=e.every,
        save_every=r.save_every,
        keep=r.keep,
        best=e.best,
        patience=e.patience,
    )
