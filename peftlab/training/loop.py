"""The training loop.

Per optimizer step: every micro-batch of the plan adds the gradient of its loss sum divided by the weight of the *whole*
step (contract C3); then a finite check, clipping and the optimizer. All inputs are plain values.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn

from peftlab.adapters import after_step, penalty, rate_factors, save_state, train_mode
from peftlab.data.batching import BatchPlan
from peftlab.errors import Interrupted, ResourceError, VerificationError
from peftlab.evaluation.metrics import higher_is_better
from peftlab.measuring.memory import memory_bytes, peak_memory_bytes
from peftlab.models import base_model
from peftlab.ranks import on_first
from peftlab.tasks import Batch, Contrasts, Example, Outputs, Redraws, Task, collate_packed, step_shares
from peftlab.training.checkpoint import RngState, load_checkpoint, save_checkpoint
from peftlab.training.metrics_log import MetricsLog
from peftlab.training.optimizers import make_optimizer
from peftlab.training.progress import Progress
from peftlab.training.schedules import learning_rate
from peftlab.training.sharding import as_optimizer, full_value, gathered_states, is_sharded, plain, shard_states, whole

# A float16 loss scaler skips a step whose scaled gradients overflow and halves its scale; more in a row is divergence.
_MAX_SKIPPED_STEPS = 25
# Counters of the result that a resumed run continues.
_COUNTED = ("seconds", "tokens", "trained_tokens", "rows")


@dataclass(frozen=True)
class LoopSettings:
    """The settings of the loop; see the recipe schema for their meaning."""

    lr: float = 2e-4
    optimizer: str = "adamw"
    optimizer_options: Mapping[str, Any] = field(default_factory=lambda: {"betas": (0.9, 0.999), "weight_decay": 0.0})
    loraplus_lr_ratio: float = 1.0
    schedule: str = "linear"
    warmup: float = 0.03
    max_grad_norm: float = 1.0
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    best: str | None = None
    patience: int | None = None


@dataclass
class LoopResult:
    """The outcome of the loop. ``seconds`` is training time without evaluation; memory is in bytes."""

    steps: int
    seconds: float = 0.0
    tokens: int = 0
    trained_tokens: float = 0.0
    rows: int = 0
    last_loss: float = math.nan
    peak_memory_bytes: int = 0
    best_step: int | None = None
    best_value: float | None = None
    stopped_early: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


LossSum = Callable[[nn.Module, Batch], Tensor]


class LossModule(nn.Module):
    """Wraps model, loss and the method's penalty in one module, so that DDP sees its forward and autocast covers it."""

    def __init__(self, model: nn.Module, loss_sum: LossSum) -> None:
        super().__init__()
        self.model = model
        self.loss_sum = loss_sum
        # The names of the layers that FSDP2 shards one by one.
        self._no_split_modules = getattr(base_model(model), "_no_split_modules", None)

    def forward(self, batch: Batch) -> Tensor:
        loss = self.loss_sum(self.model, batch)
        extra = penalty(self.model)
        return loss if extra is None else loss + extra * batch.weights.sum().to(loss.dtype)


def _seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _moved(outputs: Outputs, device: Any) -> Outputs:
    targets, weights = (None if t is None else t.to(device) for t in (outputs.targets, outputs.weights))
    return replace(outputs, values=outputs.values.to(device), targets=targets, weights=weights)


class _StopRequested(Exception):
    """Raised after Ctrl-C between micro-batches, where no work is half done."""


