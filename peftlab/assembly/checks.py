"""Checks that run before anything is loaded or written."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

from peftlab import ops
from peftlab.assembly.assembly import Assembly
from peftlab.errors import RecipeError, ResourceError
from peftlab.evaluation.metrics import check_metrics
from peftlab.paths import existing_folder
from peftlab.ranks import is_set, num_ranks, shards
from peftlab.specs.kernels import KERNEL_MODES
from peftlab.specs.optimizers import OPTIMIZERS


def check_settings(assembly: Assembly) -> None:
    """Checks the settings that need neither data nor model. Raises: RecipeError."""
    recipe = assembly.recipe
    mode = KERNEL_MODES[recipe.run.kernels]
    if mode.name == "triton" and (problem := ops.triton_problem(assembly.device, products=True)):
        raise RecipeError(f"run.kernels=triton cannot run here: {problem}; use auto", key="run.kernels")
    if mode.operands is not None:
        on_gpu = "this run is on a GPU" if assembly.device != "cpu" else None
        if problem := on_gpu or ops.operands_problem(mode.name):
            raise RecipeError(f"run.kernels={mode.name} cannot run here: {problem}; use auto", key="run.kernels")
    if OPTIMIZERS[recipe.train.optimizer].paged and assembly.device == "cpu":
        fits = recipe.train.optimizer.removeprefix("paged_")
        raise RecipeError(
            f"{recipe.train.optimizer} moves its state out of the memory of a GPU, and this run is on the CPU; use {fits}",
            key="train.optimizer",
        )
    if recipe.eval.metrics is not None:
        check_metrics(recipe.eval.metrics, recipe.spec, bool(recipe.eval.choices))
    for name in recipe.run.log:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f"{name} is not installed; run: pip install 'peftlab[{name}]'", key="run.log")


def check_launch(assembly: Assembly) -> None:
    """Checks that a launch of several processes can do what the recipe asks. Raises: RecipeError."""
    if num_ranks() == 1:
        return
    recipe, distill = assembly.recipe, assembly.recipe.distill
    for variable, name in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        if is_set(f"ACCELERATE_USE_{variable}"):
            raise RecipeError(f"{name} is not supported; launch with --multi_gpu (DDP) or --use_fsdp --fsdp_version 2")
    if shards():
        _check_shards(assembly)
    if recipe.train.self_training is not None:
        check_one_process("self-training", key="train.self_training")
    if recipe.train.batch_norm == "trained":
        check_one_process("training the statistics of BatchNorm", key="train.batch_norm", remedy="set it to frozen")
    if distill is not None and distill.on_policy is not None:
        check_one_process("on-policy distillation", key="distill.on_policy")
    if distill is not None and distill.answers != "data":
        check_one_process("training on the teacher's answers", key="distill.answers")


def _check_shards(assembly: Assembly) -> None:
    """Checks that FSDP2 can train the recipe. Raises: RecipeError."""
    ddp = "launch without --use_fsdp, for DDP"
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise RecipeError(f"FSDP works in its version 2; launch with --fsdp_version 2, or {ddp}")
    for variable, name in (
        ("OFFLOAD_PARAMS", "offload_params"),
        ("ACTIVATION_CHECKPOINTING", "activation_checkpointing"),
    ):
        if is_set(f"FSDP_{variable}"):
            raise RecipeError(
                f"--fsdp_{name} is not supported; launch without it (train.gradient_checkpointing saves memory)"
            )
    recipe = assembly.recipe
    if assembly.storage != "none":
        raise RecipeError(f"FSDP2 does not shard {assembly.storage} weights; {ddp}", key="model.quantize")
    if names := [name for name in recipe.adapter.methods if name not in ("lora", "none")]:
        raise RecipeError(f"FSDP2 trains lora or none, found {names[0]}; {ddp}", key="adapter.method")
    if recipe.train.optimizer != "adamw":
        raise RecipeError(f"FSDP2 shards the state of adamw only; {ddp}", key="train.optimizer")
    if assembly.spec.contrasts and recipe.distill is None:
        raise RecipeError(f"FSDP2 does not compare the rows of a whole step; {ddp}", key="task")


def check_one_process(what: str, *, key: str, remedy: str = "start it without accelerate launch or torchrun") -> None:
    """Raises RecipeError for work that one process does, in a launch of several."""
    if num_ranks() > 1:
        raise RecipeError(f"{what} runs in one process, but the launch has {num_ranks()}; {remedy}", key=key)


def check_room_to_answer(max_new_tokens: int, assembly: Assembly, *, key: str | None = None) -> None:
    """Raises RecipeError if the answer length leaves no room for a prompt. Args: key: the recipe key of the answer length."""
    if assembly.spec.reads_source:
        if max_new_tokens > (most := assembly.target_limit):
            raise RecipeError(
                f"the model writes at most {most:,} tokens, found {max_new_tokens:,}; lower the answer's length",
                key=key,
            )
    elif assembly.spec.generates and max_new_tokens >= assembly.model_limit:
        raise RecipeError(
            f"the model reads at most {assembly.model_limit:,} tokens, which leaves no room for a prompt and an answer of "
            f"{max_new_tokens:,} tokens; lower the answer's length",
            key=key,
        )


def check_room(assembly: Assembly, model: Any, *, num_total: int, folder: Path) -> None:
    """Raises ResourceError if the disk has no room for what the run will write.

    Args: num_total: number of model parameters.
    """
    run = assembly.recipe.run
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    checkpoints = (run.keep + 1) * 3 * trained if run.save_every else 3 * trained
    merged = 4 * num_total if run.merge != "none" else 0
    needed = 2 * trained + checkpoints + merged + 2**20
    existing = existing_folder(folder)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ResourceError(
            f"the run needs about {needed / 2**20:,.0f} MiB in {existing}, but only {free / 2**20:,.0f} MiB are free; free "
            "disk space or choose another run.dir",
            key="run.dir",
        )
