"""Searches settings with which a training fits into a GPU, the cheapest in time first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from peftlab.assembly import Assembly
from peftlab.assembly.plan import DEFAULT_BATCH_SIZE
from peftlab.planning.budget import plan_memory
from peftlab.planning.memory import MemoryPlan
from peftlab.planning.stage import Machine
from peftlab.specs.storages import STORAGES


@dataclass(frozen=True)
class FitStep:
    """One change on the way. Attributes: changes: values by recipe key. num_bytes: the peak with it. price: what it costs in time."""

    changes: dict[str, Any]
    num_bytes: int
    phase: str
    price: str

    def document(self) -> dict[str, Any]:
        return {"changes": self.changes, "bytes": self.num_bytes, "phase": self.phase, "price": self.price}


@dataclass(frozen=True)
class FitResult:
    """Attributes: fits: whether the last step fits. steps: the changes, each on top of those before; the first changes nothing."""

    fits: bool
    steps: list[FitStep]

    @property
    def changes(self) -> dict[str, Any]:
        """All changes together, by recipe key."""
        merged = {key: value for step in self.steps for key, value in step.changes.items()}
        return {key: value for key, value in merged.items() if (key, value) != ("train.gradient_checkpointing", False)}


def find_fit(
    assembly: Assembly, machine: Machine, *, memory: Callable[[Assembly, Machine], MemoryPlan] = plan_memory
) -> FitResult:
    """Changes the recipe until its plan fits into ``machine``; the rows of an optimizer step stay the same.

    Args: memory: makes the plan of an assembly.
    """
    assert machine.gpu_bytes is not None
    steps: list[FitStep] = []

    def tried(changed: Assembly, changes: dict[str, Any], price: str) -> bool:
        peak = memory(changed, machine).peak
        steps.append(FitStep(changes, peak.num_bytes, peak.name, price))
        return peak.num_bytes <= (machine.gpu_bytes or 0)

    if tried(assembly, {}, ""):
        return FitResult(True, steps)
    current = assembly
    while (change := next(_changes(current, steps[-1].phase), None)) is not None:
        changes, price = change
        current = current.derive(changes)
        if tried(current, changes, price):
            _undo(assembly, machine, current, steps, memory)
            return FitResult(True, steps)
    return FitResult(False, steps)


def _undo(
    original: Assembly,
    machine: Machine,
    current: Assembly,
    steps: list[FitStep],
    memory: Callable[[Assembly, Machine], MemoryPlan],
) -> None:
    """Takes earlier changes back that the last one makes needless: first recomputation, then small micro-batches."""
    now, before = current.recipe.train, original.recipe.train
    ways: list[dict[str, Any]] = []
    if now.gradient_checkpointing and not before.gradient_checkpointing:
        ways.append({"train.gradient_checkpointing": False})
    if now.batch_size is not None:
        rows, num = now.batch_size, now.accumulate
        while num > before.accumulate:
            rows, num = min(2 * rows, before.batch_size or DEFAULT_BATCH_SIZE), num // 2
            ways.append({"train.batch_size": rows, "train.accumulate": num})
    for changes in ways if len(steps) > 2 else []:
        peak = memory(current.derive(changes), machine).peak
        if peak.num_bytes <= (machine.gpu_bytes or 0):
            current = current.derive(changes)
            steps.append(FitStep(changes, peak.num_bytes, peak.name, "no longer needed: faster without it"))
        elif "train.batch_size" in changes:
            break


def _changes(assembly: Assembly, phase: str) -> Iterator[tuple[dict[str, Any], str]]:
    """What is left to change, with its price: no merge; smaller batches of an evaluation; of a training smaller micro-batches, down
    to a quarter, then recomputed layers, then single rows; then NF4.

    Args: phase: the one with the peak; what does not lower it is left alone.
    """
    recipe = assembly.recipe
    if phase == "merge":
        yield {"run.merge": "none"}, "costs no time: merge later, where there is memory, with peftlab merge"
    if phase == "evaluation" and recipe.eval.batch_tokens // 2 >= assembly.limit:
        yield {"eval.batch_tokens": recipe.eval.batch_tokens // 2}, "costs little: more and smaller batches"
    if phase == "training":
        yield from _smaller_steps(assembly)
    if assembly.storage == "none" and assembly.method.adapts and recipe.adapter.method == "lora":
        more = STORAGES["nf4"].overhead / STORAGES["none"].overhead - 1
        yield (
            {"model.quantize": "nf4"},
            f"costs {100 * more:.0f} % of a step: weights are read dequantized, and are slightly less exact",
        )


def _smaller_steps(assembly: Assembly) -> Iterator[tuple[dict[str, Any], str]]:
    t = assembly.recipe.train
    checkpoints = t.gradient_checkpointing
    halved: dict[str, Any] | None = None
    if t.batch_tokens:
        if t.batch_tokens // 2 >= assembly.limit:
            halved = {"train.batch_tokens": t.batch_tokens // 2, "train.accumulate": 2 * t.accumulate}
    elif (rows := t.batch_size or DEFAULT_BATCH_SIZE) > 1:
        halved = {"train.batch_size": -(-rows // 2), "train.accumulate": 2 * t.accumulate}
    if halved is not None and (checkpoints or t.accumulate < 4):
        yield halved, "costs little: more and smaller products for the same rows"
    if not checkpoints:
        yield {"train.gradient_checkpointing": True}, "costs one more forward pass, about a third of a step"
    if halved is not None:
        yield halved, "costs little: more and smaller products for the same rows"
