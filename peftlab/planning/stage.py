"""A recipe's model as it will be trained, without weights, and the passes of a step over it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.adapters.fused import FusedLora
from peftlab.assembly import Assembly
from peftlab.assembly.fit import input_casts
from peftlab.assembly.prepare import trainable
from peftlab.data import BatchPlan
from peftlab.models import base_model, quiet
from peftlab.planning.phantoms import Building, load_phantom, one_stack, stored_tensors, tensor_bytes
from peftlab.planning.rehearsal import CudaAutocast, Peak, Rehearsal
from peftlab.tasks import Batch, Example, Redraws, collate_packed
from peftlab.training.loop import LossModule, LossSum

_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


@dataclass(frozen=True)
class Machine:
    """Where a run is planned. Attributes: device: ``cpu`` or ``cuda``. gpu_bytes: memory of the GPU; None: unknown, or a CPU."""

    device: str
    gpu_bytes: int | None = None

    def dtype(self, name: str) -> torch.dtype:
        """What ``auto`` is here. A GPU is taken to compute in bfloat16."""
        dtype: torch.dtype = _DTYPES[self.device] if name == "auto" else getattr(torch, name)
        return dtype


class Stage:
    """The model of a recipe as phantoms.

    Attributes: model: with its adapter, in training mode. report: what is trained.
    Args: num_layers: keep only the first layers, see ``load_phantom``.
    """

    def __init__(self, assembly: Assembly, machine: Machine, num_layers: int | None = None) -> None:
        self.assembly, self.machine = assembly, machine
        recipe = assembly.recipe
        own = recipe.model
        full = not assembly.method.adapts and own.dtype == "auto"
        base = load_phantom(
            assembly.pretrained,
            auto_class=assembly.spec.auto_class,
            quantize=assembly.storage,
            double_quant=own.double_quant,
            compute_dtype=machine.dtype(own.compute_dtype),
            dtype=torch.float32 if full else machine.dtype(own.dtype),
            attention=own.attention,
            resize_token_embeddings=_num_rows(assembly),
            num_layers=num_layers,
            **assembly.task.model_kwargs(),
        )
        with Building():  # type: ignore[no-untyped-call]
            self.model, _, self.report = trainable(_startable(assembly), base)
        self.model.train()
        self._masks = _without_dropout(self.model)

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks that gradient checkpointing recomputes."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]

    @property
    def is_uniform(self) -> bool:
        """Whether its layers are alike, and adapted alike."""
        a = self.assembly.recipe.adapter
        names = [a.targets] if isinstance(a.targets, str) else a.targets or []
        chosen = a.layers is not None or a.patterns or a.beside or any(c.isdigit() for name in names for c in name)
        return not chosen and one_stack(base_model(self.model)) is not None

    def checkpoint(self) -> int:
        """Turns gradient checkpointing on; returns the number of layers. Raises: ValueError, NotImplementedError."""
        with quiet():
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return len(self.layers)

    def held(self) -> tuple[int, int]:
        """Bytes of the frozen and of the trained tensors."""
        trained = {p.untyped_storage()._cdata for p in self.model.parameters() if p.requires_grad}
        sums = [0, 0]
        for _, tensor in stored_tensors(self.model):
            sums[tensor.untyped_storage()._cdata in trained] += tensor_bytes(tensor)
        return sums[0], sums[1]

    def trained_sizes(self) -> list[int]:
        return [p.numel() for p in self.model.parameters() if p.requires_grad]

    def train(
        self, examples: list[Example], *, packed: bool, again: bool, loss: LossSum | None = None, others: Any = ()
    ) -> Peak:
        """The peak of a forward and backward pass, beyond the model's own tensors.

        Args: again: with the gradients of an earlier micro-batch. loss: default the task's. others: other models that take part.
        """
        rehearsal = Rehearsal(self.model, *others, gpu_bytes=self.machine.gpu_bytes)
        task, module = self.assembly.task, LossModule(self.model, loss or self.assembly.task.loss_sum)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p: rehearsal.relabel([p.grad], "gradients")) for p in trained
        ]
        try:
            with self._passes(rehearsal), self._parts(rehearsal), self._drawn(rehearsal):
                batch = collate_packed(examples, device="cpu") if packed else task.collate(examples, "cpu")
                with torch.no_grad():
                    task.outputs(self.model, _first(task, examples, packed))  # checks that run once
                rehearsal.start()
                module(batch).backward()
                peak = rehearsal.peak
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in trained:
                parameter.grad = None
        if again:
            gradients = sum(tensor_bytes(p) for p in trained)
            peak = Peak(peak.total - peak.parts.get("gradients", 0) + gradients, peak.parts | {"gradients": gradients})
        return peak

    def evaluate(self, examples: list[Example]) -> Peak:
        """The peak of the outputs and losses of a batch, without gradients."""
        rehearsal = Rehearsal(self.model, gpu_bytes=self.machine.gpu_bytes)
        task = self.assembly.task
        self.model.eval()
        for module in self.model.modules():
            if type(module).__name__ == "Linear8bitLt":
                module.training = True  # dequantizes, as in training
        try:
            with self._passes(rehearsal), self._parts(rehearsal), torch.no_grad():
                batch = task.collate(examples, "cpu")
                task.outputs(self.model, _first(task, examples, False))
                rehearsal.start()
                try:
                    task.score(self.model, batch)
                except (RuntimeError, TypeError):  # it reads values, which there are none of, after the outputs
                    outputs = task.outputs(self.model, batch)
                    del outputs
                return rehearsal.peak
        finally:
            self.model.train()

    @contextlib.contextmanager
    def _passes(self, rehearsal: Rehearsal) -> Iterator[None]:
        recipe = self.assembly.recipe
        dtype = self.machine.dtype(recipe.train.precision)
        precision = "no" if dtype == torch.float32 else "bf16"
        autocast = torch.autocast("cpu", dtype=dtype, enabled=precision != "no", cache_enabled=True)
        on_gpu = CudaAutocast() if self.machine.device == "cuda" else contextlib.nullcontext()
        with (
            rehearsal,
            input_casts(self.model, precision=precision, adapts=self.assembly.method.adapts),
            autocast,
            on_gpu,
        ):
            yield

    @contextlib.contextmanager
    def _parts(self, rehearsal: Rehearsal) -> Iterator[None]:
        """What is made before the end of the body counts as activations, what is made after it as loss."""
        body = base_model(self.model).base_model

        def begins(*_: Any) -> None:
            rehearsal.part = "activations"

        def ends(*_: Any) -> None:
            rehearsal.part = "loss"

        handles = [body.register_forward_pre_hook(begins), body.register_forward_hook(ends)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def _drawn(self, rehearsal: Rehearsal) -> Iterator[None]:
        """Counts the bits of the dropout masks that the fused layers keep."""

        def keep(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.grad_fn is not None:
                bits = output.new_empty(-(-args[0].numel() // 8), dtype=torch.uint8)
                metadata: Any = output.grad_fn.metadata  # lives as long as the saved tensors
                metadata["mask"] = bits

        handles = [module.register_forward_hook(keep) for module in self._masks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def largest(assembly: Assembly, plan: BatchPlan, most_steps: int = 512) -> tuple[list[Example], int, bool]:
    """The examples of the largest micro-batch in the first steps, the tokens of its rows, and whether its step has others."""
    examples = assembly.train.examples
    best: tuple[int, list[int], int, int, bool] = (-1, [], 0, 0, False)
    for step in range(plan.first_step, min(plan.end_step, plan.first_step + most_steps)):
        parts = plan.step(step).micro_batches
        for part in parts:
            lengths = [len(examples[i]) for i in part]
            tokens = sum(lengths) if plan.packed else max(lengths)
            size = tokens * (1 if plan.packed else len(part))
            if size > best[0]:
                best = (size, list(part), tokens, step, len(parts) > 1)
    _, chosen, tokens, step, again = best
    rows = [examples[i] for i in chosen]
    if assembly.spec.redraws:
        task, seed = cast(Redraws, assembly.task), assembly.recipe.run.seed
        rows = [task.redraw(e, np.random.default_rng([seed, step, i])) for e, i in zip(rows, chosen, strict=True)]
    return rows, tokens, again


def _first(task: Any, examples: list[Example], packed: bool) -> Batch:
    batch: Batch = collate_packed(examples[:1], device="cpu") if packed else task.collate(examples[:1], "cpu")
    return batch


def _startable(assembly: Assembly) -> Assembly:
    """Without an initialisation that reads weights or rows: it does not change what is held."""
    options = assembly.adapter_options
    if options.get("init_lora_weights") in (None, True):
        return assembly
    return assembly.derive({"adapter.init": "auto"})


def _num_rows(assembly: Assembly) -> int | None:
    rows = assembly.recipe.model.resize_token_embeddings
    return assembly.num_embeddings if assembly.recipe.adapter.tokens else rows


def _without_dropout(model: Any) -> list[nn.Module]:
    """Removes the dropout of the fused layers, whose masks are drawn in NumPy, and returns those that had one."""
    changed = []
    for module in model.modules():
        if isinstance(module, FusedLora):
            for dropout in cast(Any, module).lora_dropout.values():
                if isinstance(dropout, nn.Dropout) and dropout.p:
                    dropout.p = 0.0
                    changed.append(cast(nn.Module, module))
    return changed
