"""Runs a prepared training: gates, loop, evaluation, and the run folder with its status."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import DistributedDataParallelKwargs

from peftlab.adapters import load_state, save_trained
from peftlab.assembly.accelerator import run_accelerator
from peftlab.assembly.assembly import Assembly
from peftlab.assembly.checks import check_room
from peftlab.assembly.finish import resume_command, verify_and_finish, write_status
from peftlab.assembly.plan import loop_settings, padded_plan
from peftlab.assembly.prepare import MakeLoss, Parts, Phase, prepare
from peftlab.assembly.witness import WITNESS_NAME, Witness
from peftlab.data import Rows, packing_figures
from peftlab.errors import ArtifactError, Interrupted
from peftlab.evaluation.loop import answer_signatures, evaluate_examples
from peftlab.measuring.memory import release_memory
from peftlab.models import save_plain
from peftlab.ops import plans_in_use
from peftlab.ranks import is_first, num_ranks, on_first
from peftlab.recipe import write_lock
from peftlab.runs import LOCK_NAME, Run, open_run
from peftlab.specs.metrics import METRICS
from peftlab.tasks import Chats, FindsSettings, Generates
from peftlab.training.checkpoint import list_checkpoints
from peftlab.training.distill_loss import DistillLoss
from peftlab.training.loop import LoopResult, TrainingLoop
from peftlab.training.metrics_log import MetricsLog
from peftlab.training.packing_check import check_packing
from peftlab.training.padding_check import check_padding
from peftlab.training.parity import check_parity
from peftlab.training.progress import Progress

# Tokens for the gradient comparison at step 0, which holds all their logits at once.
_FEW_TOKENS = 512


def input_casts(model: Any, *, precision: str, adapts: bool) -> contextlib.AbstractContextManager[Any]:
    """Disables PEFT's cast of adapter inputs to float32 under autocast, where the next matmul undoes it."""
    from peft.helpers import disable_input_dtype_casting

    if precision == "no" or not adapts:
        return contextlib.nullcontext()
    return cast(contextlib.AbstractContextManager[Any], disable_input_dtype_casting(model))


