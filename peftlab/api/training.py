"""``train``: one recipe in, a run folder with a verified result out."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from peftlab.adapters import load_trained, save_trained
from peftlab.api import build
from peftlab.api.merging import merge_run
from peftlab.api.parts import (
    Parts,
    check_room,
    check_settings,
    loop_settings,
    padded_instead,
    prepare,
    run_accelerator,
)
from peftlab.api.run import LOCK_NAME, RUN_NAME, Run, check_run_folder, free_run_folder, open_run, write_json
from peftlab.data import Rows, packing_figures
from peftlab.errors import Interrupted, RecipeError
from peftlab.evaluation.loop import evaluate_examples
from peftlab.models import save_plain
from peftlab.ops import plans_in_use
from peftlab.recipe import LoadedRecipe, check_same_settings, load_recipe, local_files, write_lock
from peftlab.training.checkpoint import list_checkpoints
from peftlab.training.distilling import DistillLoss
from peftlab.training.loop import LoopResult, TrainingLoop
from peftlab.training.memory import frozen_heap, release_memory
from peftlab.training.metrics_log import MetricsLog
from peftlab.training.packing_check import check_packing
from peftlab.training.parity import check_parity
from peftlab.training.progress import Progress, make_progress

# Tokens that the gradients at step 0 are compared on: their logits exist together.
_FEW_TOKENS = 512


def train(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Trains what the recipe describes and returns the run.

    Args:
        recipe: path, shipped name, dict, or a run folder (its recipe.lock.yaml is used).
        overrides: ``section.key=value``.
        resume: continue the run in the run folder from its newest checkpoint.
        replace: an earlier run in the run folder is removed once this one is ready to start.
        progress: where progress goes; default: a live bar or plain lines on stderr.

    Returns: the ``Run``; its ``summary`` has metrics before and after, speed, memory, samples and the merge report.
    Raises: RecipeError, DataError, ResourceError, ArtifactError, VerificationError, Interrupted.
    """
    build.prepare_libraries()
    progress = progress or make_progress()
    loaded, folder = open_source(recipe, overrides, resume)
    with build.located(loaded), frozen_heap(), contextlib.ExitStack() as stack:
        stack.callback(progress.stop)
        if loaded.recipe.distill is not None:
            raise RecipeError("this recipe names a teacher; run: peftlab distill, or remove the section", key="distill")
        folder = folder or choose_folder(loaded, resume=resume, replace=replace)
        checkpoint = _newest_checkpoint(folder) if resume else None
        if resume:
            check_same_settings(loaded, open_run(folder).recipe())
        if not loaded.recipe.spec.learns_from_labels:
            raise RecipeError(
                "sentence embeddings are learned from a teacher's vectors: name it in a section distill and run `peftlab "
                "distill`",
                key="task",
            )
        check_settings(loaded.recipe)
        accelerator = stack.enter_context(run_accelerator(loaded.recipe, folder))
        parts = prepare(loaded, accelerator, progress)
        return execute(parts, accelerator, folder, checkpoint, progress, replace=replace)


def open_source(
    recipe: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str], resume: bool
) -> tuple[LoadedRecipe, Path | None]:
    """The recipe, and the run folder when the recipe was given as one that is to be resumed."""
    if isinstance(recipe, Mapping):
        return load_recipe(recipe, overrides), None
    path = Path(recipe)
    if path.is_dir():
        path = open_run(path).folder / LOCK_NAME
    loaded = load_recipe(path, overrides)
    return loaded, path.parent if resume and path.name == LOCK_NAME else None


def choose_folder(loaded: LoadedRecipe, *, resume: bool, replace: bool) -> Path:
    wanted = loaded.recipe.run.dir
    if resume:
        folder = Path(wanted) if wanted else Path("runs") / loaded.name
        if not (folder / LOCK_NAME).is_file():
            verb = "train" if loaded.recipe.distill is None else "distill"
            raise RecipeError(
                f"there is no run in {folder} to resume; name the run folder: peftlab {verb} RUN --resume"
            )
        return folder
    if wanted is None:
        folder = Path("runs") / loaded.name
        if not (replace and folder.exists()):
            return free_run_folder(loaded.name)
    else:
        folder = Path(wanted)
    check_run_folder(folder, replace=replace)
    if replace:
        _check_unneeded(loaded, folder)
    return folder


