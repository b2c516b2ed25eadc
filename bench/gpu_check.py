"""``make gpu-check``: what a machine with a CUDA device can confirm, in priority order, each row written when measured.

    python bench/gpu_check.py [--out DIR] [--minutes 9] [--skip SECTION ...] [--only SECTION ...] [--dry-run-cpu]

First correctness on CUDA: every kernel in float32, float16 and bfloat16 against float64, whole tiny models, the tests. A
red row there ends the run before any timing. Then the ops against bitsandbytes and PEFT, then training steps of an 8B
model and of its distillation, then the training loop. ``healing`` takes minutes of its own and runs when --only names it.
Nothing is downloaded; what an absent package would be needed for is said and left out.

Rows go to ``DIR/gpu_check.jsonl`` (default bench/results): ``ok`` true, false or null (not run), ``met`` for targets,
``above_limit`` for figures beyond what the hardware can do. Groups of sections run in processes of their own, those
without timing side by side: a crash of one costs its rows only. ``--dry-run-cpu`` runs the same code on a CPU, in
Triton's interpreter, at shapes that prove nothing but that it runs.

Exit codes: 0 no row is red, 2 no CUDA device, 6 at least one row is red.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from _gpu_base import Deadline, Device, Row, Section, Task
from _gpu_conduct import Conductor
from _gpu_report import summary

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
VERSIONS = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "liger-kernel", "unsloth")
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
    Section(
        "unsloth", "unsloth", "_gpu_lora_speed:unsloth_speed", 40, ("unsloth", "bitsandbytes", "peft"), timing=True
    ),
    Section("healing", "healing", "_gpu_heal:healing", 480, RECIPES, timing=True, asked=True),
]


class Rows:
    """Appends rows to the file that all processes share; what each row carries is read once."""

    def __init__(self, path: Path, device: Device) -> None:
        self.path, self.device = path, device
        self._stamp: Row | None = None

    def write(self, section: str, row: Row) -> None:
        if self._stamp is None:
            self._stamp = stamp(self.device)
        line = json.dumps({"section": section, **row, **self._stamp}, default=str)
        with self.path.open("a", encoding="utf-8") as stream:  # one short write in append mode stays whole
            stream.write(line + "\n")


def stamp(device: Device) -> Row:
    """Machine and versions."""
    import importlib.metadata as metadata

    import torch

    versions = {}
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    if device.dry:
        return {"device": "cpu (dry run)", "versions": versions}
    properties = torch.cuda.get_device_properties(0)
    return {"device": properties.name, "capability": f"sm_{properties.major}{properties.minor}", "versions": versions}


def run_group(sections: list[Section], rows: Rows, deadline: Deadline) -> None:
    """In a process of its own: every task of every section; an exception becomes a red row."""
    broken = ""
    for section in sections:
        missing = [name for name in section.needs if importlib.util.find_spec(name) is None]
        if missing or broken:
            reason = broken or f"not installed: {', '.join(missing)}"
            rows.write(section.name, {"not_run": reason, "ok": False if section.gate else None})
            continue
        broken = _run_section(section, rows, deadline.part(section.seconds))
        if not broken:
            rows.device.release()


def _run_section(section: Section, rows: Rows, deadline: Deadline) -> str:
    """What made the device unusable for the rest of the process, or nothing."""
    device = rows.device
    device.found["until"] = deadline.until
    left_out: list[Row] = []
    try:
        for task in tasks_of(section, device):
            if deadline.left() < task.seconds:
                left_out.append(task.what)
                continue
            started = time.perf_counter()
            try:
                found = task.run()
                device.synchronize()
            except Exception as error:  # of any kind: the other rows are worth having too
                found = {"failed": _told(error), "ok": False}
            seconds = round(time.perf_counter() - started, 3)
            for row in found if isinstance(found, list) else [found]:
                if device.dry:  # its figures mean nothing
                    row |= {key: None for key in ("target", "met", "held_met") if key in row}
                rows.write(section.name, {"ok": True, **task.what, **row, "seconds": seconds})
            if broken := _broken(device, found):
                return broken
    except Exception as error:
        rows.write(section.name, {"failed": _told(error), "ok": False})
    if left_out:
        row = {"stopped": f"{len(left_out)} rows did not fit the time", "left_out": left_out[:40]}
        rows.write(section.name, {**row, "ok": False if section.gate else None})
    return ""


def tasks_of(section: Section, device: Device) -> Iterator[Task]:
    module, name, *arguments = section.source.split(":")
    tasks: Iterator[Task] = getattr(importlib.import_module(module), name)(device, *arguments)
    return tasks


def _told(error: Exception) -> str:
    lines = traceback.format_exception(error)
    return f"{type(error).__name__}: {error}"[:1500] + "\n" + "".join(lines[-4:])[-1500:]


def _broken(device: Device, found: Any) -> str:
    """After a failure: whether CUDA still answers. An illegal access breaks it for the rest of the process."""
    if not (isinstance(found, dict) and "failed" in found):
        return ""
    try:
        device.release()
        device.synchronize()
    except Exception as error:
        return f"CUDA is unusable after a failure in this process: {error}".splitlines()[0]
    return ""


def has_cuda() -> bool:
    """Asked in another process: this one stays without a CUDA context."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


def chosen_sections(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Section]:
    names = [s.name for s in SECTIONS]
    if unknown := sorted({*options.only, *options.skip} - set(names)):
        parser.error(f"no section is called {', '.join(unknown)}; there are {', '.join(names)}")
    usual = {s.name for s in SECTIONS if not s.asked}
    chosen = [s for s in SECTIONS if s.name in (options.only or usual) and s.name not in options.skip]
    if not options.dry_run_cpu:
        return chosen
    # On few cores importing the libraries is most of it: two processes for correctness, then one.
    models = ("models", "tests", "recipe", "kd")
    return [replace(s, group="timing" if s.timing else "models" if s.group in models else "kernels") for s in chosen]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--minutes", type=float, default=9.0, help="the whole ends within this time")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="these sections and no other")
    parser.add_argument("--skip", nargs="+", default=[], metavar="SECTION", help="all sections but these")
    parser.add_argument("--dry-run-cpu", action="store_true", help="the same code on a CPU at tiny shapes")
    parser.add_argument("--child", type=float, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    deadline, sections = Deadline(time.time() + 60 * options.minutes), chosen_sections(options, parser)
    if options.dry_run_cpu:
        # Triton reads the first when a kernel is defined; more threads than that only wait for each other.
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    path = options.out / "gpu_check.jsonl"
    if options.child is not None:
        device = Device("cpu" if options.dry_run_cpu else "cuda")
        run_group(sections, Rows(path, device), Deadline(options.child))
        return 0
    if not options.dry_run_cpu and not has_cuda():
        print("gpu-check needs a CUDA device, and torch finds none; nothing was checked", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    path.write_text("", encoding="utf-8")
    conductor = Conductor(path, sections, deadline, dry=options.dry_run_cpu)
    conductor.run()
    rows = conductor.rows()
    print(summary(rows, seconds=60 * options.minutes - deadline.left()), file=sys.stderr)
    return 6 if any(row["ok"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
