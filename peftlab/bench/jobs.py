"""Runs a prepared cell: the gate, steps of the training loop, or generation."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.adapters import train_mode, without_adapter
from peftlab.adapters.fused import fusion_report, set_kernels
from peftlab.assembly.fit import input_casts
from peftlab.assembly.plan import loop_settings
from peftlab.bench.job import Job, Timing
from peftlab.errors import VerificationError
from peftlab.measuring import flops
from peftlab.measuring.ceilings import matmul_speed
from peftlab.measuring.energy import find_meter
from peftlab.measuring.stopwatch import Stopwatch
from peftlab.models import resolve_precision
from peftlab.tasks import Example
from peftlab.training.loop import TrainingLoop
from peftlab.training.metrics_log import MetricsLog
from peftlab.training.parity import check_parity, coarsest_dtype, woken

# Tokens of the compared prompt; its logits over the whole vocabulary exist at once.
_GATE_TOKENS = 64
# Maximum error of the logits, relative to the adapter's effect on them. In 16 bits, and if int8 rounds activations, an effect
# of a few percent is only accurate to about a fifth; a missing scale or adapter is off by a half or more.
_GATE_TOLERANCE = {"float32": 0.01, "rounded": 0.3}


def gate(job: Job) -> dict[str, Any]:
    """Checks the cell against PEFT's path and returns the needs of a step. Raises: VerificationError."""
    spec = job.spec
    if spec["what"] == "train":
        first = [job.rows[i] for i in job.plan.step(0).micro_batches[0]]
        with _casts(job):
            report = check_parity(
                job.model,
                job.task,
                first,
                planned=job.planned,
                kernels=job.recipe.run.kernels,
                device=job.accelerator.device,
                where=lambda row: f"row {row}",
                autocast=job.accelerator.autocast,
            )
        losses = {
            "loss": report.loss_fast,
            "loss_reference": report.loss_reference,
            "worst_cosine": report.worst_cosine,
        }
        step_flops = _training_flops(job)
    else:
        losses, step_flops = _generation_gate(job), _generation_flops(job)
    return {
        "num_trained": spec["num_trained"],
        "num_total": spec["num_total"],
        "flops_per_step": step_flops,
        **losses,
    }


def train(job: Job, folder: Path) -> dict[str, Any]:
    """Times steps of the training loop that ``peftlab train`` runs."""
    progress = Timing(job.device)
    with MetricsLog(folder / "metrics.jsonl") as log, _casts(job):
        TrainingLoop(
            model=job.model,
            task=job.task,
            train=job.rows,
            plan=job.plan,
            settings=loop_settings(job.assembly),
            accelerator=job.accelerator,
            folder=folder,
            log=log,
            progress=progress,
            where=lambda row: f"row {row}",
        ).run()
    rows = job.spec["batch"]
    return {
        **_figures(job, progress.watch, progress.joules),
        "losses": progress.losses,
        "micro_batches": progress.micro_batches,
        "rows_per_step": rows,
        "tokens_per_step": rows * len(job.rows[0]),
        "draws": any(isinstance(m, nn.Dropout) and m.p > 0 for m in job.model.modules()),
    }


def generate(job: Job) -> dict[str, Any]:
    """Times calls of ``model.generate`` with a fixed number of new tokens; a call is a step."""
    spec, watch = job.spec, Stopwatch(job.device)
    meter, _ = find_meter(job.device)
    rows, new_tokens = spec["batch"], spec["new_tokens"]
    names = _more_adapters(job, spec["adapters"])
    joules, lengths = [], []
    job.model.eval()
    watch.begin()
    for step in range(spec["steps"]):
        prompt = _prompt(job, step)
        with torch.no_grad(), job.accelerator.autocast():
            out = job.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=job.task.tokenizer.pad_token_id,
                **({"adapter_names": [names[i % len(names)] for i in range(rows)]} if len(names) > 1 else {}),
            )
        watch.tick()
        joules.append(meter.read() if meter else None)
        lengths.append(out.shape[1] - prompt.shape[1])
    watch.end()
    assert set(lengths) == {new_tokens}
    return {
        **_figures(job, watch, joules),
        "losses": [],
        "micro_batches": 1,
        "rows_per_step": rows,
        "tokens_per_step": rows * new_tokens,
        "draws": False,
    }


def _figures(job: Job, watch: Stopwatch, joules: list[float | None]) -> dict[str, Any]:
    warm_up = job.spec["warm_up"]
    meter, _ = find_meter(job.device)
    before, after = joules[warm_up - 1], joules[-1]
    used = meter.between(before, after) if meter and before is not None and after is not None else None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    fusion = fusion_report(job.model)
    return {
        "step_s": watch.step_seconds(warm_up),
        "memory": watch.memory(),
        "joules": used,
        "load": load,
        "num_fused": len(fusion.fused),
        "num_adapted": len(fusion.fused) + len(fusion.slow),
        "slow": sorted(set(fusion.slow.values())),
        # Measured again now: cells could seem to exceed ceilings that were measured on a busy machine.
        "matmul_flops_per_s": matmul_speed(job.device, resolve_precision(job.recipe.train.precision, job.device)),
    }