def _check_unneeded(loaded: LoadedRecipe, folder: Path) -> None:
    """Raises RecipeError where a run folder that would be removed holds what the recipe reads, such as its teacher."""
    for key, path in local_files(loaded).items():
        if path.resolve().is_relative_to(folder.resolve()):
            raise RecipeError(
                f"{os.path.relpath(path)} lies in the run folder {folder}, which --replace removes; choose another run.dir, or "
                "move it",
                key=key,
            )


def _newest_checkpoint(folder: Path) -> Path:
    found = list_checkpoints(folder / "checkpoints")
    if not found:
        status = open_run(folder).summary.get("status", "unknown")
        why = "it is finished" if status == "finished" else "it has no checkpoint"
        raise RecipeError(f"the run in {folder} cannot be resumed: {why}")
    return found[-1]


def execute(
    parts: Parts,
    accelerator: Any,
    folder: Path,
    checkpoint: Path | None,
    progress: Progress,
    *,
    replace: bool,
    resume_hint: str = "",
) -> Run:
    """Trains and scores what ``prepare`` made. Args: resume_hint: the command that continues it; default ``peftlab train``."""
    with input_casts(parts.model, precision=parts.precision, method=parts.recipe.adapter.method):
        if parts.plan.packed:
            _check_packing(parts, accelerator, progress)
        _gate(parts, accelerator, progress)
        _before(parts, accelerator, open_run(folder).summary if checkpoint else {}, progress)
        check_room(parts, folder)
        with _folder(parts, folder, replace=replace and checkpoint is None, resumed=checkpoint is not None) as log:
            resume_hint = resume_hint or f"peftlab train {folder} --resume"
            finished = _train_and_score(parts, accelerator, folder, checkpoint, log, progress, resume_hint)
    accelerator.free_memory()
    if finished:
        _finish(parts, folder, progress)
    return open_run(folder)


def _check_packing(parts: Parts, accelerator: Any, progress: Progress) -> None:
    """The leak test; a model that mixes packed rows gets a padded plan. Its result goes into the run's summary."""
    progress.stage("checking that packed rows stay apart")
    problem = check_packing(
        parts.model, parts.task, parts.train.examples, device=accelerator.device, autocast=accelerator.autocast
    )
    release_memory()
    if problem is not None:
        parts.plan = padded_instead(parts)
        parts.summary["packing"] = {"off": problem}
        progress.note(f"packing is off: {problem}; rows are padded instead")
        return
    figures = packing_figures(parts.train.lengths, parts.limit)
    parts.summary["packing"] = {"off": None, **figures}
    progress.note(
        f"packing: {len(parts.train.examples):,} rows in {figures['packs']:,} sequences of up to {parts.limit:,} tokens, "
        f"{100 * figures['empty']:.1f} % of the room stays empty"
    )


def _gate(parts: Parts, accelerator: Any, progress: Progress) -> None:
    """The parity gate on the first micro-batch; its result goes into the run's summary."""
    progress.stage("comparing the training path with the reference path")
    found = check_parity(
        parts.model,
        parts.task,
        [parts.train.examples[i] for i in parts.plan.step(parts.plan.first_step).micro_batches[0]],
        planned=parts.planned,
        kernels=parts.recipe.run.kernels,
        device=accelerator.device,
        where=parts.data.train.where,
        autocast=accelerator.autocast,
        packed=parts.plan.packed,
        loss_sum=parts.loss,
        reference_loss_sum=parts.loss and parts.loss.reference,
    )
    parts.summary["parity"] = asdict(found)
    release_memory()
    progress.note(str(found))
    if parts.loss is not None:
        _tell_gradients(parts, parts.loss, accelerator, progress)


