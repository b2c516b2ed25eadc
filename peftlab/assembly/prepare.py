"""Builds the parts of a training, after all early checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from peftlab import ops
from peftlab.adapters import (
    AdapterReport,
    InitialRows,
    adapted_modules,
    head_reason,
    inject,
    move_statistics,
    owners,
    planned_modules,
    planned_parameters,
    report,
    token_modules,
    train_all,
)
from peftlab.adapters.fused import fusion_report
from peftlab.assembly.account import report_ledger
from peftlab.assembly.assembly import Assembly
from peftlab.assembly.checks import check_room_to_answer
from peftlab.assembly.model_findings import model_findings
from peftlab.assembly.plan import make_plan, plan_notes
from peftlab.data import BatchPlan, Rows, eval_batches
from peftlab.errors import RecipeError
from peftlab.measuring.memory import release_memory
from peftlab.models import base_model, new_weights, token_rows
from peftlab.recipe import LoadedRecipe, Recipe, check_lock
from peftlab.specs.methods import METHODS
from peftlab.tasks import Encoded, FindsSettings, Task
from peftlab.training.distill_loss import DistillLoss
from peftlab.training.progress import Progress, SilentProgress

# Rows that an initialisation looks at, and padded tokens per batch of them.
_INITIAL_ROWS, _INITIAL_TOKENS = 128, 2048


@dataclass(frozen=True)
class Phase:
    """A range of a run's steps, or all of them, with its own rows.

    Attributes:
        rows: the rows of ``train``. span: the first step, and the one after the last; None: all steps.
        before: called with the parts right before the first step; None: no call.
    """

    rows: Rows
    train: Encoded
    span: tuple[int, int] | None = None
    before: Callable[[Parts], None] | None = None


# Makes a student's loss from its assembly, model, training rows and examples.
MakeLoss = Callable[[Assembly, Any, Rows, Encoded], DistillLoss]


@dataclass
class Parts:
    """The parts of a training.

    Attributes:
        rows: the rows of ``train``. planned: names of the modules to adapt. loss: the loss of a student; None: the
            task's loss. summary: the contents of run.json so far.
    """

    assembly: Assembly
    precision: str
    model: Any
    rows: Rows
    train: Encoded
    held_out: Encoded
    plan: BatchPlan
    metrics: list[str]
    planned: list[str]
    loss: DistillLoss | None = None
    phase: Phase | None = None
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def loaded(self) -> LoadedRecipe:
        return self.assembly.loaded

    @property
    def recipe(self) -> Recipe:
        return self.assembly.recipe

    @property
    def task(self) -> Task:
        return self.assembly.task

    @property
    def device(self) -> str:
        return self.assembly.device

    @property
    def limit(self) -> int:
        return self.assembly.limit

    @property
    def span(self) -> tuple[int, int] | None:
        return None if self.phase is None else self.phase.span


def prepare(
    assembly: Assembly,
    accelerator: Any,
    progress: Progress,
    *,
    make_loss: MakeLoss | None = None,
    phase: Phase | None = None,
) -> Parts:
    """Prepares data, then model: the cheap half first, so that most mistakes show within seconds.

    Args: make_loss: makes a student's loss; None: train on the labels alone. phase: the phase to train; None: all steps.
    """
    recipe, device = assembly.recipe, assembly.device
    progress.stage("reading data")
    rows = assembly.data.train
    progress.stage(f"loading {assembly.spec.reader} of {recipe.model.name}")
    for line in check_lock(assembly.loaded, fingerprints=assembly.fingerprints):
        progress.note(line)
    plans = ((recipe.lock or {}).get("environment") or {}).get("kernel_plans", ops.plans_in_use())
    if plans != ops.plans_in_use():
        progress.note(
            f"kernel plans: {plans} when the run was made, {ops.plans_in_use()} now: the last bits may differ"
        )
    task, limit = assembly.task, assembly.limit
    if recipe.eval.prompts:
        check_room_to_answer(recipe.eval.max_new_tokens, assembly, key="eval.max_new_tokens")
    metrics = assembly.metrics
    train, held_out = assembly.train if phase is None else phase.train, assembly.held_out
    rows = rows if phase is None else phase.rows
    progress.done()
    span = None if phase is None else phase.span
    reported = span is not None and span[0] > 0
    ledger = report_ledger(
        task,
        train.ledger,
        held_out.ledger,
        SilentProgress() if reported else progress,
        allow=recipe.data.allow,
        unread=assembly.unread_columns,
        of_model=model_findings(assembly),
        num_embeddings=assembly.num_embeddings,
    )
    plan = make_plan(assembly, train.lengths, packing=limit if recipe.data.packing else None, span=span)
    for key, message in [] if reported else plan_notes(recipe, plan.total_steps):
        progress.note(f"{key}: {message}")
    storage = "unquantized" if assembly.storage == "none" else assembly.storage
    progress.stage(f"loading {recipe.model.name} ({storage}) on {device}")
    model, planned, trained = trainable(assembly, assembly.model(), num_steps=plan.total_steps, train=train)
    release_memory()  # quantizing held every weight in full precision
    if assembly.spec.finds_settings:
        random = assembly.pretrained.source.kind in ("tiny", "shape")
        before = assembly.start is not None or not (random or new_weights(model))
        cast(FindsSettings, task).before_training(model, trained_before=before)
    progress.done()
    progress.note(f"{method_text(recipe)}: {trained}")
    if (checked := getattr(model, "quantized_check", None)) is not None:
        progress.note(str(checked))
    if assembly.method.adapts:
        fusion = fusion_report(model)
        meant = any(variant.fused for variant in assembly.method.variants.values())
        (progress.note if fusion.slow and meant else progress.detail)(str(fusion))
        if recipe.run.kernels != "reference" and (note := ops.kernels_note(device)):
            progress.note(note)
    full_logits = _full_logits_reason(assembly, model)
    if full_logits:
        progress.note(f"output head: the loss uses full logits: {full_logits}")
    if recipe.train.gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except (ValueError, NotImplementedError, AttributeError) as error:
            raise RecipeError(
                f"{type(base_model(model)).__name__} has no gradient checkpointing ({str(error).splitlines()[0]}); set "
                "train.gradient_checkpointing=false",
                key="train.gradient_checkpointing",
            ) from error
    summary: dict[str, Any] = {
        "adapter": asdict(trained),
        "train_rows": train.num_rows,
        "eval_rows": held_out.num_rows,
        "full": not assembly.method.adapts,
        "mergeable": assembly.method.adapts
        and not any(METHODS[n].unmergeable for n in assembly.recipe.adapter.methods),
        "full_logits": full_logits,
        "ledger": ledger,
    }
    loss = None if make_loss is None else make_loss(assembly, model, rows, train)
    precision = accelerator.mixed_precision
    return Parts(assembly, precision, model, rows, train, held_out, plan, metrics, planned, loss, phase, summary)


def trainable(
    assembly: Assembly, model: Any, *, num_steps: int | None = None, train: Encoded | None = None
) -> tuple[Any, list[str], AdapterReport]:
    """Returns the model ready to train, the names of the modules to adapt, and the counts.

    Args: num_steps: optimizer steps of the run. train: the training examples, for an initialisation that looks at them.
    """
    method, a = assembly.method, assembly.recipe.adapter
    if not method.adapts:
        if assembly.recipe.train.batch_norm == "trained":
            move_statistics(model)
        return model, [], train_all(model, freeze=a.freeze)
    # A vector is the mean of token vectors, or one of them: no new pooler has a part in it.
    new = frozenset[str]() if assembly.spec.predicts == "vectors" else new_weights(model)
    where: dict[str, Any] = {"new": new, **assembly.adapter_places}
    options = assembly.adapter_options
    planned = planned_modules(model, method=method.name, **where)
    planned += owners(planned_parameters(model, options.get("target_parameters"), **where))
    if assembly.recipe.adapter.tokens:
        options |= {"trainable_token_indices": _trained_rows(assembly, model, options)}
    model = inject(
        model,
        method.name,
        kernels=assembly.recipe.run.kernels,
        num_steps=num_steps,
        rows=None if train is None else lambda: _initial_rows(assembly, train),
        **where,
        **options,
    )
    if assembly.start is not None:
        assembly.start.load(model)
    if a.beside or not method.has_targets:
        planned = adapted_modules(model)
    planned += token_modules(model)
    return model, list(dict.fromkeys(planned)), report(model)


def _trained_rows(assembly: Assembly, model: Any, options: dict[str, Any]) -> dict[str, list[int]]:
    """The rows of new tokens, with those that the recipe names itself, by name of their module."""
    rows = token_rows(model, assembly.reader, list(assembly.recipe.adapter.tokens))
    given = options.get("trainable_token_indices") or {}
    if isinstance(given, list):
        given = dict.fromkeys(rows, given)
    return {name: sorted({*rows.get(name, []), *given.get(name, [])}) for name in {**rows, **given}}


def _initial_rows(assembly: Assembly, train: Encoded) -> InitialRows:
    """The first training rows, in batches of similar length."""
    examples = train.examples[:_INITIAL_ROWS]
    parts = eval_batches([len(example) for example in examples], _INITIAL_TOKENS)
    batches = [assembly.task.collate([examples[i] for i in part], assembly.device) for part in parts]

    def loss(model: Any, index: int) -> Any:
        return assembly.task.loss_sum(model, batches[index]) / batches[index].weights.sum()

    return InitialRows([batch.inputs for batch in batches], loss)


def method_text(recipe: Recipe) -> str:
    """``LoRA rank 8``."""
    method = recipe.method
    return method.label if recipe.adapter.rank is None else f"{method.label} rank {recipe.adapter.rank}"


def _full_logits_reason(assembly: Assembly, model: Any) -> str | None:
    """Why the loss of a language model's head is not fused; None if it is fused or there is no such head."""
    base = base_model(model)
    head = base.get_output_embeddings() if assembly.spec.predicts == "tokens" else None
    if head is None:
        return None
    return "run.kernels=reference" if assembly.recipe.run.kernels == "reference" else head_reason(head)
