"""gpu-check: its sections, in the order of their priority."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from _gpu_base import Device, Section, Task

RECIPES = ("bitsandbytes", "peft", "accelerate", "pydantic", "datasets", "evaluate", "sklearn")

SECTIONS = [
    Section("dequant", "dequant", "_gpu_kernels:dequant_correctness", 120, gate=True),
    *[
        Section(f"lora_linear {dtype}", f"lora {dtype}", f"_gpu_lora:lora_correctness:{dtype}", 150, gate=True)
        for dtype in ("bfloat16", "float16", "float32")
    ],
    Section("small adapters, masks, determinism", "behaviour", "_gpu_behaviour:adapter_behaviour", 120, gate=True),
    Section("linear losses", "losses", "_gpu_models:loss_correctness", 60, gate=True),
    Section("distillation", "kd", "_gpu_kd:distillation", 90, ("peft",)),
    Section("tiny models", "models", "_gpu_models:tiny_models", 90, ("bitsandbytes", "peft")),
    Section("tests", "tests", "_gpu_models:gpu_tests", 170, ("pytest", "bitsandbytes", "peft")),
    Section("smoke recipe", "recipe", "_gpu_models:smoke_recipe", 120, RECIPES),
    Section("ceilings", "ops", "_gpu_speed:ceilings", 15, timing=True),
    Section("dequant speed", "ops", "_gpu_speed:dequant_speed", 45, ("bitsandbytes",), timing=True),
    Section("lora_linear speed", "ops", "_gpu_lora_speed:lora_speed", 170, ("bitsandbytes", "peft"), timing=True),
    Section("order of addition", "ops", "_gpu_speed:addition_order", 12, timing=True),
    Section("loss speed", "ops", "_gpu_loss_speed:loss_speed", 60, timing=True),
    Section("training steps", "steps", "_gpu_steps:training_steps", 140, ("bitsandbytes", "peft"), timing=True),
    Section(
        "distillation steps", "steps", "_gpu_kd_steps:distillation_steps", 70, ("bitsandbytes", "peft"), timing=True
    ),
    Section("training loop", "rest", "_gpu_loss_speed:recipe_speed", 60, RECIPES, timing=True),
    Section("unsloth", "unsloth", "_gpu_unsloth:unsloth_speed", 40, ("unsloth", "bitsandbytes", "peft"), timing=True),
    Section("healing", "healing", "_gpu_heal:healing", 480, RECIPES, timing=True, asked=True),
]


def tasks_of(section: Section, device: Device) -> Iterator[Task]:
    module, name, *arguments = section.source.split(":")
    tasks: Iterator[Task] = getattr(importlib.import_module(module), name)(device, *arguments)
    return tasks