def _tell_gradients(parts: Parts, loss: DistillLoss, accelerator: Any, progress: Progress) -> None:
    """What temperature, weight and stored classes do to the teacher's gradient, before it is followed for hours."""
    rows = [parts.train.examples[i] for i in parts.plan.step(0).micro_batches[0]]
    few = [row for row, tokens in zip(rows, np.cumsum([len(r) for r in rows]), strict=True) if tokens <= _FEW_TOKENS]
    batch = parts.task.collate(few or rows[:1], accelerator.device)
    parts.model.eval()
    with accelerator.autocast():
        found = loss.gradients(parts.model, batch)
    if found is not None:
        parts.summary["gradients"] = asdict(found)
        progress.note(str(found))
        for warning in found.warnings:
            progress.warn(warning)


def _before(parts: Parts, accelerator: Any, earlier: dict[str, Any], progress: Progress) -> None:
    """Metrics and answers of the untouched model; a resumed run has them already."""
    summary = parts.summary
    summary["before"], summary["samples"] = earlier.get("before"), earlier.get("samples", [])
    if parts.recipe.eval.before and summary["before"] is None:
        progress.stage(f"evaluating the untouched model on {len(parts.eval.examples):,} held-out rows")
        summary["before"] = _evaluator(parts, accelerator)()
        summary["samples"] = [{"prompt": p, "before": a} for p, a in _answers(parts)]
        release_memory()


def _train_and_score(
    parts: Parts,
    accelerator: Any,
    folder: Path,
    checkpoint: Path | None,
    log: MetricsLog,
    progress: Progress,
    resume_hint: str,
) -> bool:
    """Whether that was the end of the run; after a phase before the last one a checkpoint is there and nothing else."""
    summary, evaluate = parts.summary, _evaluator(parts, accelerator)
    accelerator.init_trackers("peftlab", config={"recipe": parts.loaded.name})
    loop = _loop(parts, accelerator, folder, log, progress, evaluate, resume_hint)
    if checkpoint:
        progress.note(f"continuing after step {loop.resume(checkpoint)}")
    if parts.phase is not None and parts.phase.before is not None:
        parts.phase.before(parts)
    progress.stage(f"training for {parts.plan.end_step - parts.plan.first_step:,} steps")
    result = loop.run()
    if result.steps < parts.plan.total_steps and not result.stopped_early:
        summary["training"] = _figures(result)
        return False
    _save_result(parts, folder)  # now: whatever fails from here on, the training is kept
    progress.stage("evaluating the trained model")
    final = evaluate()
    loop.finish(final)
    _keep_best(parts, folder, result, progress)
    summary["after"] = final if result.best_step in (None, result.steps) else evaluate()
    answers = list(_answers(parts))
    if not summary["samples"]:
        summary["samples"] = [{"prompt": p} for p, _ in answers]
    for sample, (_, answer) in zip(summary["samples"], answers, strict=True):
        sample["after"] = answer
    summary["training"] = _figures(result)
    log.write({"step": result.steps, "eval": summary["after"], "final": True})
    return True


def _evaluator(parts: Parts, accelerator: Any) -> Callable[[], dict[str, float]]:
    def evaluate() -> dict[str, float]:
        return evaluate_examples(
            parts.model,
            parts.task,
            parts.eval,
            metrics=parts.metrics,
            batch_tokens=parts.recipe.eval.batch_tokens,
            device=accelerator.device,
            autocast=accelerator.autocast,
        )

    return evaluate


def input_casts(model: Any, *, precision: str, method: str) -> contextlib.AbstractContextManager[Any]:
    """Under autocast PEFT's cast of every adapter input to float32 is undone by the next matmul: leave it out."""
    from peft.helpers import disable_input_dtype_casting

    if precision == "no" or method == "none":
        return contextlib.nullcontext()
    return disable_input_dtype_casting(model)


def _answers(parts: Parts) -> Iterator[tuple[str, str]]:
    """The model's own answers to eval.prompts."""
    prompts, options = parts.recipe.eval.prompts, parts.recipe.eval
    if not prompts:
        return
    parts.model.eval()
    answers = parts.task.generate(  # type: ignore[attr-defined]  # the schema allows prompts for causal_lm only
        parts.model,
        Rows.from_dicts([parts.task.row_from_text(p) for p in prompts], name="eval.prompts"),
        batch_tokens=options.batch_tokens,
        max_length=parts.limit,
        max_new_tokens=options.max_new_tokens,
    )
    yield from zip(prompts, (a["text"] for a in answers), strict=True)


