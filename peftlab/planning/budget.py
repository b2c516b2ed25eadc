"""The memory plan of a recipe: phases and terms."""

from __future__ import annotations

from peftlab.assembly import Assembly
from peftlab.assembly.plan import make_plan
from peftlab.data import eval_batches
from peftlab.errors import RecipeError
from peftlab.models import base_model
from peftlab.planning.memory import MemoryPlan, PhasePlan, optimizer_bytes
from peftlab.planning.rehearsal import Peak
from peftlab.planning.stage import Machine, Stage, largest
from peftlab.tasks import Example

# CUDA context and the workspaces of cuBLAS, as gpu-check sets them aside.
CONTEXT_BYTES = 500_000_000
# A model of more equal layers is planned from two and three of them.
_MOST_LAYERS = 6
_FROZEN, _TRAINED = "frozen weights", "trained weights"


def plan_memory(assembly: Assembly, machine: Machine, stage: Stage | None = None) -> MemoryPlan:
    """The memory of a training by ``assembly``. Reads its data, loads no weights."""
    stage = stage or Stage(assembly, machine)
    recipe = assembly.recipe
    checkpointed = len(stage.layers) if recipe.train.gradient_checkpointing else 0
    frozen, trained = stage.held()
    state, _ = optimizer_bytes(recipe.train.optimizer, stage.trained_sizes())
    plan = make_plan(
        assembly,
        assembly.train.lengths,
        packing=assembly.limit if recipe.data.packing else None,
        device=machine.device,
    )
    examples, tokens, again = largest(assembly, plan)
    held = {_FROZEN: frozen, _TRAINED: trained}
    context = {"CUDA context": CONTEXT_BYTES} if machine.device == "cuda" else {}
    held_out = _largest_of(assembly)
    step, seen = _passes(stage, examples, held_out, packed=plan.packed, again=again)
    phases = [
        PhasePlan("load", {_FROZEN: frozen, "one weight at full precision": _widest(stage), **context}),
        PhasePlan("training", {**held, "optimizer": state, **_parts(step), **context}),
    ]
    if held_out:
        phases.append(PhasePlan("evaluation", {**held, "optimizer": state, **_parts(seen), **context}))
    if recipe.run.merge != "none":
        phases.append(PhasePlan("merge", _merge(stage)))
    rows = 1 if plan.packed else len(examples)
    return MemoryPlan(phases, rows=rows, tokens=tokens, checkpointed=checkpointed)


def _largest_of(assembly: Assembly) -> list[Example]:
    """The largest batch of the evaluation."""
    examples = assembly.held_out.examples
    if not examples:
        return []
    batches = eval_batches([len(e) for e in examples], assembly.recipe.eval.batch_tokens)
    biggest = max(batches, key=lambda part: len(part) * max(len(examples[i]) for i in part))
    return [examples[i] for i in biggest]


def _passes(
    stage: Stage, examples: list[Example], held_out: list[Example], *, packed: bool, again: bool
) -> tuple[Peak, Peak]:
    """The peaks of a training step and of an evaluation. Of many equal layers two and three are run, and the rest counted on."""
    num_layers = len(stage.layers)

    def run(stage: Stage) -> tuple[Peak, Peak]:
        if stage.assembly.recipe.train.gradient_checkpointing:
            stage.checkpoint()
        try:
            seen = stage.evaluate(held_out) if held_out else Peak()
            return stage.train(examples, packed=packed, again=again), seen
        except (RuntimeError, ValueError, TypeError) as error:  # from any model's and task's code
            raise RecipeError(
                f"plan cannot run {type(base_model(stage.model)).__name__} without weights: its loss or model reads values "
                f"({(str(error).splitlines() or [type(error).__name__])[0][:80]}); "
                "train a few steps with train.max_steps=3 and read the peak in run.json",
                key="model.name",
            ) from error

    if not stage.is_uniform or num_layers <= _MOST_LAYERS:
        return run(stage)
    two, three = (run(Stage(stage.assembly, stage.machine, num_layers=n)) for n in (2, 3))
    step, seen = (_continued(a, b, num_layers - 2) for a, b in zip(two, three, strict=True))
    return step, seen


def _continued(two: Peak, three: Peak, more: int) -> Peak:
    """The peak with ``more`` layers than two."""
    names = [*two.parts, *(name for name in three.parts if name not in two.parts)]
    sizes = {n: two.parts.get(n, 0) + more * (three.parts.get(n, 0) - two.parts.get(n, 0)) for n in names}
    parts = {name: max(0, size) for name, size in sizes.items()}
    return Peak(sum(parts.values()), parts)


def _parts(peak: Peak) -> dict[str, int]:
    return {name: size for name, size in peak.parts.items() if size}


def _widest(stage: Stage) -> int:
    """Bytes of the largest weight before it is quantized; 0 without quantization."""
    if stage.assembly.storage == "none":
        return 0
    itemsize = stage.machine.dtype(stage.assembly.recipe.model.dtype).itemsize
    linears = [m for m in stage.model.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")]
    return max((m.in_features * m.out_features * itemsize for m in linears), default=0)


def _merge(stage: Stage) -> dict[str, int]:
    """Merging holds the whole model: in float32, and the copies that are compared and written. Measured on a model of 1.24 billion
    parameters: 9 bytes for each."""
    num_total = stage.report.num_total
    return {"model in float32": 4 * num_total, "copies to compare and write": 5 * num_total}


def plan_disk(assembly: Assembly, stage: Stage) -> dict[str, int]:
    """Bytes that the run folder takes, by what they hold."""
    recipe = assembly.recipe
    _, trained = stage.held()
    state = sum(optimizer_bytes(recipe.train.optimizer, stage.trained_sizes()))
    disk = {"adapter" if assembly.method.adapts else "model": trained}
    if recipe.run.save_every:
        disk["checkpoints"] = (recipe.run.keep + 1) * (trained + state)
    if recipe.eval.best:
        disk["best"] = trained
    if recipe.run.merge != "none":
        disk["merged model"] = 2 * stage.report.num_total
    return disk
