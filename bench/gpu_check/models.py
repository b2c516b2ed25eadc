"""gpu-check: whole tiny models on CUDA, the smoke recipe, and the tests that run on a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import ROOT
from bench.gpu_check.base import Deadline, Device, Row, Task

if TYPE_CHECKING:
    from peftlab.evaluation.agreement import Agreement

TESTS = ["tests/ops", "tests/adapters/test_fused.py"]
DRY_TESTS = ["tests/ops/test_linear_losses.py", "-k", "do_not_change_their_inputs"]
# The first compiles for absent GPUs, with the pinned Triton; slow tests train real models.
NOT_HERE = ("--ignore=tests/ops/test_compiled_kernels.py", "-m", "not slow")


def tiny_models(device: Device) -> Iterator[Task]:
    """Loads a tiny model, trains a step on the fused path, and compares it with PEFT's own layers under the same dropout masks."""
    for quantize in ("none", "nf4", "int8"):
        for dropout in (0.0, 0.2):
            what = {"check": "a training step against PEFT's layers", "quantize": quantize, "dropout": dropout}
            yield Task(what, partial(_tiny_step, device, quantize, dropout), seconds=5)


def _tiny_step(device: Device, quantize: str, dropout: float) -> Row:
    import torch

    from peftlab import ops
    from peftlab.adapters import inject
    from peftlab.adapters.fused import fusion_report, set_kernels
    from peftlab.models import find_pretrained, load_model
    from peftlab.training.parity import TOLERANCES

    ids = torch.randint(4, 200, (4, 24), device=device.kind)
    model = load_model(
        find_pretrained("tiny:llama"), auto_class="AutoModelForCausalLM", device=device.kind, quantize=quantize
    )
    model = inject(model, "lora", peft_type="CAUSAL_LM", rank=4, alpha=8, dropout=dropout).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def step(kernels: str) -> tuple[float, list[Any]]:
        set_kernels(model, kernels)
        torch.manual_seed(0)
        cast = contextlib.nullcontext() if device.dry else torch.autocast("cuda", torch.bfloat16)
        with cast:
            loss = model(input_ids=ids, labels=ids).loss
        return float(loss.detach()), list(torch.autograd.grad(loss, list(trained.values())))

    want = step("compared")
    with ops.int8_by_library():  # PEFT's layer rounds rows of x to 8 bits on a GPU; the plan may not round them
        got = step("auto")
    report = fusion_report(model)
    limits = TOLERANCES[torch.float32 if device.dry else torch.bfloat16]
    cosines = [float(torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))
               for a, b in zip(got[1], want[1], strict=True)]  # fmt: skip
    norms = [abs(float(a.norm() / b.norm()) - 1) for a, b in zip(got[1], want[1], strict=True)]
    loss = abs(got[0] - want[0]) / abs(want[0])
    agree = loss <= limits.loss and min(cosines) >= limits.cosine and max(norms) <= limits.norm
    return {
        "loss": got[0],
        "loss_of_peft": want[0],
        "lowest_cosine": min(cosines),
        "largest_norm_difference": max(norms),
        "fused_modules": len(report.fused),
        "slow": report.slow,
        "ok": agree and not report.slow,
    }


def smoke_recipe(device: Device) -> Iterator[Task]:
    """Trains, merges, verifies and opens again on the CPU, with the parity gate. The same recipe twice gives the same bytes."""
    for quantize in device.pick(("none", "nf4", "int8"), ("none",)):
        what = {"check": "smoke recipe", "quantize": quantize}
        yield Task(what, partial(_smoke, device, quantize), seconds=20)


def _smoke(device: Device, quantize: str) -> Row:
    import peftlab

    merge = "original" if quantize == "none" else "dequantized"
    # A path finds the data even if peftlab is not installed.
    changes = [
        f"data.train={ROOT}/recipes/smoke.jsonl",
        f"model.quantize={quantize}",
        f"run.merge={merge}",
        f"run.device={device.kind}",
    ]
    changes += device.pick([], ["train.max_steps=1", "eval.before=false", "eval.prompts=[]", "data.eval_rows=4"])
    with tempfile.TemporaryDirectory() as folder:
        runs = [peftlab.train("smoke", [f"run.dir={folder}/{i}", *changes]) for i in range(2)]
        same = len({(r.adapter / "adapter_model.safetensors").read_bytes() for r in runs}) == 1
        summary = runs[0].summary
        on_cpu = agreement_on_cpu(runs[0].folder)
    parity = summary["parity"]
    return {
        "accuracy": summary["after"]["accuracy"],
        "merge": summary["merge"]["targets"][merge]["logits"],
        "witness_on_cpu": asdict(on_cpu),
        "same_bytes_twice": same,
        "fused": [parity["num_fused"], parity["num_adapted"]],
        "ok": same and summary["merge"]["verified"] and parity["num_fused"] == parity["num_adapted"],
    }


def agreement_on_cpu(run: Path) -> Agreement:
    """How the run, opened on the CPU, agrees with the model in training."""
    from peftlab.assembly.target import find_target, open_target
    from peftlab.assembly.witness import read_witness
    from peftlab.training.progress import SilentProgress

    opened = open_target(find_target(run, overrides=["run.device=cpu"]), SilentProgress())
    witness = read_witness(run)
    assert witness is not None
    batch_tokens = opened.target.loaded.recipe.eval.batch_tokens
    return witness.compare(opened.model, opened.task, batch_tokens=batch_tokens, device="cpu")


def gpu_tests(device: Device) -> Iterator[Task]:
    """The tests of the kernels and of the fused layers, with Triton on the GPU."""
    yield Task({"check": "pytest", "tests": TESTS}, partial(_tests, device))


def _tests(device: Device) -> Row:
    limit_s = Deadline(device.shared.get("until", 0)).left() - 5
    workers = ["-n", "6"] if importlib.util.find_spec("xdist") and not device.dry else []
    chosen = device.pick(TESTS, DRY_TESTS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=line",
        *NOT_HERE,
        *workers,
        *chosen,
    ]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" or device.dry}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT) as pytest:
            try:
                code: int | None = pytest.wait(timeout=max(limit_s, 1))
            except subprocess.TimeoutExpired:
                pytest.kill()
                code = None
        output.seek(0)
        text = output.read()
    counts = {word.rstrip("s") if "error" in word else word: int(n) for n, word in re.findall(
        r"(\d+) (passed|failed|skipped|errors?|xfailed)\b", text.strip().rpartition("\n")[2])}  # fmt: skip
    bad = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, flags=re.MULTILINE)
    row: Row = {"exit_code": code, "counts": counts, "bad": bad[:20], "workers": len(workers) and 6}
    if code is None:  # stopped by the time limit: failures so far are red, the rest is unknown
        progress = "".join(re.findall(r"^([.FEsxX]+)(?: *\[ *\d+%\])?$", text, flags=re.MULTILINE))
        row["counts"] = {"passed": progress.count("."), "failed": sum(map(progress.count, "FE"))}
        red = row["counts"]["failed"] > 0
        return {**row, "stopped": f"not finished in {limit_s:.0f} s", "ok": False if red else None}
    return {**row, "output": text.strip()[-2000:] if code else "", "ok": code == 0}