@contextlib.contextmanager
def _folder(parts: Parts, folder: Path, *, replace: bool, resumed: bool) -> Iterator[MetricsLog]:
    """The run folder with its lock file and status; one that ends without a checkpoint is removed again."""
    if replace and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    resume_step = None
    if resumed:
        resume_step = int(list_checkpoints(folder / "checkpoints")[-1].name.removeprefix("step-"))
    try:
        if not resumed:
            write_lock(
                folder / LOCK_NAME, parts.loaded, fingerprints=parts.fingerprints, environment=_environment(parts)
            )
        _write_status(parts, folder, "running", started)
        yield MetricsLog(folder / "metrics.jsonl", resume_step=resume_step)
        _write_status(parts, folder, "trained" if "after" in parts.summary else "running", started)
    except BaseException as error:
        if list_checkpoints(folder / "checkpoints") or any((folder / name).is_dir() for name in ("adapter", "model")):
            status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
            with contextlib.suppress(OSError):
                _write_status(parts, folder, status, started)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _environment(parts: Parts) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if parts.device == "cuda" else "cpu"
    environment: dict[str, Any] = {"device": name, "precision": parts.precision, "threads": torch.get_num_threads()}
    environment["kernel_plans"] = plans_in_use()
    if parts.task.class_names and parts.recipe.spec.classifies:
        environment["class_names"] = parts.task.class_names
    return environment


def _write_status(parts: Parts, folder: Path, status: str, started: float) -> None:
    when = datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds")
    head = {"name": parts.loaded.name, "status": status, "task": parts.recipe.task, "started": when}
    write_json(folder / RUN_NAME, {**head, **parts.summary})


def _loop(
    parts: Parts,
    accelerator: Any,
    folder: Path,
    log: MetricsLog,
    progress: Progress,
    evaluate: Callable[[], Any],
    resume_hint: str,
) -> TrainingLoop:
    return TrainingLoop(
        model=parts.model,
        task=parts.task,
        train=parts.train.examples,
        plan=parts.plan,
        settings=loop_settings(parts.recipe),
        accelerator=accelerator,
        folder=folder,
        log=log,
        progress=progress,
        where=parts.data.train.where,
        loss_sum=parts.loss,
        evaluate=evaluate,
        resume_hint=resume_hint,
    )


def _keep_best(parts: Parts, folder: Path, result: LoopResult, progress: Progress) -> None:
    """Goes back to the best evaluated step when eval.best asks for it."""
    if result.best_step is not None and result.best_step != result.steps:
        progress.note(f"keeping step {result.best_step}: {parts.recipe.eval.best} {result.best_value:.4g} is the best")
        load_trained(parts.model, folder / "best")
        _save_result(parts, folder)
    shutil.rmtree(folder / "best", ignore_errors=True)


def _save_result(parts: Parts, folder: Path) -> None:
    """The adapter, or without one the model as a plain transformers folder."""
    if parts.recipe.adapter.method != "none":
        save_trained(parts.model, folder / "adapter")
        return
    save_plain(parts.model, parts.task.files, folder / "model", beside=folder / LOCK_NAME)


def _figures(result: LoopResult) -> dict[str, Any]:
    seconds = max(result.seconds, 1e-9)
    return {
        "steps": result.steps,
        "seconds": result.seconds,
        "rows": result.rows,
        "tokens": result.tokens,
        "trained_tokens": result.trained_tokens,
        "rows_per_s": result.rows / seconds,
        "tokens_per_s": result.tokens / seconds,
        "last_loss": result.last_loss,
        "peak_memory_bytes": result.peak_memory_bytes,
        "best_step": result.best_step,
        "stopped_early": result.stopped_early,
    }


def _finish(parts: Parts, folder: Path, progress: Progress) -> None:
    """Merges if the recipe asks for it, and writes the final status."""
    started = time.time()
    summary, merge = parts.summary, parts.recipe.run.merge
    if merge != "none":
        parts.model = None  # merging loads the base again: two copies would double the peak
        release_memory()
        try:
            summary["merge"] = merge_run(folder, target=merge, replace=True, progress=progress)
        except BaseException:
            _write_status(parts, folder, "trained", started)
            raise
    _write_status(parts, folder, "finished", started)
