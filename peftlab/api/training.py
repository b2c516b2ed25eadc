"""``train``: one recipe in, a run folder with a verified result out."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peftlab.adapters import add_lora, report, save_adapter
from peftlab.api import build
from peftlab.api.merging import merge_run
from peftlab.api.run import LOCK_NAME, RUN_NAME, Run, check_run_folder, free_run_folder, open_run, write_json
from peftlab.data import BatchPlan, Rows
from peftlab.errors import Interrupted, RecipeError, ResourceError
from peftlab.evaluation.loop import evaluate_examples
from peftlab.evaluation.metrics import check_metrics, default_metrics, flat_names
from peftlab.recipe import LoadedRecipe, Recipe, check_lock, check_same_settings, load_recipe, write_lock
from peftlab.tasks import Encoded, Task
from peftlab.training.checkpoint import list_checkpoints
from peftlab.training.loop import LoopResult, LoopSettings, TrainingLoop
from peftlab.training.memory import release_memory
from peftlab.training.metrics_log import MetricsLog
from peftlab.training.progress import Progress, make_progress

# What one more micro-batch costs, in padded tokens: launches and weight traffic that do not depend on its size.
# Measured with bench/cpu_vs_peft.py --split-cost on 2 cores; a GPU needs thousands of tokens to fill.
_SPLIT_COST = {"cpu": 48, "cuda": 2048}
_TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


@dataclass
class _Parts:
    """Everything a run is made of, after all that can be checked was checked."""

    loaded: LoadedRecipe
    device: str
    precision: str
    task: Task
    model: Any
    train: Encoded
    eval: Encoded
    plan: BatchPlan
    metrics: list[str]
    limit: int
    data: build.DataParts
    fingerprints: dict[str, str]
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe


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
    loaded, folder = _open(recipe, overrides, resume)
    with build.located(loaded), contextlib.ExitStack() as stack:
        stack.callback(progress.stop)
        folder = folder or _choose_folder(loaded, resume=resume, replace=replace)
        checkpoint = _newest_checkpoint(folder) if resume else None
        if resume:
            check_same_settings(loaded, open_run(folder).recipe())
        _check_settings(loaded.recipe)
        accelerator = stack.enter_context(_accelerator(loaded.recipe, folder))
        parts = _prepare(loaded, accelerator, progress)
        return _execute(parts, accelerator, folder, checkpoint, progress, replace=replace)


def _open(
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


def _choose_folder(loaded: LoadedRecipe, *, resume: bool, replace: bool) -> Path:
    wanted = loaded.recipe.run.dir
    if resume:
        folder = Path(wanted) if wanted else Path("runs") / loaded.name
        if not (folder / LOCK_NAME).is_file():
            raise RecipeError(f"there is no run in {folder} to resume; name the run folder: peftlab train RUN --resume")
        return folder
    if wanted is None:
        folder = Path("runs") / loaded.name
        if not (replace and folder.exists()):
            return free_run_folder(loaded.name)
    else:
        folder = Path(wanted)
    check_run_folder(folder, replace=replace)
    return folder


def _newest_checkpoint(folder: Path) -> Path:
    found = list_checkpoints(folder / "checkpoints")
    if not found:
        status = open_run(folder).summary.get("status", "unknown")
        why = "it is finished" if status == "finished" else "it has no checkpoint"
        raise RecipeError(f"the run in {folder} cannot be resumed: {why}")
    return found[-1]


def _check_settings(recipe: Recipe) -> None:
    """What can be found wrong without data or model."""
    if recipe.eval.metrics is not None:
        check_metrics(recipe.eval.metrics, recipe.task, bool(recipe.eval.choices))
    for name in recipe.run.log:
        import importlib.util

        if importlib.util.find_spec(_TRACKERS[name]) is None:
            raise RecipeError(f"{name} is not installed; run: pip install 'peftlab[{name}]'", key="run.log")


@contextlib.contextmanager
def _accelerator(recipe: Recipe, folder: Path) -> Iterator[Any]:
    """An Accelerator for this run; seeds and deterministic mode are set for its duration."""
    import warnings

    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import set_seed

    device = build.pick_device(recipe.run.device)
    if AcceleratorState._shared_state:  # an earlier run of this process may have used another precision
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        mixed_precision=build.precision_of(recipe, device),
        cpu=device == "cpu",
        log_with=list(recipe.run.log) or None,
        project_dir=str(folder),
    )
    before = torch.are_deterministic_algorithms_enabled()
    set_seed(recipe.run.seed)
    torch.use_deterministic_algorithms(recipe.run.deterministic, warn_only=True)
    # Deterministic mode also fills every new tensor with NaN, a pass over memory that hides no randomness here.
    filled, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        False,
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
            yield accelerator
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = filled
        accelerator.end_training()
        accelerator.free_memory()


def _prepare(loaded: LoadedRecipe, accelerator: Any, progress: Progress) -> _Parts:
    """Data, then model: the cheap half first, so that most mistakes show within seconds."""
    recipe, device = loaded.recipe, accelerator.device.type
    progress.stage("reading data")
    data = build.load_data(recipe)
    progress.stage(f"loading tokenizer of {recipe.model.name}")
    pretrained = build.pretrained_of(recipe)
    tokenizer = build.tokenizer_of(recipe, pretrained)
    fingerprints = build.fingerprints_of(pretrained, tokenizer, data)
    for line in check_lock(loaded, fingerprints=fingerprints):
        progress.note(line)
    task = build.build_task(recipe, tokenizer, data.train)
    metrics = recipe.eval.metrics or default_metrics(recipe.task, bool(recipe.eval.choices))
    if recipe.eval.best is not None and recipe.eval.best not in flat_names(metrics, task.class_names):
        raise RecipeError(
            f"{recipe.eval.best!r} is not among this run's metrics: {', '.join(flat_names(metrics, task.class_names))}",
            key="eval.best",
        )
    limit = build.limit_of(recipe, pretrained, tokenizer)
    encoded = build.encode(recipe, task, data.train, limit=limit, training=True)
    held_out = build.encode(recipe, task, data.eval, limit=limit, training=False)
    _tell("train", encoded, progress)
    _tell("held out", held_out, progress)
    plan = make_plan(recipe, encoded, device)
    progress.stage(f"loading {recipe.model.name} ({_storage(recipe)}) on {device}")
    model = build.model_of(recipe, pretrained, task, device)
    a = recipe.adapter
    model = add_lora(
        model,
        peft_type=task.peft_type,
        rank=a.rank,
        alpha=a.alpha,
        dropout=a.dropout,
        targets=a.targets,
        rslora=a.rslora,
        dora=a.dora,
        bias=a.bias,
        modules_to_save=a.modules_to_save,
    )
    release_memory()  # quantizing went through every weight in full precision
    adapted = report(model)
    progress.note(f"LoRA rank {a.rank}: {adapted}")
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    summary = {"adapter": asdict(adapted), "train_rows": len(encoded.examples), "eval_rows": len(held_out.examples)}
    return _Parts(
        loaded, device, accelerator.mixed_precision, task, model, encoded, held_out, plan, metrics, limit, data,
        fingerprints, summary,
    )  # fmt: skip


def make_plan(recipe: Recipe, encoded: Encoded, device: str) -> BatchPlan:
    """The batch plan of a recipe for its encoded training rows."""
    t = recipe.train
    return BatchPlan(
        encoded.lengths,
        batch_size=None if t.batch_tokens else (t.batch_size or 8),
        batch_tokens=t.batch_tokens,
        accumulate=t.accumulate,
        grouping=t.grouping,
        seed=recipe.run.seed,
        epochs=t.epochs,
        max_steps=t.max_steps,
        split_cost=_SPLIT_COST[device],
    )


def _storage(recipe: Recipe) -> str:
    return recipe.model.quantize if recipe.model.quantize != "none" else "unquantized"


def _tell(which: str, encoded: Encoded, progress: Progress) -> None:
    progress.note(
        f"{which}: {len(encoded.examples):,} rows, {encoded.num_tokens:,} tokens; " + "; ".join(encoded.notes)
    )


def _execute(
    parts: _Parts, accelerator: Any, folder: Path, checkpoint: Path | None, progress: Progress, *, replace: bool
) -> Run:
    with _input_casts(parts):
        _before(parts, accelerator, open_run(folder).summary if checkpoint else {}, progress)
        _check_room(parts, folder)
        with _folder(parts, folder, replace=replace and checkpoint is None, resumed=checkpoint is not None) as log:
            _train_and_score(parts, accelerator, folder, checkpoint, log, progress)
    accelerator.free_memory()
    _finish(parts, folder, progress)
    return open_run(folder)


def _before(parts: _Parts, accelerator: Any, earlier: dict[str, Any], progress: Progress) -> None:
    """Metrics and answers of the untouched model; a resumed run has them already."""
    summary = parts.summary
    summary["before"], summary["samples"] = earlier.get("before"), earlier.get("samples", [])
    if parts.recipe.eval.before and summary["before"] is None:
        progress.stage(f"evaluating the untouched model on {len(parts.eval.examples):,} held-out rows")
        summary["before"] = _evaluator(parts, accelerator)()
        summary["samples"] = [{"prompt": p, "before": a} for p, a in _answers(parts)]
        release_memory()


def _train_and_score(
    parts: _Parts, accelerator: Any, folder: Path, checkpoint: Path | None, log: MetricsLog, progress: Progress
) -> None:
    summary, evaluate = parts.summary, _evaluator(parts, accelerator)
    accelerator.init_trackers("peftlab", config={"recipe": parts.loaded.name})
    loop = _loop(parts, accelerator, folder, log, progress, evaluate)
    if checkpoint:
        progress.note(f"continuing after step {loop.resume(checkpoint)}")
    progress.stage(f"training for {parts.plan.total_steps:,} steps")
    result = loop.run()
    save_adapter(parts.model, folder / "adapter")  # now: whatever fails from here on, the training is kept
    progress.stage("evaluating the trained model")
    final = evaluate()
    loop.finish(final)
    _keep_adapter(parts, folder, result, progress)
    summary["after"] = final if result.best_step in (None, result.steps) else evaluate()
    answers = list(_answers(parts))
    if not summary["samples"]:
        summary["samples"] = [{"prompt": p} for p, _ in answers]
    for sample, (_, answer) in zip(summary["samples"], answers, strict=True):
        sample["after"] = answer
    summary["training"] = _figures(result)
    log.write({"step": result.steps, "eval": summary["after"], "final": True})


def _evaluator(parts: _Parts, accelerator: Any) -> Callable[[], dict[str, float]]:
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


def _input_casts(parts: _Parts) -> contextlib.AbstractContextManager[Any]:
    """Under autocast PEFT's cast of every adapter input to float32 is undone by the next matmul: leave it out."""
    from peft.helpers import disable_input_dtype_casting

    return contextlib.nullcontext() if parts.precision == "no" else disable_input_dtype_casting(parts.model)


