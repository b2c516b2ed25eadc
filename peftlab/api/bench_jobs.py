"""What is done with a cell once it is ready: the gate, steps of the training loop, or generating."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftlab.adapters.fused import fusion_report, set_kernels
from peftlab.api import build
from peftlab.api.training import input_casts
from peftlab.bench import flops
from peftlab.bench.ceilings import wait
from peftlab.bench.energy import find_meter
from peftlab.errors import VerificationError
from peftlab.tasks import Encoded
from peftlab.training.loop import LoopSettings, TrainingLoop
from peftlab.training.metrics_log import MetricsLog
from peftlab.training.parity import TOLERANCES, check_parity, coarsest_dtype, woken
from peftlab.training.progress import SilentProgress
from peftlab.training.stopwatch import Stopwatch

if TYPE_CHECKING:
    from peftlab.api.bench_worker import Job


def gate(job: Job) -> dict[str, Any]:
    """Whether the cell computes what PEFT's path computes, and what a step needs. Raises: VerificationError."""
    spec = job.spec
    if spec["what"] == "train":
        first = [job.rows[i] for i in job.plan.step(0).micro_batches[0]]
        with _casts(job):
            found = check_parity(
                job.model,
                job.task,
                first,
                planned=job.planned,
                kernels=job.recipe.run.kernels,
                device=job.accelerator.device,
                where=lambda row: f"row {row}",
                autocast=job.accelerator.autocast,
            )
        losses = {"loss": found.loss_fast, "loss_reference": found.loss_reference, "worst_cosine": found.worst_cosine}
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
    """Steps of the training loop, as ``peftlab train`` runs it."""
    t = job.recipe.train
    progress = _Timing(job.device)
    with MetricsLog(folder / "metrics.jsonl") as log, _casts(job):
        TrainingLoop(
            model=job.model,
            task=job.task,
            train=Encoded(job.rows, None),  # type: ignore[arg-type]
            plan=job.plan,
            settings=LoopSettings(
                lr=t.lr,
                schedule=t.schedule,
                warmup=t.warmup,
                weight_decay=t.weight_decay,
                betas=t.betas,
                max_grad_norm=t.max_grad_norm,
            ),
            accelerator=job.accelerator,
            folder=folder,
            log=log,
            progress=progress,
            where=lambda row: f"row {row}",
        ).run()
    progress.watch.end()
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
    """Calls of ``model.generate`` with a fixed number of new tokens; a call is a step."""
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


class _Timing(SilentProgress):
    """Takes times, losses and energy of the loop."""

    def __init__(self, device: str) -> None:
        self.watch, self.losses, self.micro_batches = Stopwatch(device), list[float](), 0
        self.joules: list[float | None] = []
        self._meter, _ = find_meter(device)

    def start(self, total_steps: int, first_step: int = 0) -> None:
        self.watch.begin()

    def step(self, step: int, values: Mapping[str, float | None]) -> None:
        self.watch.tick()
        self.joules.append(self._meter.read() if self._meter else None)
        self.losses.append(float(values["loss"] or 0.0))
        self.micro_batches = int(values["micro_batches"] or 0)


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
    }


def _casts(job: Job) -> contextlib.AbstractContextManager[Any]:
    return input_casts(job.model, precision=job.accelerator.mixed_precision, method=job.recipe.adapter.method)


def _more_adapters(job: Job, number: int) -> list[str]:
    """Names of ``number`` adapters on the one backbone, of the same shape."""
    names = ["default", *(f"adapter{i}" for i in range(2, number + 1))]
    for name in names[1:]:
        job.model.add_adapter(name, job.model.peft_config["default"])
    return names


def _prompt(job: Job, step: int) -> Tensor:
    rows = job.spec["batch"]
    batch: Tensor = job.task.collate(job.rows[step * rows : (step + 1) * rows], job.accelerator.device).input_ids
    return batch


def _generation_gate(job: Job) -> dict[str, Any]:
    """The mean loss of the prompts on both paths, in evaluation mode. Raises: VerificationError."""
    rows = job.rows[: min(job.spec["batch"], 2)]
    weight = sum(e.weight for e in rows)
    losses = {}
    with woken(job.model):
        job.model.eval()
        for kernels in ("reference", job.recipe.run.kernels):
            set_kernels(job.model, kernels)
            with torch.no_grad(), job.accelerator.autocast():
                batch = job.task.collate(rows, job.accelerator.device)
                losses[kernels] = float(job.task.loss_sum(job.model, batch)) / weight
    want, got = losses["reference"], losses[job.recipe.run.kernels]
    dtype = coarsest_dtype(job.model, job.accelerator.autocast, job.accelerator.device)
    allowed = TOLERANCES[dtype].loss
    if math.isfinite(want) and not abs(got - want) <= allowed * max(abs(want), 1e-3):
        raise VerificationError(
            f"the loss of the prompts is {got:.6g} on the fused path and {want:.6g} on PEFT's (allowed difference {allowed:g}, "
            "relative)"
        )
    return {"loss": got, "loss_reference": want, "worst_cosine": None}


@contextlib.contextmanager
def _own_path(job: Job) -> Iterator[Any]:
    """The task with everything on PEFT's path, whose layers can be counted."""
    before = job.recipe.run.kernels
    recipe = job.recipe.model_copy(update={"run": job.recipe.run.model_copy(update={"kernels": "reference"})})
    set_kernels(job.model, "reference")
    try:
        yield build.build_task(recipe, job.task.tokenizer, None, classes=job.spec["classes"])
    finally:
        set_kernels(job.model, before)


def _training_flops(job: Job) -> float:
    length = len(job.rows[0])
    with _own_path(job) as task, job.accelerator.autocast():
        job.model.train()
        batch = task.collate(job.rows[:1], job.accelerator.device)
        counted = flops.count_linears(job.model, lambda: task.loss_sum(job.model, batch))
    if job.recipe.train.gradient_checkpointing:
        counted = flops.Counted(counted.forward, counted.backward + counted.forward)
    width = flops.attention_width(job.model.config)
    return flops.training_flops(counted, rows=job.spec["batch"], length=length, width=width)


def _generation_flops(job: Job) -> float:
    prompt = _prompt(job, 0)[:1]
    with _own_path(job), torch.no_grad(), job.accelerator.autocast():
        job.model.eval()
        whole = flops.count_linears(job.model, lambda: job.model(prompt, use_cache=False, logits_to_keep=1))
        token = flops.count_linears(job.model, lambda: job.model(prompt[:, :1], use_cache=False, logits_to_keep=1))
    wait(job.device)
    spec = job.spec
    return flops.generation_flops(
        whole,
        token,
        rows=spec["batch"],
        length=spec["length"],
        new_tokens=spec["new_tokens"],
        width=flops.attention_width(job.model.config),
    )