def _casts(job: Job) -> contextlib.AbstractContextManager[Any]:
    return input_casts(job.model, precision=job.accelerator.mixed_precision, adapts=job.assembly.method.adapts)


def _more_adapters(job: Job, number: int) -> list[str]:
    """Adds adapters of equal shape to the backbone until there are ``number``; returns their names."""
    names = ["default", *(f"adapter{i}" for i in range(2, number + 1))]
    for name in names[1:]:
        job.model.add_adapter(name, job.model.peft_config["default"])
    return names


def _prompt(job: Job, step: int) -> Tensor:
    rows = job.spec["batch"]
    batch: Tensor = job.task.collate(job.rows[step * rows : (step + 1) * rows], job.accelerator.device).input_ids
    return batch


def _generation_gate(job: Job) -> dict[str, Any]:
    """Compares the logits of a prompt on both paths, in evaluation mode with a nonzero adapter.

    The error is relative to the adapter's effect on the logits: a loss would hardly show a wrong scale.
    Raises: VerificationError.
    """
    prompt = _prompt(job, 0)[:2, :_GATE_TOKENS]
    dtype = coarsest_dtype(job.model, job.accelerator.autocast, job.accelerator.device)
    exact = dtype == torch.float32 and job.recipe.model.quantize != "int8" and job.recipe.run.kernels == "auto"
    allowed = _GATE_TOLERANCE["float32" if exact else "rounded"]

    def logits(kernels: str) -> Tensor:
        set_kernels(job.model, kernels)
        with torch.no_grad(), job.accelerator.autocast():
            output: Tensor = job.model(prompt, use_cache=False).logits
        return output.double()

    with woken(job.model):
        job.model.eval()
        with without_adapter(job.model) if job.planned else contextlib.nullcontext():
            without = logits("reference") if job.planned else None
        want, got = logits("reference"), logits(job.recipe.run.kernels)
    size = float(want.norm() if without is None else (want - without).norm())
    error = float((got - want).norm()) / max(size, 1e-30)
    if not error <= allowed:
        raise VerificationError(
            f"the logits of a prompt differ between the fused path and PEFT's by {error:.3g} of the adapter's effect on them "
            f"(allowed {allowed:g})"
        )
    return {"loss": None, "loss_reference": None, "worst_cosine": None, "logits_error": error}


@contextlib.contextmanager
def _own_path(job: Job) -> Iterator[Any]:
    """Switches to PEFT's path, whose layers can be counted; yields the task."""
    before = job.recipe.run.kernels
    set_kernels(job.model, "reference")
    try:
        yield job.assembly.derive({"run.kernels": "reference"}).task
    finally:
        set_kernels(job.model, before)


def _training_flops(job: Job) -> float:
    """FLOP per step, extrapolated from one row and two: a full step on PEFT's path may not fit in memory."""
    rows, length = job.spec["batch"], len(job.rows[0])
    with _own_path(job) as task, job.accelerator.autocast():
        train_mode(job.model)

        def count(number: int) -> flops.Counted:
            batch = task.collate(_repeated(job, number), job.accelerator.device)
            return flops.count_linears(job.model, lambda: task.loss_sum(job.model, batch))

        linears = flops.of_rows(count(1), count(2), rows)
    if job.recipe.train.gradient_checkpointing:
        linears = flops.Counted(linears.forward, linears.backward + linears.forward)
    return flops.training_flops(linears, rows=rows, length=length, width=flops.attention_width(job.model.config))


def _generation_flops(job: Job) -> float:
    spec = job.spec
    ids = job.task.collate(_repeated(job, 2), job.accelerator.device).input_ids
    with _own_path(job), torch.no_grad(), job.accelerator.autocast():
        job.model.eval()

        def count(tokens: Tensor) -> flops.Counted:
            return flops.count_linears(job.model, lambda: job.model(tokens, use_cache=False, logits_to_keep=1))

        prompt = flops.of_rows(count(ids[:1]), count(ids), spec["batch"])
        token = flops.of_rows(count(ids[:1, :1]), count(ids[:, :1]), spec["batch"])
    return flops.generation_flops(
        prompt,
        token,
        rows=spec["batch"],
        length=spec["length"],
        new_tokens=spec["new_tokens"],
        width=flops.attention_width(job.model.config),
    )


def _repeated(job: Job, number: int) -> list[Example]:
    return [job.rows[i % len(job.rows)] for i in range(number)]
