"""Everything a training run is made of, built from a recipe after all that can be checked was checked."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peftlab import ops
from peftlab.adapters import AdapterReport, add_lora, check_targets, head_reason, planned_modules, report, train_all
from peftlab.adapters.fused import fusion_report
from peftlab.api import build
from peftlab.api.findings import findings, previews, shared_rows
from peftlab.api.ledger_text import PreviewText, finding_line, opening_lines, shared_line
from peftlab.api.teachers import Teachers
from peftlab.data import BatchPlan, Ledger, Rows
from peftlab.errors import RecipeError, ResourceError
from peftlab.evaluation.metrics import check_metrics, default_metrics, flat_names
from peftlab.recipe import LoadedRecipe, Recipe, check_lock
from peftlab.specs.storages import STORAGES
from peftlab.tasks import Encoded, Task
from peftlab.training.distilling import DistillLoss
from peftlab.training.loop import LoopSettings
from peftlab.training.memory import release_memory
from peftlab.training.progress import Progress, SilentProgress

# Twice as many rows at once are no faster on 2 cores, and take 200 MB more for MiniLM (bench/README.md).
_MOST_TOKENS = {"cpu": 1024, "cuda": None}
# Rows that run.json names for each reason to leave rows out; `check --json` names all.
_MOST_PLACES = 20
_TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


@dataclass(frozen=True)
class Phase:
    """Some of the steps of a run, on rows of their own.

    Attributes:
        rows: what ``train`` was made of. span: the first of the steps, and the one after the last.
        before: called with the parts as soon as they are as the first of the steps finds them; None: nothing is.
    """

    rows: Rows
    train: Encoded
    span: tuple[int, int]
    before: Callable[[Parts], None] | None = None


@dataclass
class Parts:
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
    planned: list[str]
    loss: DistillLoss | None = None
    phase: Phase | None = None
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe


def check_settings(recipe: Recipe) -> None:
    """What can be found wrong without data or model."""
    if recipe.run.kernels == "triton" and (
        problem := ops.triton_problem(build.pick_device(recipe.run.device), products=True)
    ):
        raise RecipeError(f"run.kernels=triton cannot run here: {problem}; use auto", key="run.kernels")
    if recipe.run.kernels in ops.CPU_OPERANDS:
        on_gpu = "this run is on a GPU" if build.pick_device(recipe.run.device) != "cpu" else None
        if problem := on_gpu or ops.operands_problem(recipe.run.kernels):
            raise RecipeError(
                f"run.kernels={recipe.run.kernels} cannot run here: {problem}; use auto", key="run.kernels"
            )
    if recipe.eval.metrics is not None:
        check_metrics(recipe.eval.metrics, recipe.task, bool(recipe.eval.choices))
    for name in recipe.run.log:
        import importlib.util

        if importlib.util.find_spec(_TRACKERS[name]) is None:
            raise RecipeError(f"{name} is not installed; run: pip install 'peftlab[{name}]'", key="run.log")


def metrics_of(recipe: Recipe, task: Task) -> list[str]:
    """Names of the run's metrics. Raises: RecipeError when eval.best is none of them."""
    metrics = recipe.eval.metrics or default_metrics(recipe.task, bool(recipe.eval.choices))
    if recipe.eval.best is not None and recipe.eval.best not in flat_names(metrics, task.class_names):
        raise RecipeError(
            f"{recipe.eval.best!r} is not among this run's metrics: {', '.join(flat_names(metrics, task.class_names))}",
            key="eval.best",
        )
    return metrics


@contextlib.contextmanager
def run_accelerator(recipe: Recipe, folder: Path) -> Iterator[Any]:
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


def prepare(
    loaded: LoadedRecipe,
    accelerator: Any,
    progress: Progress,
    *,
    teachers: Teachers | None = None,
    phase: Phase | None = None,
) -> Parts:
    """Data, then model: the cheap half first, so that most mistakes show within seconds.

    Args: teachers: of a student; None: the labels alone are learned from. phase: what is trained now; None: all of it.
    """
    recipe, device = loaded.recipe, accelerator.device.type
    progress.stage("reading data")
    data = build.load_data(recipe, transfer=teachers is not None)
    progress.stage(f"loading {recipe.spec.reader} of {recipe.model.name}")
    pretrained = build.pretrained_of(recipe)
    tokenizer = build.tokenizer_of(recipe, pretrained)
    fingerprints = build.fingerprints_of(pretrained, tokenizer, data)
    for line in check_lock(loaded, fingerprints=fingerprints):
        progress.note(line)
    plans = ((recipe.lock or {}).get("environment") or {}).get("kernel_plans", ops.plans_in_use())
    if plans != ops.plans_in_use():
        progress.note(
            f"kernel plans: {plans} when the run was made, {ops.plans_in_use()} now: the last bits may differ"
        )
    task = build.build_task(recipe, tokenizer, data.labelled)
    metrics = metrics_of(recipe, task)
    limit = build.limit_of(recipe, pretrained, tokenizer)
    if phase is None:
        encoded = build.encode(recipe, task, data.train, limit=limit, training=True, labelled=data.has_labels)
    else:
        data, encoded = replace(data, train=phase.rows), phase.train
    held_out = build.encode(recipe, task, data.eval, limit=limit, training=False)
    told = phase is not None and phase.span[0] > 0
    ledger = _tell_ledger(recipe, task, encoded.ledger, held_out.ledger, SilentProgress() if told else progress)
    span = None if phase is None else phase.span
    plan = make_plan(recipe, encoded.lengths, device, packing=limit if recipe.data.packing else None, span=span)
    progress.stage(f"loading {recipe.model.name} ({_storage(recipe)}) on {device}")
    model = build.model_of(recipe, pretrained, task, device)
    model, planned, trained = trainable(recipe, model, task)
    release_memory()  # quantizing went through every weight in full precision
    progress.note(f"{_method(recipe)}: {trained}")
    if recipe.adapter.method != "none":
        progress.note(str(fusion_report(model)))
        if recipe.run.kernels != "reference" and (note := ops.kernels_note(device)):
            progress.note(note)
    full_logits = _full_logits_reason(recipe, model)
    if full_logits:
        progress.note(f"output head: the loss takes full logits: {full_logits}")
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    summary: dict[str, Any] = {
        "adapter": asdict(trained),
        "train_rows": len(encoded.examples),
        "eval_rows": len(held_out.examples),
    }
    summary |= {"full": recipe.adapter.method == "none", "full_logits": full_logits, "ledger": ledger}
    packing = recipe.data.packing
    loss = None if teachers is None else teachers.loss(task, model, data, encoded, limit=limit, packing=packing)
    return Parts(
        loaded, device, accelerator.mixed_precision, task, model, encoded, held_out, plan, metrics, limit, data,
        fingerprints, planned, loss, phase, summary,
    )  # fmt: skip


