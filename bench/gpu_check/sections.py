"""gpu-check: its sections in running order, and the sections that each figure depends on (``stands_on``).

The first wave checks the ops that it times, then times losses, NF4 linears at 8,192 rows and whole steps. The second wave has
the rest. A section waits for those that it depends on, and later sections keep their reserved time (``least``).
``tests``, ``tiny models``, ``smoke recipe`` and ``tasks`` combine ops, so their red rows do not show which op is wrong: no figure depends
on them. No figure depends on ``small adapters, masks, determinism`` either. The sections of ``lora_linear`` already compare
every output and gradient with float64 under the same masks. The additional promises of those rows (equal bytes, little loss
of a small adapter) have their own claims and do not change what is timed.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

from peftlab_kernels.cases import case_files

from bench.gpu_check.base import Device, Section, Task

RECIPES = ("bitsandbytes", "peft", "accelerate", "pydantic", "datasets", "evaluate", "sklearn")
LAYERS = ("bitsandbytes", "peft")
LINEARS = ("dequant", "lora_linear bfloat16")
STEPS = (*LINEARS, "linear losses")

SECTIONS = [
    Section("dequant", "dequant", "bench.gpu_check.dequant:dequant_correctness", 180),
    *[
        Section(
            f"lora_linear {dtype}",
            f"lora {dtype}",
            f"bench.gpu_check.linears:lora_correctness:{dtype}",
            seconds,
            uses=("bitsandbytes",),
            wave=wave,
        )
        for dtype, seconds, wave in (("bfloat16", 240, 1), ("float16", 150, 1), ("float32", 150, 2))
    ],
    Section(
        "small adapters, masks, determinism",
        "behaviour",
        "bench.gpu_check.behaviour:adapter_behaviour",
        120,
        uses=("bitsandbytes",),
    ),
    Section("linear losses", "losses", "bench.gpu_check.losses:loss_correctness", 120),
    Section("distillation", "kd", "bench.gpu_check.distillation:distillation", 120, needs=("peft",)),
    Section("ceilings", "ops", "bench.gpu_check.dequant_speed:ceilings", 15, least=10, timing=True),
    Section(
        "loss speed",
        "ops",
        "bench.gpu_check.loss_speed:loss_speed:first",
        80,
        least=45,
        uses=("liger_kernel",),
        timing=True,
        stands_on=("linear losses",),
    ),
    Section(
        "NF4 linears, 8,192 rows",
        "ops",
        "bench.gpu_check.linear_speed:lora_speed:first",
        60,
        least=40,
        needs=LAYERS,
        timing=True,
        stands_on=LINEARS,
    ),
    Section(
        "training steps",
        "steps",
        "bench.gpu_check.training_steps:training_steps",
        140,
        least=60,
        needs=LAYERS,
        timing=True,
        stands_on=STEPS,
    ),
    Section(
        "distillation steps",
        "steps",
        "bench.gpu_check.distillation_steps:distillation_steps",
        70,
        needs=LAYERS,
        timing=True,
        stands_on=(*STEPS, "distillation"),
    ),
    Section("tiny models", "models", "bench.gpu_check.models:tiny_models", 90, wave=2, needs=LAYERS),
    Section("tests", "tests", "bench.gpu_check.models:gpu_tests", 170, wave=2, needs=("pytest", *LAYERS)),
    Section("smoke recipe", "recipe", "bench.gpu_check.models:smoke_recipe", 120, wave=2, needs=RECIPES),
    Section("tasks", "tasks", "bench.gpu_check.tasks:every_task", 120, wave=2, needs=RECIPES),
    Section(
        "dequant speed",
        "more ops",
        "bench.gpu_check.dequant_speed:dequant_speed",
        45,
        wave=2,
        needs=("bitsandbytes",),
        timing=True,
        stands_on=("dequant",),
    ),
    Section(
        "lora_linear speed",
        "more ops",
        "bench.gpu_check.linear_speed:lora_speed:rest",
        150,
        wave=2,
        needs=LAYERS,
        timing=True,
        stands_on=LINEARS,
    ),
    Section("order of addition", "more ops", "bench.gpu_check.checks:times_of:lora_linear", 12, wave=2, timing=True),
    Section(
        "training loop",
        "loop",
        "bench.gpu_check.training_loop:recipe_speed",
        60,
        wave=2,
        needs=RECIPES,
        timing=True,
        stands_on=STEPS,
    ),
    Section(
        "loss speed, compiled",
        "compiled",
        "bench.gpu_check.loss_speed:loss_speed:compiled",
        90,
        wave=2,
        uses=("liger_kernel", "quack", "cutlass"),
        timing=True,
        stands_on=("linear losses",),
    ),
    Section(
        "unsloth",
        "unsloth",
        "bench.gpu_check.unsloth:unsloth_speed",
        60,
        wave=2,
        needs=("unsloth", *LAYERS),
        timing=True,
        stands_on=LINEARS,
    ),
    Section(
        "healing",
        "healing",
        "bench.gpu_check.healing:healing",
        480,
        wave=2,
        needs=RECIPES,
        timing=True,
        stands_on=("linear losses", "distillation"),
        only_by_name=True,
    ),
]


def functions_of(file: Path) -> set[str]:
    """Names of the functions in a file, from its syntax tree: importing cases.py would import torch, which takes seconds."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def sections_of_ops() -> list[Section]:
    """Sections of every op that has its own rows in cases.py and is not in the schedule above."""
    placed, sections = {word for section in SECTIONS for word in section.source.split(":")}, []
    for op, file in case_files().items():
        rows = functions_of(file) if op not in placed else set()
        checked = (op,) if "checks" in rows else ()
        if checked:
            sections.append(Section(op, op, f"bench.gpu_check.checks:checks_of:{op}", 60))
        if "times" in rows:
            source = f"bench.gpu_check.checks:times_of:{op}"
            sections.append(Section(f"{op} speed", "more ops", source, 60, wave=2, timing=True, stands_on=checked))
    return sections


SECTIONS += sections_of_ops()
BY_NAME = {section.name: section for section in SECTIONS}
PACKAGES = {name for section in SECTIONS for name in (*section.needs, *section.uses)}


def with_what_they_stand_on(names: set[str]) -> set[str]:
    return names | {gate for name in names for gate in BY_NAME[name].stands_on}


def tasks_of(section: Section, device: Device) -> Iterator[Task]:
    module, name, *arguments = section.source.split(":")
    tasks: Iterator[Task] = getattr(importlib.import_module(module), name)(device, *arguments)
    return tasks