class TrainingLoop:
    """Runs a ``BatchPlan`` to its end; saves a checkpoint there if the run continues later.

    Args:
        train: the examples, indexed by the plan.
        where: example row index -> place in the data, for messages.
        loss_sum: sum of the losses of a micro-batch, weighted by example; default the task's loss.
        evaluate: returns the metrics of the current model, or None for no evaluation during training.
        folder: the run folder; checkpoints go to ``checkpoints/``, the best weights to ``best/``.
        resume_hint: the command that resumes the run.
    """

    def __init__(
        self,
        *,
        model: Any,
        task: Task,
        train: Sequence[Example],
        plan: BatchPlan,
        settings: LoopSettings,
        accelerator: Any,
        folder: Path,
        log: MetricsLog,
        progress: Progress,
        where: Callable[[int], str],
        loss_sum: LossSum | None = None,
        evaluate: Callable[[], dict[str, float | None]] | None = None,
        resume_hint: str = "",
    ) -> None:
        self._model, self._task, self._train, self._plan = model, task, train, plan
        self._settings, self._accelerator = settings, accelerator
        self._folder, self._log, self._progress = folder, log, progress
        self._where, self._evaluate, self._resume_hint = where, evaluate, resume_hint
        self._optimizer = make_optimizer(
            model,
            settings.optimizer,
            lr=settings.lr,
            factors=rate_factors(model, settings.lr, settings.loraplus_lr_ratio),
            **settings.optimizer_options,
        )
        self._module: nn.Module = LossModule(model, loss_sum or task.loss_sum)
        self._is_prepared = False
        if not accelerator.is_fsdp2:  # which shards what a checkpoint's weights go into, so it waits for them
            self._prepare()
        # A teacher's loss compares each row with the teacher's.
        self._whole_step = task.spec.contrasts and loss_sum is None and cast(Contrasts, task).whole_step
        self._step = 0
        self._evals_without_better = 0
        self._skipped = 0
        self._stop = False
        self._rng = RngState.capture()
        self._result = LoopResult(steps=plan.total_steps)

    def _prepare(self) -> None:
        states = {}
        if self._accelerator.is_fsdp2:  # the parameters become others
            states = gathered_states(self._model, self._optimizer)
            self._optimizer.state.clear()
        self._module, self._optimizer = self._accelerator.prepare(self._module, self._optimizer)
        self._is_prepared = True
        shard_states(self._model, self._inner_optimizer(), states)

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """Inside, each rank can run the model without the others, see ``sharding.whole``."""
        plugin = getattr(self._accelerator.state, "fsdp_plugin", None)
        return whole(self._module, reshards=plugin is not None and plugin.reshard_after_forward)

    def plain(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model has ordinary parameters to save or load, see ``sharding.plain``."""
        return plain(self._module)

    def resume(self, checkpoint: Path) -> int:
        """Resumes from a checkpoint; returns the number of steps already done. Raises: ArtifactError."""
        state, rng = load_checkpoint(checkpoint, model=self._model, optimizer=self._inner_optimizer())
        self._step = int(state["step"])
        self._result.best_step, self._result.best_value = state["best_step"], state["best_value"]
        for name, value in state.get("counted", {}).items():
            setattr(self._result, name, value)
        self._evals_without_better = state["evals_without_better"]
        rng.restore()
        return self._step

    def run(self) -> LoopResult:
        """Trains to the end of the plan, or until patience runs out.

        Raises: VerificationError (non-finite loss or gradient), Interrupted (Ctrl-C, after saving), ResourceError.
        """
        settings, progress = self._settings, self._progress
        if not self._is_prepared:
            self._prepare()
        train_mode(self._model)
        progress.start(self._plan.total_steps, self._step)
        try:
            with self._sigint_sets_flag():
                # A checkpoint may have been saved right before the run stopped early.
                while self._step < self._plan.end_step and not self._out_of_patience():
                    self._one_step()
                    last = self._step == self._plan.total_steps
                    if settings.eval_every and self._step % settings.eval_every == 0 and not last:
                        self._evaluate_now()
                    due = settings.save_every and self._step % settings.save_every == 0
                    if (due or self._step == self._plan.end_step) and not last:
                        self._rng = RngState.capture()
                        self.save()
        finally:
            progress.stop()
        if self._out_of_patience() and self._step < self._plan.total_steps:
            self._result.stopped_early = True
            progress.note(
                f"stopped after step {self._step}: {settings.best} has not improved for {self._evals_without_better} evaluations"
            )
        self._result.steps = self._step
        self._result.peak_memory_bytes = peak_memory_bytes(self._accelerator.device.type)
        return self._result

    def _out_of_patience(self) -> bool:
        return bool(self._settings.patience and self._evals_without_better >= self._settings.patience)

    def finish(self, metrics: dict[str, float | None]) -> None:
        """Considers the final evaluation for the best checkpoint."""
        if not self._result.history or self._result.history[-1]["step"] != self._step:
            self._keep_best(metrics)

    @property
    def result(self) -> LoopResult:
        return self._result

    def save(self) -> Path:
        """Writes a checkpoint of the last completed step."""
        sharded = is_sharded(self._module)
        optimizer = self._inner_optimizer()
        states = gathered_states(self._model, optimizer) if sharded else {}
        with self.plain():
            return on_first(
                lambda: save_checkpoint(
                    self._folder / "checkpoints",
                    step=self._step,
                    model=self._model,
                    optimizer=as_optimizer(self._model, states) if sharded else optimizer,
                    rng=self._rng,
                    state={
                        "best_step": self._result.best_step,
                        "best_value": self._result.best_value,
                        "evals_without_better": self._evals_without_better,
                        "total_steps": self._plan.total_steps,
                        "counted": {name: getattr(self._result, name) for name in _COUNTED},
                    },
                    keep=self._settings.keep,
                )
            )

    def _inner_optimizer(self) -> Any:
        return getattr(self._optimizer, "optimizer", self._optimizer)

    def _one_step(self) -> None:
        started = time.perf_counter()
        self._rng = RngState.capture()
        planned = self._plan.step(self._step)
        rows = [[self._example(i) for i in part] for part in planned.micro_batches]
        weight = sum(e.weight for part in rows for e in part)
        try:
            loss, bad = self._accumulate(rows, weight)
        except _StopRequested:
            self._rng.restore()
            self._interrupt()
        except torch.cuda.OutOfMemoryError as error:
            longest = max(self._num_tokens(part) for part in rows)
            raise ResourceError(
                f"out of GPU memory in step {self._step + 1} with micro-batches of up to {longest:,} tokens; lower "
                f"{'data.max_length' if self._plan.packed else 'train.batch_size or train.batch_tokens'} and raise "
                "train.accumulate, set train.gradient_checkpointing=true or model.quantize=nf4"
            ) from error
        lr = self._set_learning_rate()
        grad_norm = self._clip_and_check(rows[bad] if bad is not None else [e for part in rows for e in part], loss)
        self._optimizer.step()
        if not getattr(self._optimizer, "step_was_skipped", False):  # gradients of float16 that overflowed
            after_step(self._model, self._step + 1)
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1
        self._record(rows, planned.epoch, weight, loss, lr, grad_norm, time.perf_counter() - started)

    def _example(self, index: int) -> Example:
        """The example for this step. A task may redraw it, and draws the same after a resume."""
        example = self._train[index]
        if not self._task.spec.redraws:
            return example
        rng = np.random.default_rng([self._plan.seed, self._step, index])
        return cast(Redraws, self._task).redraw(example, rng)

    def _accumulate(self, rows: list[list[Any]], weight: float) -> tuple[float, int | None]:
        """Accumulates the gradients of the step; returns its loss (weighted mean over all ranks) and the index of the first
        micro-batch whose loss is not finite, if any.
        """
        accelerator, world = self._accelerator, self._accelerator.num_processes
        sharded = is_sharded(self._module)
        first = accelerator.process_index
        mine = rows[first::world]
        factor = world / weight  # DDP averages over ranks, but the step's loss is their sum
        if not mine:  # fewer micro-batches than ranks: join the gradient exchange with zeros
            first, mine, factor = 0, rows[:1], 0.0
        own = len(mine)
        if sharded:  # each forward gathers weights from all ranks, so these need the same number of them
            mine = [*mine, *rows[:1] * (-(-len(rows) // world) - own)]
        if world > 1:  # a stream of its own for each step and rank, whatever number of ranks saved the checkpoint
            set_seed(_seed_of(self._plan.seed, self._step, accelerator.process_index))
        sums = []
        batches: Iterable[Batch] = (self._collate(part) for part in mine)
        if self._whole_step and len(rows) > 1:
            batches = self._shared(list(batches), joins=factor == 0.0)
        for number, batch in enumerate(batches, start=1):
            if self._stop and world == 1:  # ranks stop together, below
                raise _StopRequested
            last = number == len(mine)
            with contextlib.nullcontext() if last else accelerator.no_sync(self._module):
                with accelerator.autocast() if sharded else contextlib.nullcontext():  # DDP's wrapper has it
                    loss_sum = self._module(batch)
                accelerator.backward(loss_sum * (factor if number <= own else 0.0))
            sums.append(loss_sum.detach())
        losses = torch.stack(sums[:own])
        said = torch.stack([losses.sum() * factor, losses.new_tensor(self._stop)])
        loss, stop = (accelerator.reduce(said, reduction="mean") if world > 1 else said).tolist()
        if stop:
            raise _StopRequested
        if math.isfinite(loss):
            return loss, None
        finite = torch.isfinite(losses).tolist()
        return loss, first + world * finite.index(False) if not all(finite) else None

    def _shared(self, batches: list[Batch], *, joins: bool) -> list[Batch]:
        """The micro-batches with their share in a loss over all rows of the step, see ``tasks.Contrasts``.

        Args: joins: they belong to another process, and only join the exchange.
        """
        accelerator, rng = self._accelerator, RngState.capture()
        with torch.no_grad(), accelerator.autocast():
            outputs = [self._task.outputs(self._model, batch) for batch in batches]
        rng.restore()
        if accelerator.num_processes > 1:
            outputs = [*([] if joins else outputs), *self._outputs_elsewhere([] if joins else outputs)]
        if joins:
            return batches
        shares = step_shares(batches, outputs, self._task.losses)
        return [replace(batch, share=share) for batch, share in zip(batches, shares, strict=True)]

    def _outputs_elsewhere(self, own: list[Outputs]) -> list[Outputs]:
        """The outputs of the other processes."""
        accelerator = self._accelerator
        here = [(accelerator.process_index, _moved(part, "cpu")) for part in own]
        return [
            _moved(part, accelerator.device)
            for index, part in gather_object(here)
            if index != accelerator.process_index
        ]

    def _collate(self, part: list[Any]) -> Batch:
        device = self._accelerator.device
        return collate_packed(part, device=device) if self._plan.packed else self._task.collate(part, device)

    def _num_tokens(self, part: list[Any]) -> int:
        """Tokens of a micro-batch, including padding."""
        return sum(map(len, part)) if self._plan.packed else len(part) * max(map(len, part))

    def _clip_and_check(self, suspects: list[Any], loss: float) -> float:
        """Clips and returns the norm before clipping. Raises: VerificationError for a non-finite value, before any update."""
        trained = [p for p in self._model.parameters() if p.requires_grad]
        limit = self._settings.max_grad_norm or math.inf
        norm = full_value(self._accelerator.clip_grad_norm_(trained, limit))
        if math.isfinite(loss) and math.isfinite(norm):
            self._skipped = 0
            return norm
        if math.isfinite(loss) and self._accelerator.scaler is not None and self._skipped < _MAX_SKIPPED_STEPS:
            self._skipped += 1
            return norm
        self._optimizer.zero_grad(set_to_none=True)
        self._rng.restore()
        path = self.save() if self._step else None
        places = [self._where(e.row) for e in suspects]
        shown = ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
        what = "loss" if not math.isfinite(loss) else "gradient norm"
        saved = f"; the state before this step is in {path}" if path else ""
        raise VerificationError(
            f"the {what} of step {self._step + 1} is {loss if what == 'loss' else norm}, so the weights were not updated. "
            f"Rows of the batch: {shown}. Lower train.lr, raise train.warmup, or set train.precision=float32{saved}"
        )

    def _set_learning_rate(self) -> float:
        s = self._settings
        lr = learning_rate(
            self._step, total_steps=self._plan.total_steps, peak=s.lr, schedule=s.schedule, warmup=s.warmup
        )
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        return lr

    def _record(
        self, rows: list[list[Any]], epoch: int, weight: float, loss: float, lr: float, norm: float, seconds: float
    ) -> None:
        examples = [e for part in rows for e in part]
        tokens = sum(map(len, examples))
        trained = sum(int(e.trained.sum()) for e in examples if e.trained is not None)
        result = self._result
        result.seconds += seconds
        result.tokens += tokens
        result.trained_tokens += trained
        result.rows += len(examples)
        result.last_loss = loss
        values = {
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "epoch": epoch,
            "rows": len(examples),
            "tokens": tokens,
            "trained_tokens": trained,
            "micro_batches": len(rows),
            "tokens_per_s": tokens / seconds,
            "memory_bytes": memory_bytes(self._accelerator.device.type),
        }
        if self._accelerator.is_main_process:
            self._log.write({"step": self._step, **values})
        self._accelerator.log({f"train/{k}": v for k, v in values.items()}, step=self._step)
        self._progress.step(self._step, values)

    def _evaluate_now(self) -> None:
        assert self._evaluate is not None
        with self.whole():
            metrics = self._evaluate()
        if self._accelerator.is_main_process:
            self._log.write({"step": self._step, "eval": metrics})
        self._accelerator.log({f"eval/{k}": v for k, v in metrics.items() if v is not None}, step=self._step)
        self._progress.evaluated(self._step, metrics)
        self._result.history.append({"step": self._step, **metrics})
        self._keep_best(metrics)

    def _keep_best(self, metrics: dict[str, float | None]) -> None:
        name = self._settings.best
        if name is None:
            return
        value, best = metrics[name], self._result.best_value
        if value is None or not math.isfinite(value):
            self._evals_without_better += 1
        elif best is None or (value > best if higher_is_better(name) else value < best):
            self._result.best_step, self._result.best_value = self._step, value
            self._evals_without_better = 0
            with self.plain():
                on_first(lambda: save_state(self._model, self._folder / "best"))
        else:
            self._evals_without_better += 1

    def _interrupt(self) -> None:
        if not self._step:
            raise Interrupted("interrupted before the first step; there is nothing to resume")
        path = self.save()
        raise Interrupted(f"interrupted; step {self._step} is saved in {path}. Resume with: {self._resume_hint}")

    @contextlib.contextmanager
    def _sigint_sets_flag(self) -> Iterator[None]:
        """The first Ctrl-C stops the loop at the next micro-batch, the second stops it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handler(signum: int, frame: Any) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True
            self._progress.note("stopping after this micro-batch and saving a checkpoint (Ctrl-C again to stop now)")

        before = signal.signal(signal.SIGINT, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