def _answers(parts: _Parts) -> Iterator[tuple[str, str]]:
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


def _check_room(parts: _Parts, folder: Path) -> None:
    """Raises ResourceError when the disk cannot hold what the run will write: better now than in the last minute."""
    trained = sum(p.numel() * p.element_size() for p in parts.model.parameters() if p.requires_grad)
    checkpoints = (parts.recipe.run.keep + 1) * 3 * trained if parts.recipe.run.save_every else 3 * trained
    merged = 4 * parts.summary["adapter"]["num_total"] if parts.recipe.run.merge != "none" else 0
    needed = 2 * trained + checkpoints + merged + 2**20
    existing = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ResourceError(
            f"the run needs about {needed / 2**20:,.0f} MiB in {existing}, and {free / 2**20:,.0f} MiB are free; free some "
            "room, or choose another run.dir",
            key="run.dir",
        )


@contextlib.contextmanager
def _folder(parts: _Parts, folder: Path, *, replace: bool, resumed: bool) -> Iterator[MetricsLog]:
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
        _write_status(parts, folder, "trained", started)
    except BaseException as error:
        if list_checkpoints(folder / "checkpoints") or (folder / "adapter").is_dir():
            status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
            with contextlib.suppress(OSError):
                _write_status(parts, folder, status, started)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _environment(parts: _Parts) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if parts.device == "cuda" else "cpu"
    environment: dict[str, Any] = {"device": name, "precision": parts.precision, "threads": torch.get_num_threads()}
    if parts.task.class_names and parts.recipe.task == "seq_cls":
        environment["class_names"] = parts.task.class_names
    return environment