def trainable(recipe: Recipe, model: Any, task: Task) -> tuple[Any, list[str], AdapterReport]:
    """The model with what the recipe trains, the names of the modules that were to be adapted, and the counts."""
    a = recipe.adapter
    if a.method == "none":
        return model, [], train_all(model, freeze=a.freeze)
    check_targets(model, a.targets)
    planned = planned_modules(model, peft_type=task.spec.peft_type, targets=a.targets)
    model = add_lora(
        model,
        peft_type=task.spec.peft_type,
        rank=a.rank,
        alpha=a.alpha,
        dropout=a.dropout,
        targets=a.targets,
        rslora=a.rslora,
        dora=a.dora,
        bias=a.bias,
        modules_to_save=a.modules_to_save,
        kernels=recipe.run.kernels,
    )
    return model, planned, report(model)


def _method(recipe: Recipe) -> str:
    return "full fine-tuning" if recipe.adapter.method == "none" else f"LoRA rank {recipe.adapter.rank}"


def _full_logits_reason(recipe: Recipe, model: Any) -> str | None:
    """Why the loss of a language model's head does not run fused; None where it does, or where there is no such head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings() if recipe.spec.predicts == "tokens" else None
    if head is None:
        return None
    return "run.kernels=reference" if recipe.run.kernels == "reference" else head_reason(head)


def make_plan(
    recipe: Recipe,
    lengths: npt.NDArray[np.int64],
    device: str,
    *,
    packing: int | None = None,
    span: tuple[int, int] | None = None,
) -> BatchPlan:
    """The batch plan of a recipe for training rows of [N] ``lengths``, in packs of up to ``packing`` tokens or padded.

    Args: span: see ``BatchPlan``.
    """
    t = recipe.train
    return BatchPlan(
        lengths,
        batch_size=None if t.batch_tokens else (t.batch_size or 8),
        batch_tokens=t.batch_tokens,
        accumulate=t.accumulate,
        grouping=t.grouping,
        seed=recipe.run.seed,
        epochs=t.epochs,
        max_steps=t.max_steps,
        split_cost=STORAGES[recipe.model.quantize].split_cost[device],
        most_tokens=_MOST_TOKENS[device],
        packing=packing,
        span=span,
    )


def loop_settings(recipe: Recipe) -> LoopSettings:
    t, e, r = recipe.train, recipe.eval, recipe.run
    return LoopSettings(
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
    )


def padded_instead(parts: Parts) -> BatchPlan:
    """The plan of a packing recipe whose model cannot pack: steps and micro-batches of as many tokens, padded."""
    t = parts.recipe.train
    if t.batch_tokens is None:
        t = t.model_copy(
            update={"batch_size": None, "batch_tokens": parts.limit, "accumulate": (t.batch_size or 8) * t.accumulate}
        )
    span = None if parts.phase is None else parts.phase.span
    return make_plan(parts.recipe.model_copy(update={"train": t}), parts.train.lengths, parts.device, span=span)


def _storage(recipe: Recipe) -> str:
    return recipe.model.quantize if recipe.model.quantize != "none" else "unquantized"


def _tell_ledger(recipe: Recipe, task: Task, train: Ledger, held_out: Ledger, progress: Progress) -> dict[str, Any]:
    """Says what is trained, with one row as an example; the account for the run's summary."""
    reports = {"train": train.report(most_places=_MOST_PLACES), "held_out": held_out.report(most_places=_MOST_PLACES)}
    for line in [
        *opening_lines("train", reports["train"], counts=True),
        *opening_lines("held out", reports["held_out"], counts=False),
    ]:
        progress.note(line)
    shared = shared_rows(train, held_out)
    if shared:
        progress.warn(f"{shared_line(shared)}: the metrics count what was trained on too")
    found = findings(train, held_out, allow=recipe.data.allow)
    for finding in found:
        progress.note(finding_line(finding))
    for row in previews(task, train, 1):
        progress.show(PreviewText(asdict(row), longest=160))
    kinds = {"kinds": [f["kind"] for f in found], "shared": len(shared)}
    return {**reports, "findings": kinds}


def check_room(parts: Parts, folder: Path) -> None:
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
