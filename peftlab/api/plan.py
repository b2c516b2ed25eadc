"""``plan``: memory, disk and time of a training, from configuration and data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from peftlab.api.check import estimate_training
from peftlab.assembly import Assembly
from peftlab.assembly.checks import check_settings
from peftlab.assembly.process import located, prepare_libraries
from peftlab.errors import RecipeError
from peftlab.planning.budget import plan_disk, plan_memory
from peftlab.planning.fitting import find_fit
from peftlab.planning.stage import Machine, Stage
from peftlab.runs import open_source
from peftlab.training.progress import Progress, make_progress


def plan(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    gpu_bytes: int | None = None,
    fit: bool = False,
    flops_per_s: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Returns the memory of a training, phase by phase and term by term. Loads no weights, trains and writes nothing.

    Args:
        recipe: path, shipped name, dict, or a run folder.
        overrides: ``section.key=value``.
        gpu_bytes: plan for a GPU of this memory; None: for the device of the recipe.
        fit: search settings that fit into ``gpu_bytes``.
        flops_per_s: rate of its matrix products; None: measured if the planned device is this machine's.
        progress: where progress goes; default: stderr.

    Returns: plain values. ``phases``: name, bytes and terms of load, training, evaluation and merge. ``peak``: the largest of
        them. ``fits``: whether it fits; None for a CPU. ``disk``: bytes by what they hold. ``micro_batch``: the largest.
        ``estimate``: steps, tokens, FLOPs and seconds.
        ``fit``: the changes that make it fit, each with the peak after it and its price; None without ``fit``.
    Raises: RecipeError, DataError.
    """
    prepare_libraries(measured_plans=False)
    progress = progress or make_progress()
    loaded, _ = open_source(recipe, overrides)
    with located(loaded), progress:
        for line in loaded.notes:
            progress.note(line)
        assembly = Assembly(loaded, transfer=True)
        if assembly.recipe.distill is not None:
            raise RecipeError(
                "plan does not know distillations yet; remove this section to plan the student alone", key="distill"
            )
        check_settings(assembly)
        progress.stage("reading data")
        train = assembly.train
        progress.stage("planning")
        machine = _machine(assembly, gpu_bytes)
        stage = Stage(assembly, machine)
        memory, disk = plan_memory(assembly, machine, stage), plan_disk(assembly, stage)
        elsewhere = machine.device != assembly.device
        found = None
        if fit:
            if gpu_bytes is None:
                raise RecipeError("fit needs the memory of a GPU: give gpu_bytes")
            progress.stage("searching settings that fit")
            found = find_fit(assembly, machine)
        rate = flops_per_s or (1.0 if elsewhere else None)
        estimate = estimate_training(assembly, assembly.skeleton(), train.ledger, flops_per_s=rate)
        if estimate is not None and elsewhere and flops_per_s is None:
            estimate |= {"seconds": None, "flops_per_s": None}
    return {
        "recipe": loaded.name,
        "model": assembly.recipe.model.name,
        "storage": assembly.storage,
        "device": machine.device,
        "gpu_bytes": machine.gpu_bytes,
        "fits": None if machine.gpu_bytes is None else memory.peak.num_bytes <= machine.gpu_bytes,
        "fit": None
        if found is None
        else {"fits": found.fits, "changes": found.changes, "steps": [step.document() for step in found.steps]},
        "phases": [phase.document() for phase in memory.phases],
        "peak": {"phase": memory.peak.name, "bytes": memory.peak.num_bytes},
        "micro_batch": {"rows": memory.rows, "tokens": memory.tokens},
        "checkpointed_layers": memory.checkpointed,
        "parameters": {"total": stage.report.num_total, "trained": stage.report.num_trained},
        "disk": disk,
        "estimate": estimate,
    }


def _machine(assembly: Assembly, gpu_bytes: int | None) -> Machine:
    if gpu_bytes is not None:
        return Machine("cuda", gpu_bytes)
    if assembly.device != "cuda":
        return Machine("cpu")
    import torch

    return Machine("cuda", int(torch.cuda.get_device_properties(0).total_memory))