class Fit:
    """One training, from the gates to the finished run folder.

    Args:
        parts: result of ``prepare``. folder: the run folder. checkpoint: the one to resume from; None: start.
        replace: remove an earlier run in the folder once this one is ready to start.
        resume_hint: the command that resumes the run; default ``peftlab train``.
    """

    def __init__(
        self,
        parts: Parts,
        accelerator: Any,
        folder: Path,
        progress: Progress,
        *,
        checkpoint: Path | None = None,
        replace: bool = False,
        resume_hint: str = "",
    ) -> None:
        self._parts, self._accelerator, self._progress = parts, accelerator, progress
        self._folder, self._checkpoint, self._replace = folder, checkpoint, replace
        self._resume_hint = resume_hint or resume_command(folder)
        self._summary = parts.summary
        self._noted: set[str] = set()
        self._found = dict(parts.assembly.found)

    def run(self) -> Run:
        """Trains and evaluates, and merges if the recipe asks for it.

        Raises: VerificationError, ResourceError, ArtifactError, Interrupted.
        """
        parts = self._parts
        with input_casts(parts.model, precision=parts.precision, adapts=parts.recipe.method.adapts):
            self._check_padding()
            if parts.plan.packed:
                self._check_packing()
            self._check_parity()
            self._score_before()
            check_room(
                parts.assembly, parts.model, num_total=self._summary["adapter"]["num_total"], folder=self._folder
            )
            with self._open_folder() as log:
                finished = self._train_and_score(log)
        self._accelerator.free_memory()
        if finished:
            parts.model = None  # it is loaded again, and two copies would double peak memory
            release_memory()
            on_first(
                lambda: verify_and_finish(
                    parts.assembly, self._folder, self._summary, self._progress, resume_hint=self._resume_hint
                )
            )
        return open_run(self._folder)

    def _check_padding(self) -> None:
        """Checks that a row gets the same outputs in a padded batch as alone, and records it in the summary."""
        parts, progress = self._parts, self._progress
        progress.stage("checking that padding does not change outputs")
        problem = check_padding(
            parts.model,
            parts.task,
            max_length=parts.limit,
            device=self._accelerator.device,
            autocast=self._accelerator.autocast,
        )
        release_memory()
        progress.done()
        self._summary["padding"] = parts.task.padding
        if problem is not None:
            progress.note(problem)

    def _check_packing(self) -> None:
        """Runs the leak test and records it in the summary; a model that mixes packed rows gets a padded plan."""
        parts, progress = self._parts, self._progress
        progress.stage("checking that packed rows do not mix")
        problem = check_packing(
            parts.model,
            parts.task,
            parts.train.examples,
            device=self._accelerator.device,
            autocast=self._accelerator.autocast,
        )
        release_memory()
        progress.done()
        if problem is not None:
            parts.plan = padded_plan(parts.assembly, parts.train.lengths, parts.span)
            self._summary["packing"] = {"off": problem}
            progress.note(f"packing is off: {problem}; rows are padded instead")
            return
        figures = packing_figures(parts.train.lengths, parts.limit)
        self._summary["packing"] = {"off": None, **figures}
        progress.note(
            f"packing: {len(parts.train.examples):,} rows in {figures['packs']:,} sequences of up to {parts.limit:,} tokens, "
            f"{100 * figures['empty']:.1f} % padding"
        )

    def _check_parity(self) -> None:
        """Runs the parity gate on the first micro-batch and records it in the summary."""
        parts, progress = self._parts, self._progress
        progress.stage("comparing the training path with the reference path")
        report = check_parity(
            parts.model,
            parts.task,
            [parts.train.examples[i] for i in parts.plan.step(parts.plan.first_step).micro_batches[0]],
            planned=parts.planned,
            kernels=parts.recipe.run.kernels,
            device=self._accelerator.device,
            where=parts.rows.where,
            autocast=self._accelerator.autocast,
            packed=parts.plan.packed,
            loss_sum=parts.loss,
            reference_loss_sum=None if parts.loss is None else parts.loss.reference,
        )
        self._summary["parity"] = asdict(report)
        if num_ranks() > 1 and (report.idle or (report.num_zero_gradients and not parts.recipe.method.adapts)):
            # DDP would wait for the gradients of these parameters.
            self._accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        release_memory()
        progress.done()
        progress.detail(str(report))
        if report.idle:
            progress.note(
                f"{len(report.idle)} of {report.num_adapted} adapted modules are not used by this model, so they do not learn, such "
                f"as {report.idle[0]}; leave them out of adapter.targets"
            )
        if parts.loss is not None:
            self._report_gradients(parts.loss)

    def _report_gradients(self, loss: DistillLoss) -> None:
        """Reports how temperature, weight and stored classes affect the teacher's gradient, before hours of training."""
        parts = self._parts
        rows = [parts.train.examples[i] for i in parts.plan.step(0).micro_batches[0]]
        few = [r for r, tokens in zip(rows, np.cumsum([len(r) for r in rows]), strict=True) if tokens <= _FEW_TOKENS]
        batch = parts.task.collate(few or rows[:1], self._accelerator.device)
        parts.model.eval()
        with self._accelerator.autocast():
            report = loss.gradients(parts.model, batch)
        if report is not None:
            self._summary["gradients"] = asdict(report)
            self._progress.detail(str(report))
            for warning in report.warnings:
                self._progress.warn(warning)

    def _score_before(self) -> None:
        """Evaluates the untrained model; a resumed run reuses the earlier results."""
        parts, summary = self._parts, self._summary
        earlier = open_run(self._folder).summary if self._checkpoint else {}
        summary["before"], summary["samples"] = earlier.get("before"), earlier.get("samples", [])
        if parts.recipe.eval.before and summary["before"] is None:
            self._progress.stage(f"evaluating the untrained model on {parts.held_out.num_rows:,} held-out rows")
            summary["before"] = self._evaluate()
            summary["samples"] = [{"prompt": p, "before": a} for p, a in self._answers()]
            release_memory()

    def _evaluate_meanwhile(self) -> dict[str, float | None]:
        """The metrics in the middle of training: of texts that the model writes only those that the recipe names."""
        options = self._parts.recipe.eval
        skipped = {name for name, spec in METRICS.items() if spec.of_answers and name != options.best}
        quick = [name for name in self._parts.metrics if options.metrics or name not in skipped]
        # FSDP2 prefetches in the order of the last forward passes, so these must be the same on all ranks.
        return self._evaluate(quick, shared=not self._accelerator.is_fsdp2)

    def _evaluate(self, metrics: list[str] | None = None, *, shared: bool = True) -> dict[str, float | None]:
        parts = self._parts
        return evaluate_examples(
            parts.model,
            parts.task,
            parts.held_out,
            metrics=parts.metrics if metrics is None else metrics,
            batch_tokens=parts.recipe.eval.batch_tokens,
            device=self._accelerator.device,
            autocast=self._accelerator.autocast,
            shared=shared,
        )

    def _answers(self) -> Iterator[tuple[str, str]]:
        """Yields the model's answers to eval.prompts, on the first rank."""
        parts, options = self._parts, self._parts.recipe.eval
        if not options.prompts or not is_first():
            return
        parts.model.eval()
        answers = cast(Generates, parts.task).generate(
            parts.model,
            Rows.from_dicts([parts.task.row_from_text(p) for p in options.prompts], name="eval.prompts"),
            batch_tokens=options.batch_tokens,
            max_length=parts.assembly.model_limit,
            max_new_tokens=options.max_new_tokens,
        )
        for prompt, answer in zip(options.prompts, answers, strict=True):
            if "note" in answer and prompt not in self._noted:
                self._progress.note(f"a prompt of eval.prompts is {answer['note']}: {prompt[:40]!r} ...")
            self._noted.add(prompt)
            yield prompt, answer["text"]

    def _train_and_score(self, log: MetricsLog) -> bool:
        """Trains; returns whether the run is complete. After a phase that is not the last, there is only a checkpoint."""
        parts, summary, progress = self._parts, self._summary, self._progress
        self._accelerator.init_trackers("peftlab", config={"recipe": parts.loaded.name})
        loop = self._loop(log)
        if self._checkpoint:
            progress.note(f"resuming after step {loop.resume(self._checkpoint)}")
            if loop.result.best_step is not None and not (self._folder / "best").is_dir():
                raise ArtifactError(
                    f"{self._folder / 'best'} is missing, which has the weights of step {loop.result.best_step}, the best so "
                    "far; start over with --replace"
                )
        if parts.phase is not None and parts.phase.before is not None:
            parts.phase.before(parts)
        progress.stage(f"training for {parts.plan.end_step - parts.plan.first_step:,} steps")
        result = loop.run()
        if result.steps < parts.plan.total_steps and not result.stopped_early:
            summary["training"] = _figures(result)
            return False
        self._score(loop, result)
        summary["training"] = _figures(result)
        log.write({"step": result.steps, "eval": summary["after"], "final": True})
        return True

    def _score(self, loop: TrainingLoop, result: LoopResult) -> None:
        """Saves and evaluates the trained model, and lets it answer."""
        summary, progress = self._summary, self._progress
        self._settle_and_save(loop)  # now, so that a later failure does not lose the training
        progress.stage("evaluating the trained model")
        with loop.whole():
            final = self._evaluate()
        loop.finish(final)
        self._keep_best(loop)
        if signatures := answer_signatures(self._parts.metrics):
            summary["signatures"] = signatures
        with loop.whole():
            summary["after"] = final if result.best_step in (None, result.steps) else self._evaluate()
            answers = list(self._answers())
            on_first(self._write_witness)
        if not summary["samples"]:
            summary["samples"] = [{"prompt": p} for p, _ in answers]
        if answers:  # the first rank's
            for sample, (_, answer) in zip(summary["samples"], answers, strict=True):
                sample["after"] = answer

    def _write_witness(self) -> None:
        parts = self._parts
        Witness.take(parts.model, parts.task, parts.held_out.examples, **self._runs()).write(
            self._folder / WITNESS_NAME
        )

    def _loop(self, log: MetricsLog) -> TrainingLoop:
        parts = self._parts
        return TrainingLoop(
            model=parts.model,
            task=parts.task,
            train=parts.train.examples,
            plan=parts.plan,
            settings=loop_settings(parts.assembly),
            accelerator=self._accelerator,
            folder=self._folder,
            log=log,
            progress=self._progress,
            where=parts.rows.where,
            loss_sum=parts.loss,
            evaluate=self._evaluate_meanwhile,
            resume_hint=self._resume_hint,
        )

    def _keep_best(self, loop: TrainingLoop) -> None:
        """Restores the best evaluated step if eval.best is set."""
        parts, best, result = self._parts, self._folder / "best", loop.result
        if result.best_step is not None and result.best_step != result.steps:
            self._progress.note(
                f"keeping step {result.best_step}: best {parts.recipe.eval.best} {result.best_value:.4g}"
            )
            with loop.plain():
                load_state(parts.model, best)
            self._settle_and_save(loop)

    def _settle_and_save(self, loop: TrainingLoop) -> None:
        with loop.whole():
            self._settle()
        with loop.plain():
            on_first(self._save_result)

    def _settle(self) -> None:
        """Finishes the trained model, and keeps the settings that the task finds in it."""
        parts = self._parts
        if not parts.assembly.spec.finds_settings:
            return
        with self._accelerator.autocast():
            self._found |= cast(FindsSettings, parts.task).after_training(
                parts.model, parts.train.examples, batch_tokens=parts.recipe.eval.batch_tokens
            )
        if self._found != parts.assembly.found:
            on_first(self._write_lock)

    def _save_result(self) -> None:
        """Saves the adapter, or without one the model as a plain transformers folder."""
        parts, folder = self._parts, self._folder
        if parts.recipe.method.adapts:
            save_trained(parts.model, folder / "adapter")
            if parts.recipe.adapter.tokens:  # for those who open the adapter with PEFT alone
                parts.task.files.save_pretrained(str(folder / "adapter"))
            return
        save_plain(parts.model, parts.task.files, folder / "model", extra_file=folder / LOCK_NAME)

    def _runs(self) -> dict[str, Any]:
        return {"batch_tokens": self._parts.recipe.eval.batch_tokens, "device": self._parts.device}

    @contextlib.contextmanager
    def _open_folder(self) -> Iterator[MetricsLog]:
        """Creates the run folder with lock file and status; removes it if the run fails before a checkpoint. The first rank
        does so for all."""
        if not is_first():
            on_first(lambda: None)
            yield MetricsLog(os.devnull)
            return
        folder, resumed = self._folder, self._checkpoint is not None
        if self._replace and not resumed and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        started = time.time()
        resume_step = None
        if resumed:
            for torn in (folder / "checkpoints").glob(".partial-*"):  # of a process that was killed while saving
                shutil.rmtree(torn, ignore_errors=True)
            resume_step = int(list_checkpoints(folder / "checkpoints")[-1].name.removeprefix("step-"))
        try:
            if not resumed:
                self._write_lock()
            self._write_status("running", started)
            log = MetricsLog(folder / "metrics.jsonl", resume_step=resume_step)
            on_first(lambda: None)
            yield log
            if "after" in self._summary:
                self._write_status("trained", started)
                shutil.rmtree(folder / "best", ignore_errors=True)  # not earlier: a run killed before resumes with it
            else:
                self._write_status("running", started)
        except BaseException as error:
            saved = any((folder / name).is_dir() for name in ("adapter", "model"))
            if list_checkpoints(folder / "checkpoints") or saved:
                status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
                with contextlib.suppress(OSError):
                    self._write_status(status, started)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _write_lock(self) -> None:
        parts = self._parts
        fingerprints = parts.assembly.fingerprints
        write_lock(self._folder / LOCK_NAME, parts.loaded, fingerprints=fingerprints, environment=self._environment())

    def _environment(self) -> dict[str, Any]:
        parts = self._parts
        name = torch.cuda.get_device_name() if parts.device == "cuda" else "cpu"
        environment: dict[str, Any] = {"device": name, "precision": parts.precision, "threads": torch.get_num_threads()}
        environment["kernel_plans"] = plans_in_use()
        if parts.task.class_names and parts.assembly.spec.names_classes:
            environment["class_names"] = parts.task.class_names
        if parts.assembly.spec.chats:
            environment["style"] = cast(Chats, parts.task).formatter.style
        if self._found:
            environment["found"] = self._found
        return environment

    def _write_status(self, status: str, started: float) -> None:
        write_status(self._parts.assembly, self._folder, status, started, self._summary)


def _figures(result: LoopResult) -> dict[str, Any]:
    seconds = max(result.seconds, 1e-9)
    return {
        "steps": result.steps,
        "seconds": result.seconds,
        "rows": result.rows,
        "tokens": result.tokens,
        "trained_tokens": result.trained_tokens,
        "rows_per_s": result.rows / seconds,
        "tokens_per_s": result.tokens / seconds,
        "last_loss": result.last_loss,
        "peak_memory_bytes": result.peak_memory_bytes,
        "best_step": result.best_step,
        "stopped_early": result.stopped_early,
    }


def fit(
    assembly: Assembly,
    folder: Path,
    progress: Progress,
    *,
    make_loss: MakeLoss | None = None,
    phase: Phase | None = None,
    checkpoint: Path | None = None,
    replace: bool = False,
    resume_hint: str = "",
) -> Run:
    """Prepares a training and runs it. Arguments and errors: see ``prepare`` and ``Fit``."""
    with run_accelerator(assembly, folder) as accelerator:
        parts = prepare(assembly, accelerator, progress, make_loss=make_loss, phase=phase)
        return Fit(
            parts,
            accelerator,
            folder,
            progress,
            checkpoint=checkpoint,
            replace=replace,
            resume_hint=resume_hint,
        ).run()