def _write_status(parts: _Parts, folder: Path, status: str, started: float) -> None:
    when = datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds")
    write_json(folder / RUN_NAME, {"name": parts.loaded.name, "status": status, "started": when, **parts.summary})


def _loop(
    parts: _Parts, accelerator: Any, folder: Path, log: MetricsLog, progress: Progress, evaluate: Callable[[], Any]
) -> TrainingLoop:
    t, e, r = parts.recipe.train, parts.recipe.eval, parts.recipe.run
    return TrainingLoop(
        model=parts.model,
        task=parts.task,
        train=parts.train,
        plan=parts.plan,
        settings=LoopSettings(
            lr=t.lr,
            schedule=t.schedule,
            warmup=t.warmup,
            weight_decay=t.weight_decay,
            betas=t.betas,
            max_grad_norm=t.max_grad_norm,
            eval_every=e.every,
            save_every=r.save_every,
            keep=r.keep,
            best=e.best,
            patience=e.patience,
        ),
        accelerator=accelerator,
        folder=folder,
        log=log,
        progress=progress,
        where=parts.data.train.where,
        evaluate=evaluate,
        resume_hint=f"peftlab train {folder} --resume",
    )


def _keep_adapter(parts: _Parts, folder: Path, result: LoopResult, progress: Progress) -> None:
    """Saves the final adapter: the best one when eval.best asks for it, which then is also the model's."""
    if result.best_step is not None and result.best_step != result.steps:
        progress.note(f"keeping step {result.best_step}: {parts.recipe.eval.best} {result.best_value:.4g} is the best")
        load_adapter_weights(parts.model, folder / "best")
    save_adapter(parts.model, folder / "adapter")
    shutil.rmtree(folder / "best", ignore_errors=True)


def load_adapter_weights(model: Any, folder: Path) -> None:
    """Puts saved adapter tensors into a model that carries the same adapter."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(str(folder / "adapter_model.safetensors")))


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


def _finish(parts: _Parts, folder: Path, progress: Progress) -> None:
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
